"""The report of a night, of nights that were made without a network."""

import datetime
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.core.settings import ReportSettings, validate
from leafnet.metrics import drift
from leafnet.scoring import ledger, report, rows
from leafnet.scoring.night import Earlier, Night
from tests.support import stored
from tests.support.markup import Parsed, check

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>\u202egpj.exe"


def names(count: int, first: int = 0) -> list[str]:
    return [f"field/leaf_{i:05d}.jpg" for i in range(first, first + count)]


def written(out: Path, date: str) -> Parsed:
    return check(Path(report.write(str(out), date)).read_bytes())


def test_a_first_night(tmp_path: Path) -> None:
    stored.write_night(tmp_path, "2026-11-24", images="/in", names=names(60), failed=2)
    page = written(tmp_path, "2026-11-24")
    frame = pd.read_parquet(tmp_path / "date=2026-11-24")
    counts = frame.status.value_counts()
    assert f"60 photographs: {counts['ok']} are settled, {counts['review']} are" in page.text
    assert "2 failed" in page.text
    assert page.text.count("no night to compare with") == 1
    assert "max_failed: 5.0 ray.address: none" in page.text
    assert "Over the nights" not in page.text
    assert "Where they were taken" not in page.text
    assert len(page.all("img")) == counts["review"]
    links = {str(link["href"]) for link in page.all("a")}
    for row in frame[frame.status != "ok"].itertuples():
        assert Path(str(row.image)).as_uri() in links
    assert "truncated" in page.text
    assert "no shift, which begins at" in page.text


def test_a_night_against_those_before(tmp_path: Path) -> None:
    for day in range(1, 24):
        night = f"2026-11-{day:02d}"
        stored.write_night(tmp_path, night, images="/in", names=names(50), seed=day)
    stored.write_night(tmp_path, "2026-09-01", images="/in", names=names(9), seed=77)  # long ago
    stored.write_night(
        tmp_path, "2026-11-24", images="/in", names=names(20), seed=40, novelty=75, placed=True
    )
    report.write(str(tmp_path), "2026-11-23")
    page = written(tmp_path, "2026-11-24")
    assert "median of the last 23 nights: 50" in page.text
    assert "Only 20 photographs came; the median of the last 23 nights is 50." in page.text
    assert "less like the training photographs than those of validation were" in page.text
    assert "(population stability index" in page.text
    assert re.search(r"[\d.]+ % are for review; on the last 23 nights it was", page.text)
    assert "13 of 20 photographs have a position" in page.text
    assert "the night before, 23 November 2026" in page.text
    assert "2026-09-01" not in page.text
    assert "Photographs of each label 2026-11-24" in page.text.replace(
        "night early_blight healthy late_blight ", ""
    )


def test_a_night_in_an_object_store() -> None:
    out = "memory://nights/predictions"
    stored.write_night(out, "2026-11-23", images="s3://field", names=names(30))
    stored.write_night(out, "2026-11-24", images="s3://field", names=names(30), seed=2)
    target = report.write(out, "2026-11-24")
    assert target == f"{out}/_reports/2026-11-24.html"
    page = check(storage.read_bytes(target))
    assert page.all("img")
    assert "median of the last night: 30" in page.text
    assert storage.read_bytes(f"{out}/_reports/latest.html") == storage.read_bytes(target)
    storage.filesystem("memory://")[0].rm("/nights", recursive=True)


def test_no_reader_of_the_predictions_meets_the_reports(tmp_path: Path) -> None:
    for date in ("2026-11-23", "2026-11-24"):
        stored.write_night(tmp_path, date, images="/in", names=names(30), seed=int(date[-1]))
        report.write(str(tmp_path), date)
    assert len(pd.read_parquet(tmp_path)) == 60
    with duckdb.connect() as connection:
        query = f"select count(*) from '{tmp_path}/**/*.parquet'"
        assert connection.execute(query).fetchone() == (60,)
    assert pd.read_parquet(tmp_path / "date=2026-11-24").columns.tolist() == [
        *rows.schema(()).names,
    ]
    reports = sorted(
        path.relative_to(tmp_path).as_posix() for path in (tmp_path / "_reports").glob("*.*")
    )
    assert reports == [
        "_reports/2026-11-23.html",
        "_reports/2026-11-24.html",
        "_reports/latest.html",
    ]


def test_the_latest_is_that_of_the_newest_night(tmp_path: Path) -> None:
    latest = tmp_path / "_reports" / "latest.html"
    stored.write_night(tmp_path, "2026-11-24", images="/in", names=names(12))
    report.write(str(tmp_path), "2026-11-24")
    newest = latest.read_bytes()
    assert newest == (tmp_path / "_reports" / "2026-11-24.html").read_bytes()
    stored.write_night(tmp_path, "2026-11-20", images="/in", names=names(12, first=50), seed=2)
    report.write(str(tmp_path), "2026-11-20")  # a night that was made up for
    assert latest.read_bytes() == newest


