import itertools
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from leafnet import ledger, listing, scoring, storage
from leafnet.errors import UserError
from leafnet.ledger import Counts, Difference, Staging

CLASSES = ("healthy", "rust")
MODEL = "m1"
SCHEMA = scoring.schema(CLASSES)


@pytest.fixture(params=["local", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://ledger-{tmp_path.name}"


def listed(*names: str, versions: str = "1") -> pa.Table:
    rows = [{"image": n, "version": versions, "size": 1, "row": None} for n in names]
    return pa.Table.from_pylist(rows, listing.SCHEMA)


def made_rows(*names: str, reason: str | None = None, version: str | None = "1") -> pa.Table:
    photographs = pa.Table.from_pylist(
        [{"place": 0, "image": n, "version": version, "reason": reason} for n in names],
        scoring.PHOTOGRAPH,
    )
    logits = np.zeros((0 if reason else len(names), 2), np.float32)
    return scoring.rows(
        photographs,
        logits,
        None,
        output=SCHEMA,
        class_names=CLASSES,
        review=None,
        model_id=MODEL,
        run_id="r",
    )


def publish(out: str, date: str, *tables: pa.Table, model: str = MODEL) -> Counts:
    staging = ledger.start_staging(
        ledger.staging_root(out, model_id=model, images="in"), date=date, found=None
    )
    for table in tables:
        staging.add(table)
    schema = scoring.schema(CLASSES, model_id=model, run_id=staging.run_id)
    counts = ledger.publish(staging, out, schema=schema, check=lambda counts: None)
    staging.delete()
    return counts


def compare(out: str, photographs: pa.Table, **changes: Any) -> Difference:
    scored = ledger.history(ledger.published(out), model_id=MODEL, schema=SCHEMA)
    options: dict[str, Any] = {"date": "2026-11-30", "retries": 2} | changes
    return ledger.difference(photographs, scored, **options)


def test_only_what_is_new_is_to_be_done(out: str) -> None:
    assert compare(out, listed("a", "b")).todo.tolist() == [True, True]
    publish(out, "2026-11-01", made_rows("a"))
    publish(out, "2026-11-02", made_rows("b"), made_rows("x"), made_rows("c", version="2"))
    publish(out, "2026-11-02", made_rows("d"), model="another")
    found = compare(out, listed("a", "b", "c", "d"))
    assert found.todo.tolist() == [False, False, True, True]
    assert (found.already_done, found.again) == (2, 0)


@pytest.mark.parametrize("look_up_rows", [1, 3, 1000])
def test_difference_does_not_depend_on_how_the_history_is_cut(
    out: str, look_up_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_LOOK_UP_ROWS", look_up_rows)
    for night in (1, 2, 3):
        publish(out, f"2026-11-0{night}", made_rows("a", reason="cannot-read: away"))
    publish(out, "2026-11-04", made_rows("b", "c", "d"))
    found = compare(out, listed("d", "a", "e", "b"))
    assert found.todo.tolist() == [False, False, True, False]
    assert compare(out, listed("d", "a", "e", "b"), retries=3).todo.tolist() == [
        *(False, True, True, False)
    ]


@pytest.mark.parametrize("reason", ["cannot-read: away", "not-found: gone", "needs-heif: pip"])
def test_what_can_pass_is_tried_again_on_later_nights(out: str, reason: str) -> None:
    tried = []
    for night in range(1, 7):
        date = f"2026-11-{night:02d}"
        if compare(out, listed("a"), date=date).todo[0]:
            publish(out, date, made_rows("a", reason=reason))
            tried.append(night)
        assert not compare(out, listed("a"), date=date).todo[0]
    assert tried == [1, 2, 3]


def test_a_second_try_that_succeeds_is_the_last(out: str) -> None:
    publish(out, "2026-11-01", made_rows("a", reason="cannot-read: away"))
    assert compare(out, listed("a")).again == 1
    publish(out, "2026-11-02", made_rows("a"))
    assert not compare(out, listed("a")).todo[0]


def test_what_cannot_pass_is_not_tried_again(out: str) -> None:
    publish(out, "2026-11-01", made_rows("a", reason="truncated: cut off"))
    publish(out, "2026-11-01", made_rows("b", reason="not-found: gone", version=None))
    assert compare(out, listed("a", "b")).todo.tolist() == [False, True]


def test_other_classes_are_refused(out: str) -> None:
    publish(out, "2026-11-01", made_rows("a"))
    scored = ledger.history(
        ledger.published(out), model_id="m2", schema=scoring.schema(("healthy", "blight"))
    )
    with pytest.raises(UserError, match=r"another kind \(healthy, rust\)") as caught:
        list(scored)
    assert caught.value.reason == "other-classes"


def test_an_interrupted_run_goes_on(out: str) -> None:
    root = ledger.staging_root(out, model_id=MODEL, images="in")
    assert ledger.find_staging(root) is None
    first = ledger.start_staging(root, date="2026-11-01", found=None)
    first.add(made_rows("a", "gone", "b"))
    first.add(made_rows("changed", version="0"))
    first.add(made_rows("b", "c"))
    found = ledger.find_staging(root)
    assert found is not None
    staging = ledger.start_staging(root, date="2026-11-02", found=found)
    assert staging.run_id == first.run_id
    photographs = listed("d", "c", "b", "a", "changed")
    done = ledger.adopt(staging, photographs, Difference(np.ones(5, bool), 0))
    assert done.tolist() == [False, True, True, True, False]
    staging.add(made_rows("d", "changed"))
    images = [staging.read(name)["image"].to_pylist() for name in staging.kept]
    assert sorted(itertools.chain(*images)) == ["a", "b", "c", "changed", "d"]
    again = ledger.find_staging(root)
    assert again is not None
    assert sorted(again.kept) == sorted(staging.kept)
    assert again.date == "2026-11-02"


def test_a_night_is_seen_whole_or_not_at_all(out: str) -> None:
    staging = ledger.start_staging(
        ledger.staging_root(out, model_id=MODEL, images="in"), date="2026-11-01", found=None
    )
    staging.add(made_rows("a"))

    def check(counts: Counts) -> None:
        assert counts.rows == 1
        assert [f.url for f in storage.list_files(out) if f.url.endswith(".parquet")] == []
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        ledger.publish(staging, out, schema=SCHEMA, check=check)
    assert ledger.published(out) == []
    assert [f.url for f in storage.list_files(out) if f.url.endswith(".parquet")] == []
    ledger.publish(staging, out, schema=SCHEMA, check=lambda counts: None)
    assert [(p.date, p.run_id) for p in ledger.published(out)] == [("2026-11-01", staging.run_id)]


def test_counts(out: str) -> None:
    tables = [
        made_rows("a", "b"),
        made_rows("c", reason="corrupt: x: y"),
        made_rows("d", reason="corrupt: z"),
    ]
    assert publish(out, "2026-11-01", *tables) == Counts(
        status={"ok": 2, "failed": 2}, label={"healthy": 2}, reason={"corrupt": 2}
    )


def test_row_groups(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_ROW_GROUP", 4)
    names = [f"{i:02d}" for i in range(11)]
    publish(out, "2026-11-01", *[made_rows(*names[i : i + 3]) for i in range(0, 11, 3)])
    (file,) = ledger.published(out)
    table = pa.parquet.ParquetFile(pa.BufferReader(storage.read_bytes(file.url)))
    groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    assert groups == [4, 4, 3]
    assert table.read()["image"].to_pylist() == names


def test_plain_readers_see_published_rows_only(tmp_path: Path) -> None:
    out = str(tmp_path)
    publish(out, "2026-11-01", made_rows("a", "b"))
    publish(out, "2026-11-02", made_rows("c", reason="corrupt: x"))
    staging = ledger.start_staging(
        ledger.staging_root(out, model_id=MODEL, images="in"), date="2026-11-03", found=None
    )
    staging.add(made_rows("not yet"))
    storage.write_json(storage.join(out, "_runs", "r.json"), {})
    expected = {("a", "2026-11-01"), ("b", "2026-11-01"), ("c", "2026-11-02")}
    frame = pd.read_parquet(out)
    assert set(zip(frame.image, frame.date.astype(str), strict=True)) == expected
    table = ds.dataset(out, partitioning="hive").to_table()
    assert set(zip(*(table[n].to_pylist() for n in ("image", "date")), strict=True)) == expected
    for pattern in ("*/*.parquet", "**/*.parquet"):
        query = f"select image, cast(date as varchar), probabilities.rust from '{out}/{pattern}'"
        rows = duckdb.connect().execute(query).fetchall()
        assert {row[:2] for row in rows} == expected
        assert {row[2] for row in rows} == {0.5, None}


def test_staging_of_other_photographs_is_left_alone(out: str) -> None:
    def start(images: str) -> Staging:
        root = ledger.staging_root(out, model_id=MODEL, images=images)
        return ledger.start_staging(root, date="2026-11-01", found=ledger.find_staging(root))

    here, there = start("here"), start("there")
    assert here.run_id != there.run_id
    there.add(made_rows("a"))
    here.delete()
    assert start("there").kept == there.kept
