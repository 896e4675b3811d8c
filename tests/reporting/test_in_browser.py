"""Both reports in a real browser: silent, complete, accessible, and fit for a phone."""

import importlib.resources
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from leafnet.data.shards import ShardIndex
from leafnet.evaluation import document
from leafnet.scoring import report as night_report
from leafnet.training import report as run_report
from tests.left_out import leave_out
from tests.support import stored
from tests.support.browser import DESKTOP, LEFT_OUT, PHONE, Browser, Page, browser, has_chromium

KINDS = ("night", "run")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if not has_chromium():
        leave_out(LEFT_OUT)
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def reports(data_set: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    for day in range(10, 24):
        names = [f"{day}/leaf_{i}.jpg" for i in range(40)]
        stored.write_night(folder, f"2026-11-{day}", images="/in", names=names, seed=day)
    names = [f"<img src=http://a.invalid onerror=alert({i})>.jpg" for i in range(90)]
    stored.write_night(
        folder,
        "2026-11-24",
        images="/in",
        names=names,
        failed=6,
        placed=True,
        novelty=52,
        explained=True,
    )
    run = folder / "leaves"
    run.mkdir()
    stored.write_run(run, data_set, fine_tuned=True)
    kinds = ("confident-error", "likely-wrong-label", "confused-pair")
    items = [item for kind in kinds for item in stored.items(6, kind)]
    document.write(str(run / "evaluation"), {}, "test", items)
    return {
        "night": Path(night_report.write(str(folder), "2026-11-24")),
        "run": Path(run_report.write(str(run))),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_asked_for_and_nothing_complains(
    kind: str, chromium: Browser, reports: dict[str, Path]
) -> None:
    page = Page(chromium, reports[kind], size=DESKTOP)
    page.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
    images = page.run("[...document.images].map(each => each.complete && each.naturalWidth > 0)")
    assert len(images) > 20
    assert all(images)
    assert page.complaints() == []
    assert page.requests() == [reports[kind].as_uri()]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_no_fault(
    kind: str, size: tuple[int, int], dark: bool, chromium: Browser, reports: dict[str, Path]
) -> None:
    page = Page(chromium, reports[kind], size=size, dark=dark)
    page.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    # Of text on a gradient, such as the shadow at a table's edge, axe cannot tell the contrast.
    page.run(
        "document.querySelectorAll('.scroll')"
        ".forEach(each => each.style.background = 'var(--paper)')"
    )
    axe = importlib.resources.files("axe_core_python").joinpath("axe.min.js").read_text()
    page.run(axe)
    found = page.run("axe.run()")
    assert len(found["passes"]) > 20
    told = [
        (fault["id"], node["html"][:200])
        for fault in [*found["violations"], *found["incomplete"]]
        for node in fault["nodes"]
        # Of text on a drawing it cannot tell the contrast either.
        if not node["html"].startswith("<text")
    ]
    assert told == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_phone_never_scrolls_sideways(
    kind: str, chromium: Browser, reports: dict[str, Path]
) -> None:
    page = Page(chromium, reports[kind], size=PHONE)
    page.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.run("document.documentElement.scrollWidth") <= PHONE[0]
    assert page.run("Math.max(...[...document.images].map(each => each.width))") <= PHONE[0]
    small = page.run(
        "[...document.querySelectorAll('.chart text')]"
        ".map(each => each.getBoundingClientRect().height).filter(high => high < 9).length"
    )
    assert small == 0


@pytest.mark.parametrize("kind", KINDS)
def test_dark_is_dark_and_light_is_light(
    kind: str, chromium: Browser, reports: dict[str, Path]
) -> None:
    means = [
        np.asarray(Page(chromium, reports[kind], size=PHONE, dark=dark).picture()).mean()
        for dark in (False, True)
    ]
    assert means[0] > 180
    assert means[1] < 80


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_key_leads_past_the_navigation(
    kind: str, chromium: Browser, reports: dict[str, Path]
) -> None:
    page = Page(chromium, reports[kind], size=DESKTOP)
    page.press("Tab")
    assert page.run("document.activeElement.className") == "skip"
    page.press("Enter")
    assert page.run("location.hash") == "#content"


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_printed(kind: str, chromium: Browser, reports: dict[str, Path]) -> None:
    pdf = Page(chromium, reports[kind], size=DESKTOP).pdf()
    assert pdf.startswith(b"%PDF")
    assert 1 < pdf.count(b"/Type /Page\n") < 20
