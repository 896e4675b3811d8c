"""The lines of the table of readers in jobs/OUTPUTS.md, on the nights of two models."""

import datetime
import re
from glob import glob
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from leafnet.scoring import rows

PAGE = Path(__file__).parents[2] / "jobs" / "OUTPUTS.md"
PEPPER = "Pepper,_bell___Bacterial_spot"
CHERRY = "Cherry_(including_sour)___healthy"
NIGHTS = {
    "2026-11-23": ("a" * 16, (PEPPER, CHERRY, "blight", "Blight")),
    "2026-11-24": ("b" * 16, ("blight", "rust")),
}


def line(reader: str) -> str:
    (found,) = re.findall(rf"^[|] {reader} [|] `(.+)` [|]$", PAGE.read_text(), re.MULTILINE)
    return str(found)


@pytest.fixture
def nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each class N has the probability N / 10; the first photograph failed."""
    for date, (model_id, names) in NIGHTS.items():
        schema = rows.schema(names, model_id=model_id, run_id=f"run-{date}")
        folder = tmp_path / "predictions" / f"date={date}"
        folder.mkdir(parents=True)
        made = [
            {
                **{"image": f"/in/{date}/{i}.jpg", "status": "ok" if i else "failed"},
                **{"label": names[-1] if i else None, "decoder_version": 1},
                **{"model_id": model_id, "run_id": f"run-{date}"},
                "probabilities": {n: (c + 1) / 10 for c, n in enumerate(names)} if i else None,
                "scored_at": datetime.datetime.now(datetime.UTC),
            }
            for i in range(3)
        ]
        pq.write_table(pa.Table.from_pylist(made, schema), folder / f"run-{date}.parquet")
    for other in ("_runs/run.json", "_staging/run/part-0", "_reports/latest.html"):
        path = tmp_path / "predictions" / other
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    monkeypatch.chdir(tmp_path)


def check(found: list[dict[str, Any]]) -> None:
    assert len(found) == 6
    for row in found:
        names = NIGHTS[str(row["date"])][1]
        if row["status"] == "failed":
            continue
        for name in (PEPPER, CHERRY, "rust"):
            expected = (names.index(name) + 1) / 10 if name in names else None
            assert row["probabilities"][name] == (expected and pytest.approx(expected))


def test_duckdb(nights: None) -> None:
    with duckdb.connect() as connection:
        table: Any = connection.execute(f"select * {line('DuckDB')}").to_arrow_table()
        check(table.to_pylist())
        said = connection.execute(
            "select struct_extract_at(probabilities, 3), struct_extract_at(probabilities, 4) "
            f"{line('DuckDB')} where model_id = '{'a' * 16}' and label is not null"
        ).fetchone()
    assert said == pytest.approx((0.3, 0.4))


def test_pyarrow_and_pandas(nights: None) -> None:
    table = eval(line("PyArrow"), {"pa": pa, "ds": ds, "glob": glob})
    check(table.to_pylist())
    check(table.to_pandas().to_dict("records"))


def test_polars(nights: None) -> None:
    pl = pytest.importorskip("polars", reason="polars is not installed: its line is not tried")
    frame: Any = eval(line("polars"), {"pl": pl, "glob": glob}).collect()
    check(frame.to_dicts())


def test_what_the_page_warns_of_is_so(nights: None) -> None:
    """Without `union_by_name` and `promote_options` a class of the second model is gone."""
    with duckdb.connect() as connection:
        query = "select typeof(probabilities) from 'predictions/**/*.parquet'"
        assert "rust" not in str(connection.execute(query).fetchall())
        query = f"select probabilities['Blight'] {line('DuckDB')} where model_id = '{'a' * 16}'"
        assert (pytest.approx(0.3),) in connection.execute(query).fetchall()
    assert "rust" not in str(pq.read_table("predictions").schema.field("probabilities").type)