def test_the_same_night_again_with_more_photographs(tmp_path: Path) -> None:
    """Its report is of all runs of the night, thumbnails of the first one included."""
    stored.write_night(tmp_path, "2026-11-24", images="/in", names=names(40), failed=1)
    report.write(str(tmp_path), "2026-11-24")
    stored.write_night(
        tmp_path, "2026-11-24", images="/in", names=names(25, first=40), seed=8, failed=2
    )
    page = written(tmp_path, "2026-11-24")
    frame = pd.read_parquet(tmp_path)
    assert "65 photographs:" in page.text
    assert "3 failed" in page.text
    waiting = set(frame[frame.status == "review"].image)
    links = {str(link["href"]) for link in page.all("a")}
    assert {Path(image).as_uri() for image in waiting} <= links
    assert len(page.all("img")) == len(waiting)


def test_a_night_of_two_models_is_told_by_the_newer(tmp_path: Path) -> None:
    stored.write_night(
        tmp_path,
        "2026-11-24",
        images="/in",
        names=names(30),
        model_id="f" * 16,
        run_id="20261124T020000Z-aaaaaa",
    )
    stored.write_night(
        tmp_path, "2026-11-24", images="/in", names=names(30), run_id="20261124T090000Z-bbbbbb"
    )
    page = written(tmp_path, "2026-11-24")
    assert "30 photographs:" in page.text
    assert f"30 more photographs of this night were scored by another model, {'f' * 16}" in (
        page.text
    )


def test_names_from_the_field_are_text(tmp_path: Path) -> None:
    hostile = [f"{EVIL} {i}.jpg" for i in range(30)]
    stored.write_night(tmp_path, "2026-11-24", images="/in", names=hostile, failed=3)
    page = written(tmp_path, "2026-11-24")  # which refuses scripts and handlers
    assert "<script>alert(1)</script>" in page.text
    assert "\\u202egpj.exe" in page.text
    assert "\u202e" not in page.text


@pytest.mark.parametrize("images", ["s3://field/in", "javascript:alert(1)", "/data/s.parquet#"])
def test_what_a_browser_cannot_open_is_no_link(images: str, tmp_path: Path) -> None:
    stored.write_night(tmp_path, "2026-11-24", images=images, names=names(30), failed=3)
    page = written(tmp_path, "2026-11-24")
    assert not [link for link in page.all("a") if not str(link["href"]).startswith("#")]
    assert "leaf_00000.jpg" in page.text


@pytest.mark.parametrize("explained", [False, True])
def test_ten_thousand_photographs_are_a_page_of_less_than_fifteen_megabytes(
    explained: bool, tmp_path: Path
) -> None:
    stored.write_night(
        tmp_path,
        "2026-11-24",
        images="/in",
        names=names(10_000),
        failed=300,
        placed=True,
        explained=explained,
    )
    target = Path(report.write(str(tmp_path), "2026-11-24"))
    assert target.stat().st_size < (8_000_000 if explained else 4_000_000)
    page = check(target.read_bytes())
    assert len(page.all("img")) == (1000 if explained else 500)
    waiting = (pd.read_parquet(tmp_path).status == "review").sum()
    assert waiting > 1000
    assert f"The 500 of {waiting:,} photographs that need it most" in page.text
    assert "the first 50 of 300" in page.text


def test_what_is_explained_has_two_pictures(tmp_path: Path) -> None:
    """Of a night that was explained when it was scored for the second time."""
    stored.write_night(tmp_path, "2026-11-24", images="/in", names=names(40))
    page = written(tmp_path, "2026-11-24")
    first = len(page.all("img"))
    assert "where the model sees its label" not in page.text
    assert not [tag for tag in page.all("ul") if tag.get("class") == "sheet maps"]
    stored.write_night(
        tmp_path, "2026-11-24", images="/in", names=names(40, first=40), seed=8, explained=True
    )
    page = written(tmp_path, "2026-11-24")
    frame = pd.read_parquet(tmp_path)
    assert not {"explained", "seen", "thumbnail"} & set(frame.columns)
    later = frame[(frame.status == "review") & (frame.image >= "/in/field/leaf_00040.jpg")]
    alts = [str(image["alt"]) for image in page.all("img")]
    assert len(alts) == first + 2 * len(later)
    for row in later.itertuples():
        name = Path(str(row.image)).name
        place = alts.index(f"Photograph {name}")
        assert alts[place + 1] == f"Where the model sees {row.label} in {name}"
    assert "where the model sees its label" in page.text
    assert [tag for tag in page.all("ul") if tag.get("class") == "sheet maps"]


