"""How right nights are by answers: drawn fairly, added up, kept and told."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from leafnet.core import storage
from leafnet.core.settings import validate
from leafnet.labelling import answers, audit, review
from leafnet.labelling.settings import ReviewSettings
from leafnet.scoring import audits, ledger, report
from leafnet.scoring.audits import Audit
from leafnet.scoring.night import read
from tests.conftest import leaf_jpeg
from tests.support import stored
from tests.support.markup import check

TRUE = "late_blight"


def rows(count: int, run: str = "r1") -> pa.Table:
    """Half of the photographs are of field 1, and a third has a wrong label."""
    return pa.table(
        {
            "image": [f"/in/field-{i % 2}/{i}.jpg" for i in range(count)],
            "label": ["healthy" if i % 3 == 0 else TRUE for i in range(count)],
            "run_id": [run] * count,
        }
    )


def made(table: pa.Table, drawn: list[int], chosen: list[int], out: str = "/p") -> Audit:
    places = sorted({*drawn, *chosen})
    document = audit.frame(
        table,
        [(f"k{place}", place, place in drawn, place in chosen) for place in places],
        predictions=out,
        nights={"r1": "2026-11-24"},
        model_id="0123456789abcdef",
        field=r"field-(\d)",
    )
    return Audit.model_validate(json.loads(json.dumps(document)))


def test_the_order_is_fair_and_the_same_again() -> None:
    first = audit.order(rows(500))
    assert sorted(first) == list(range(500))
    assert np.array_equal(first, audit.order(rows(500)))
    assert not np.array_equal(first, audit.order(rows(500, run="r2")))
    often = np.zeros(500)
    for run in range(400):
        often[audit.order(rows(500, run=f"run {run}"))[:50]] += 1
    assert often.mean() == pytest.approx(40)
    # By chance alone 40, give or take 6.
    assert often.min() > 15
    assert often.max() < 65
    # Whoever asks for fewer gets a part of the same: what is new takes no one's place.
    more = rows(600)
    of_before = [place for place in audit.order(more) if place < 500]
    assert of_before == first.tolist()


def accuracy(sample: Audit, labels: dict[str, str], kind: str = "all", group: str = "") -> Any:
    return audits.accuracy(sample, labels, kind, group, sample.totals[kind][group])


def test_answers_to_those_drawn_tell_of_all() -> None:
    table = rows(600)
    right, of_label, of_field = [], [], []
    for run in range(150):
        order = audit.order(table.set_column(2, "run_id", pa.array([str(run)] * 600)))
        sample = made(table, order[:30].tolist(), [])
        labels = dict.fromkeys(sample.photographs, TRUE)
        found = accuracy(sample, labels)
        right.append((found.value, found.low <= 2 / 3 <= found.high))
        of_label.append(accuracy(sample, labels, "label", "healthy").value)
        of_field.append(accuracy(sample, labels, "field", "1").value)
    values, covered = zip(*right, strict=True)
    assert np.mean(values) == pytest.approx(2 / 3, abs=0.03)
    assert np.mean(covered) >= 0.92
    assert set(of_label) == {0.0}
    assert np.mean(of_field) == pytest.approx(2 / 3, abs=0.04)


def test_those_chosen_count_for_themselves_once_all_are_answered() -> None:
    table = rows(60)
    wrong = list(range(0, 60, 3))  # chosen, for they look doubtful
    drawn = [1, 2, 4, 5, 0, 3]
    sample = made(table, drawn, wrong)
    labels = dict.fromkeys(sample.photographs, TRUE)
    # All 20 wrong ones are known, and four of the other 40 are all right.
    assert accuracy(sample, labels).value == pytest.approx(2 / 3)
    assert accuracy(sample, labels, "label", "healthy") == (0, 0, 0)
    # One of those chosen was passed over: four of the six that were drawn are right.
    del labels["k30"]
    assert accuracy(sample, labels).value == pytest.approx(4 / 6)
    assert audits.accuracy(sample, {}, "all", "", 60) is None


def test_what_was_found_is_kept_beside_the_night_and_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [f"field-{i % 2}/leaf_{i:04d}.jpg" for i in range(200)]
    run_id = stored.write_night(tmp_path, "2026-11-24", images="/in", names=names)
    (file,) = ledger.published(str(tmp_path))
    night = read([file], model_id="0123456789abcdef", classes=stored.CLASSES, reference=None)
    assert night.scored == 200
    table = rows(200).set_column(2, "run_id", pa.array([run_id] * 200))
    document = audit.frame(
        table,
        [(f"k{place}", place, True, False) for place in audit.order(table)[:60].tolist()],
        predictions=str(tmp_path),
        nights={run_id: "2026-11-24"},
        model_id="0123456789abcdef",
        field=None,
    )
    sample = Audit.model_validate(document)
    audit.add_up("review-1", sample, dict.fromkeys(sample.photographs, TRUE))
    said = capfd.readouterr().out
    assert "of the labels of 2026-11-24 are right" in said
    (kept,) = audits.read(str(tmp_path))
    assert kept["answered"] == kept["drawn"] == 60
    assert kept["groups"]["label"]["healthy"]["accuracy"][0] == 0
    page = check(Path(report.url(str(tmp_path), "2026-11-24")).read_bytes())
    assert "People looked at 60 photographs, 60 of them chosen by chance" in page.text
    assert "people found 37 labels right; on the test split it was" in page.text
    # More answers to the same take its place.
    audit.add_up("review-1", sample, dict.fromkeys(sample.photographs, TRUE))
    assert len(audits.read(str(tmp_path))) == 1
    assert audits.of_night(str(tmp_path), "2026-11-24", "another") is None
    audit.add_up("review-2", sample, {})
    assert "none of the 60 photographs" in capfd.readouterr().out
    storage.delete(file.url)
    audit.add_up("review-3", sample, dict.fromkeys(sample.photographs, TRUE))
    assert "has no nights any more" in capfd.readouterr().out


def test_a_review_with_an_audit_and_its_answers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, out, folder = tmp_path / "in", tmp_path / "predictions", tmp_path / "review"
    names = [f"field-{i % 2}/leaf_{i:02d}.jpg" for i in range(40)]
    for i, name in enumerate(names):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(leaf_jpeg(stored.CLASSES[i % 3], seed=i, size=48))
    stored.write_night(
        out, "2026-11-24", images=str(images), names=names, field=r"(field-\d)/", failed=1
    )
    (images / names[5]).unlink()
    asked = {"predictions": str(out), "count": 4, "audit": 12, "out": str(folder)}
    review.choose(validate(ReviewSettings, asked), str(out), str(folder))
    said = capfd.readouterr().out
    assert "chosen    4 of 39 photographs" in said
    assert "audit     12 photographs that chance chose are among them" in said
    sample = answers._read_review(str(folder)).audit
    assert sample is not None
    shown = list(sample.photographs.values())
    assert sum(one.chosen for one in shown) == 4
    assert sum(one.drawn for one in shown) == 12
    assert sample.totals["all"] == {"": 39}
    assert sum(sample.totals["field"].values()) == 39
    rows = list(csv.DictReader((folder / "index.csv").open()))
    assert [row["key"] for row in rows] == list(sample.photographs)
    for row in rows:
        assert sample.photographs[row["key"]].predicted == row["predicted"]
        assert (folder / "photographs" / row["key"]).read_bytes() == Path(row["image"]).read_bytes()
    # All are right but one of those that chance chose.
    labels = {row["key"]: row["predicted"] for row in rows}
    wrong = next(k for k, one in sample.photographs.items() if one.drawn and not one.chosen)
    labels[wrong] = next(name for name in stored.CLASSES if name != labels[wrong])
    audit.add_up(folder.name, sample, labels)
    drawn = sum(one.drawn and not one.chosen for one in shown)
    right = (4 + 35 * (drawn - 1) / drawn) / 39
    assert f"audit     {100 * right:.1f} % of the labels of 2026-11-24" in capfd.readouterr().out
    assert set(audits.read(str(out))[0]["groups"]) == {"all", "label", "field", "night"}


@pytest.mark.parametrize("looked", [20, 50, 200])
def test_of_a_thousand_unchanged_nights_at_most_one_alarms(looked: int) -> None:
    rng = np.random.default_rng(0)
    # How often each outcome comes, of nights as right as the test split, which was drawn as well.
    draws = zip(rng.binomial(300, 0.9, 3000), rng.binomial(looked, 0.9, 3000), strict=True)
    outcomes = Counter(draws)
    alarms = sum(
        times
        for (of_test, right), times in outcomes.items()
        if audits.is_alarming(
            {"drawn_answered": looked, "drawn_right": int(right)},
            [{"count": 300, "accuracy": of_test / 300}],
        )
    )
    assert alarms <= 3
    half = {"drawn_answered": looked, "drawn_right": looked // 2}
    assert audits.is_alarming(half, [{"count": 300, "accuracy": 0.9}])
    assert not audits.is_alarming(half, [])
