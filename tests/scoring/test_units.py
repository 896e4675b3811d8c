"""One verdict of a unit, kept beside the night it is of."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.scoring import ledger, report, score, units
from tests.scoring.test_score import settings, stage, write_leaves
from tests.support import stored
from tests.support.markup import check

HEALTHY, LATE = 1, 2


def night(out: Path, date: str, plants: dict[str, list[int]], **more: Any) -> dict[str, Any]:
    """A night with photographs of plants that the model calls so; its summary, units kept."""
    names = [f"p{p}/{date}-{i}.jpg" for p, said in plants.items() for i in range(len(said))]
    logits = np.zeros((len(names), 3), np.float32)
    logits[np.arange(len(names)), [label for said in plants.values() for label in said]] = 2.0
    logits = logits[more.get("failed", 0) :]
    settings: dict[str, Any] = {"unit": r"/p(\d+)/", "seed": int(date[-2:])} | more
    run_id = stored.write_night(out, date, images="/in", names=names, logits=logits, **settings)
    summary: dict[str, Any] = storage.read_json(str(out / ledger.RUNS / f"{run_id}.json"))
    units.keep(str(out), summary)
    return summary


def kept(out: Path, date: str) -> pd.DataFrame:
    return pd.read_parquet(out / units.UNITS / f"date={date}").set_index("unit")


def test_photographs_of_a_plant_make_one_verdict(tmp_path: Path) -> None:
    plants = {str(i): [LATE if i % 2 else HEALTHY] * 3 for i in range(20)}
    plants["7"] = [LATE, LATE, HEALTHY]
    summary = night(tmp_path, "2026-11-24", plants)
    found = kept(tmp_path, "2026-11-24")
    assert len(found) == 20
    assert found.label["7"] == "late_blight"
    assert found.confidence["7"] < found.confidence["9"]
    assert (found.photographs == 3).all()
    assert (found.tonight == 3).all()
    for unit in found.itertuples():
        assert sum(unit.probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert unit.probabilities[unit.label] == pytest.approx(unit.confidence)
        assert (unit.status == "review") == (unit.confidence < 0.75) == isinstance(unit.reason, str)
    # The same again writes the same.
    place = units.url(str(tmp_path), "2026-11-24", summary["run_id"])
    before = Path(place).read_bytes()
    units.keep(str(tmp_path), summary)
    assert Path(place).read_bytes() == before
    page = check(Path(report.write(str(tmp_path), "2026-11-24")).read_bytes())
    assert "20 units, by 60 photographs" in page.text


def test_a_plant_with_new_photographs_is_judged_anew_with_its_history(tmp_path: Path) -> None:
    night(tmp_path, "2026-10-01", {"1": [LATE] * 5})  # too long ago
    night(tmp_path, "2026-11-23", {"1": [LATE] * 3, "2": [HEALTHY] * 2})
    night(tmp_path, "2026-11-24", {"1": [HEALTHY], "3": [HEALTHY]})
    assert kept(tmp_path, "2026-11-23").photographs.to_dict() == {"1": 3, "2": 2}
    found = kept(tmp_path, "2026-11-24")
    assert found.photographs.to_dict() == {"1": 4, "3": 1}
    assert found.tonight.to_dict() == {"1": 1, "3": 1}
    assert found.label["1"] == "late_blight"


def test_a_photograph_that_was_scored_again_counts_once(tmp_path: Path) -> None:
    for seed, label in ((1, LATE), (2, HEALTHY)):
        logits = np.zeros((2, 3), np.float32)
        logits[:, label] = 2.0
        run_id = stored.write_night(
            tmp_path,
            f"2026-11-2{seed}",
            images="/in",
            names=["p1/a.jpg", "p1/b.jpg"],
            logits=logits,
            seed=seed,
            unit=r"/p(\d+)/",
        )
        units.keep(str(tmp_path), storage.read_json(str(tmp_path / ledger.RUNS / f"{run_id}.json")))
    found = kept(tmp_path, "2026-11-22")
    assert (found.photographs["1"], found.label["1"]) == (2, "healthy")


def test_what_is_no_unit_is_left_out_and_what_is_unlike_is_for_review(tmp_path: Path) -> None:
    night(tmp_path, "2026-11-24", {"1": [LATE] * 3, "x": [LATE]}, novelty=90.0, failed=1)
    found = kept(tmp_path, "2026-11-24")
    assert found.photographs.to_dict() == {"1": 2}
    assert found.reason["1"].startswith("unlike-training: 2 of 2 photographs")
    night(tmp_path, "2026-11-25", {"y": [LATE]})
    assert not (tmp_path / units.UNITS / "date=2026-11-25").exists()


def test_a_night_without_units_has_none(tmp_path: Path) -> None:
    run_id = stored.write_night(tmp_path, "2026-11-24", images="/in", names=["p1/a.jpg"])
    before = sorted(tmp_path.rglob("*"))
    units.keep(str(tmp_path), storage.read_json(str(tmp_path / ledger.RUNS / f"{run_id}.json")))
    assert sorted(tmp_path.rglob("*")) == before
    page = check(Path(report.write(str(tmp_path), "2026-11-24")).read_bytes())
    assert "By unit" not in page.text
    assert "By field" not in page.text


def test_no_reader_of_the_predictions_meets_units_and_all_can_be_read(tmp_path: Path) -> None:
    night(tmp_path, "2026-11-23", {"1": [LATE] * 3})
    night(tmp_path, "2026-11-24", {"1": [LATE] * 3})
    query = f"select count(*) from read_parquet('{tmp_path}/**/*.parquet')"
    assert duckdb.connect().execute(query).fetchone() == (6,)
    assert len(pd.read_parquet(tmp_path)) == 6
    assert len(pd.read_parquet(tmp_path / units.UNITS)) == 2
    assert len(ledger.published(str(tmp_path))) == 2


def test_the_job_keeps_units_of_what_it_publishes(random_model: str, tmp_path: Path) -> None:
    images, out = tmp_path / "in", tmp_path / "out"
    write_leaves(images, 3)
    staging = stage(random_model, images, out, 3)
    told = {"unit": r"leaf_(\d{3})", "field": "leaf", "date": "2026-11-24"}
    score.run(settings(random_model, images, out, **told))
    found = kept(out, "2026-11-24")
    assert found.photographs.to_dict() == {"000": 3}
    assert {path.name for path in (out / units.UNITS).rglob("*") if path.is_file()} == {
        staging.run_id
    }
    assert "By field" in (out / "_reports" / "2026-11-24.html").read_text()


@pytest.mark.parametrize("flag", ["unit", "field"])
def test_the_job_refuses_what_names_nothing(flag: str, random_model: str, tmp_path: Path) -> None:
    write_leaves(tmp_path / "in", 1)
    with pytest.raises(UserError) as error:
        score.run(settings(random_model, tmp_path / "in", tmp_path / "out", **{flag: "plot"}))
    assert error.value.reason == "matches-nothing"
    assert f"--{flag} 'plot' finds nothing in 1 photographs" in str(error.value)