def test_what_older_runs_do_not_have(tmp_path: Path) -> None:
    """Without thumbnails, a reference and a summary, the report says so or does without."""
    run_id = stored.write_night(tmp_path, "2026-11-23", images="/in", names=names(30))
    summary = tmp_path / "_runs" / f"{run_id}.json"
    document = json.loads(summary.read_text())
    del document["model"]["reference"], document["model"]["review"], document["settings"]
    summary.write_text(json.dumps(document))
    shutil.rmtree(tmp_path / "_reports")
    page = written(tmp_path, "2026-11-23")
    assert page.all("img") == []
    assert "no thumbnail" in page.text
    assert "published without histograms of its validation photographs" in page.text
    summary.unlink()
    check(Path(report.write(str(tmp_path), "2026-11-23")).read_bytes())
    stored.write_night(tmp_path, "2026-11-24", images="/in", names=names(30), seed=3)
    assert "median of the last night: 30" in written(tmp_path, "2026-11-24").text


def test_the_note_of_a_night_is_at_the_top(tmp_path: Path) -> None:
    run_id = stored.write_night(tmp_path, "2026-11-24", images="/in", names=names(3))
    summary = tmp_path / "_runs" / f"{run_id}.json"
    document = json.loads(summary.read_text())
    document["settings"]["note"] = f"drawn {EVIL}"
    summary.write_text(json.dumps(document))
    page = written(tmp_path, "2026-11-24")
    assert "drawn \"'><script>alert(1)" in page.text.split("no night to compare with")[0]


def test_a_night_on_which_all_failed(tmp_path: Path) -> None:
    stored.write_night(tmp_path, "2026-11-24", images="/in", names=names(3), failed=3)
    page = written(tmp_path, "2026-11-24")
    assert "No photograph of this night could be scored." in page.text
    assert "100 % of the photographs failed, more than the 5 % that are allowed" in page.text


def test_there_is_no_such_night(tmp_path: Path) -> None:
    stored.write_night(tmp_path, "2026-11-24", images="/in", names=names(3))
    with pytest.raises(UserError, match="no predictions for the night 2026-11-25"):
        report.write(str(tmp_path), "2026-11-25")


def test_more_classes_than_colours(tmp_path: Path) -> None:
    classes = tuple(f"class {i}" for i in range(9))
    night = Night(classes, drift.Histogram(0.0, 1.0, np.zeros(drift.BINS, int)), None)
    night.labels.update({name: 10 - i for i, name in enumerate(classes)})
    ordered = report._ordered(night, [])
    assert [label.colour for label in ordered] == ["c0", "c1", "c2", "c3", "c4", "c5"] + ["cx"] * 3
    earlier = Earlier("2026-11-23", night.status, night.labels)
    shares = report._shares(night, [earlier], ordered, "2026-11-24")
    assert shares is not None
    assert shares["names"][-1] == "3 other classes"
    assert sum(shares["rows"][0][1]) == night.labels.total()


def test_settings_of_the_job() -> None:
    night = datetime.date(2026, 11, 24)  # as YAML reads it
    made = validate(ReportSettings, {"predictions": "p", "date": night})
    assert made.date == "2026-11-24"


def test_published_files_are_found_beside_the_reports(tmp_path: Path) -> None:
    stored.write_night(tmp_path, "2026-11-24", images="/in", names=names(3))
    report.write(str(tmp_path), "2026-11-24")
    assert [file.date for file in ledger.published(str(tmp_path))] == ["2026-11-24"]


@pytest.mark.parametrize("photographs", [5, 12, 20])
def test_an_ordinary_night_is_hardly_ever_called_unusual(photographs: int) -> None:
    """Of three classes, one of them rare: 7 % of photographs, and on many nights none."""
    generator, alarms, draws = np.random.default_rng(photographs), 0, 120
    classes = ("healthy", "blight", "rust")
    for _ in range(draws):
        counts = [generator.multinomial(photographs, [0.8, 0.13, 0.07]).tolist() for _ in range(8)]
        review = generator.binomial(photographs, 0.1, 8).tolist()
        status = [Counter(review=n, ok=photographs - n) for n in review]
        labels = [Counter(dict(zip(classes, of_night, strict=True))) for of_night in counts]
        histogram = drift.Histogram(0.0, 1.0, np.zeros(drift.BINS, np.int64))
        tonight = Night(classes, histogram, None, status=status[-1], labels=labels[-1])
        before = [
            Earlier(f"2026-11-{day:02d}", *pair)
            for day, pair in enumerate(zip(status[:-1], labels[:-1], strict=True), 1)
        ]
        alarms += bool(report._unusual(tonight, before))
    assert binom.sf(alarms - 1, draws, 0.01) > 1e-3, f"{alarms} of {draws}"
