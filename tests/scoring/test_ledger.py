import itertools
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.scoring import ledger, listing, reading
from leafnet.scoring import rows as scoring_rows
from leafnet.scoring import staging as scoring_staging
from leafnet.scoring.ledger import Difference
from leafnet.scoring.staging import (
    Counts,
    Staging,
    adopt,
    find_staging,
    slugs,
    staging_root,
    start_staging,
    target,
)

CLASSES = ("healthy", "rust")
MODEL = "m1"
SCHEMA = scoring_rows.schema(CLASSES)


@pytest.fixture(params=["local", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://ledger-{tmp_path.name}"


def listed(*names: str, versions: str = "1") -> pa.Table:
    rows = [{"image": n, "version": versions, "size": 1, "row": None} for n in names]
    return pa.Table.from_pylist(rows, listing.SCHEMA)


def made_rows(*names: str, reason: str | None = None, version: str | None = "1") -> pa.Table:
    photographs = pa.Table.from_pylist(
        [{"place": 0, "image": n, "version": version, "reason": reason} for n in names],
        reading.PHOTOGRAPH,
    )
    logits = np.zeros((0 if reason else len(names), 2), np.float32)
    return scoring_rows.rows(
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
    staging = start_staging(
        staging_root(out, model_id=model, images="in"), date=date, number=1, found=None
    )
    for table in tables:
        staging.add(table)
    schema = scoring_rows.schema(CLASSES, model_id=model, run_id=staging.run_id)
    counts = scoring_staging.publish(staging, out, schema=schema, check=lambda counts: None)
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
        ledger.published(out), model_id="m2", schema=scoring_rows.schema(("healthy", "blight"))
    )
    with pytest.raises(UserError, match=r"another kind \(healthy, rust\)") as caught:
        list(scored)
    assert caught.value.reason == "other-classes"


def test_an_interrupted_run_goes_on(out: str) -> None:
    root = staging_root(out, model_id=MODEL, images="in")
    assert find_staging(root) is None
    first = start_staging(root, date="2026-11-01", number=1, found=None)
    first.add(made_rows("a", "gone", "b"))
    first.add(made_rows("changed", version="0"))
    first.add(made_rows("b", "c"))
    found = find_staging(root)
    assert found is not None
    staging = start_staging(root, date="2026-11-02", number=2, found=found)
    assert staging.run_id == first.run_id
    photographs = listed("d", "c", "b", "a", "changed")
    done = adopt(staging, photographs, Difference(np.ones(5, bool), 0))
    assert done.tolist() == [False, True, True, True, False]
    staging.add(made_rows("d", "changed"))
    images = [staging.read(name)["image"].to_pylist() for name in staging.kept]
    assert sorted(itertools.chain(*images)) == ["a", "b", "c", "changed", "d"]
    again = find_staging(root)
    assert again is not None
    assert sorted(again.kept) == sorted(staging.kept)
    assert again.date == "2026-11-02"


def test_a_night_is_seen_whole_or_not_at_all(out: str) -> None:
    staging = start_staging(
        staging_root(out, model_id=MODEL, images="in"), date="2026-11-01", number=1, found=None
    )
    staging.add(made_rows("a"))

    def check(counts: Counts) -> None:
        assert counts.rows == 1
        assert [f.url for f in storage.list_files(out) if f.url.endswith(".parquet")] == []
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        scoring_staging.publish(staging, out, schema=SCHEMA, check=check)
    assert ledger.published(out) == []
    assert [f.url for f in storage.list_files(out) if f.url.endswith(".parquet")] == []
    scoring_staging.publish(staging, out, schema=SCHEMA, check=lambda counts: None)
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
    monkeypatch.setattr(scoring_staging, "_ROW_GROUP", 4)
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
    staging = start_staging(
        staging_root(out, model_id=MODEL, images="in"), date="2026-11-03", number=1, found=None
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
        root = staging_root(out, model_id=MODEL, images=images)
        return start_staging(root, date="2026-11-01", number=1, found=find_staging(root))

    here, there = start("here"), start("there")
    assert here.run_id != there.run_id
    there.add(made_rows("a"))
    here.delete()
    assert start("there").kept == there.kept


def rows_of(file: ledger.Published) -> pa.parquet.ParquetFile:
    return pa.parquet.ParquetFile(pa.BufferReader(storage.read_bytes(file.url)))


def test_rows_of_a_group_are_by_image_and_hold_together(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_staging, "_ROW_GROUP", 4)
    parts = (["g", "c"], ["e", "a", "z", "b"], ["y", "d"], ["x", "w"])
    tables = [pa.concat_tables([made_rows(n, version=f"v{n}") for n in part]) for part in parts]
    publish(out, "2026-11-01", *tables)
    (file,) = ledger.published(out)
    groups = [rows_of(file).read_row_group(i) for i in range(rows_of(file).num_row_groups)]
    # As they came, cut after each fourth row.
    expected = [["a", "c", "e", "g"], ["b", "d", "y", "z"], ["w", "x"]]
    assert [group["image"].to_pylist() for group in groups] == expected
    for group in groups:
        versions = [f"v{name}" for name in group["image"].to_pylist()]
        assert group["version"].to_pylist() == versions


@pytest.mark.parametrize("parts", [[11], [4, 4, 3], [1, 10], [3, 3, 3, 2], [8], [4]])
def test_no_row_group_is_longer_than_the_limit(
    parts: list[int], out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_staging, "_ROW_GROUP", 4)
    names = iter(f"{i:02d}" for i in range(sum(parts)))
    tables = [made_rows(*itertools.islice(names, count)) for count in parts]
    counts = publish(out, "2026-11-01", *tables)
    (file,) = ledger.published(out)
    metadata = rows_of(file).metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert max(groups) == 4
    assert rows_of(file).read()["image"].to_pylist() == [f"{i:02d}" for i in range(sum(parts))]
    assert counts.rows == sum(parts) == sum(groups)


def test_how_a_night_is_stored(out: str) -> None:
    publish(out, "2026-11-01", made_rows("a", "b"))
    (file,) = ledger.published(out)
    group = rows_of(file).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    # Few values in many rows; a dictionary of URLs would hold each of them once more.
    repeated = {"status", "label", "reason", "model_id", "run_id"}
    assert {name for name, column in columns.items() if column.has_dictionary_page} == repeated
    assert (columns["image"].statistics.min, columns["image"].statistics.max) == ("a", "b")
    assert rows_of(file).schema_arrow.metadata[b"model_id"] == MODEL.encode()


def test_a_night_is_put_together_beside_its_target(tmp_path: Path) -> None:
    """A rename needs the same disk, and no reader's pattern finds what is not complete."""
    root = staging_root(str(tmp_path), model_id=MODEL, images="in")
    staging = start_staging(root, date="2026-11-01", number=1, found=None)
    staging.add(made_rows("a"))

    def check(counts: Counts) -> None:
        (folder,) = [path for path in Path(root).iterdir() if path.name.startswith("publish-")]
        assert [path.suffix for path in folder.iterdir()] == [""]

    scoring_staging.publish(staging, str(tmp_path), schema=SCHEMA, check=check)
    assert sorted(path.name for path in Path(root).iterdir()) == [
        "part-00000001-000000",
        "run.json",
    ]


def test_counts_begin_with_the_most_frequent() -> None:
    root = staging_root("memory://counts", model_id=MODEL, images="in")
    staging = start_staging(root, date="2026-11-01", number=1, found=None)
    staging.add(made_rows("a", reason="empty: x"))
    staging.add(made_rows("b", "c", "d", reason="corrupt: x"))
    staging.add(made_rows("e", "f", reason="truncated: x: y"))
    counts = scoring_staging.publish(
        staging, "memory://counts", schema=SCHEMA, check=lambda counts: None
    )
    assert list(counts.reason.items()) == [("corrupt", 3), ("truncated", 2), ("empty", 1)]
    assert (counts.status, counts.label, counts.rows) == ({"failed": 6}, {}, 6)


def test_published_files_are_told_by_their_place_and_name(out: str) -> None:
    urls = [
        "date=2026-11-02/b.parquet",
        "date=2026-11-02/a.parquet",
        "date=2026-10-31/c.parquet",
        "date=2026-11-02/notes.txt",
        "date=2026-11-02/d.parquet.tmp",
        "date=2026/e.parquet",
        "_runs/f.parquet",
        "my date=/g.parquet",
    ]
    for url in urls:
        storage.write_bytes(storage.join(out, url), b"x")
    assert ledger.published(out) == [
        (storage.join(out, "date=2026-10-31/c.parquet"), "2026-10-31", "c"),
        (storage.join(out, "date=2026-11-02/a.parquet"), "2026-11-02", "a"),
        (storage.join(out, "date=2026-11-02/b.parquet"), "2026-11-02", "b"),
    ]
    assert target(out, "2026-10-31", "c") == ledger.published(out)[0].url


@pytest.mark.parametrize("readers", [1, 2, 5, 16])
def test_history_is_of_every_file(readers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out = f"memory://history-{readers}"
    for day in range(1, 6):
        publish(out, f"2026-11-0{day}", made_rows(f"{day}a", f"{day}b"))
    monkeypatch.setattr(ledger, "READERS", readers)
    monkeypatch.setattr(ledger, "_LOOK_UP_ROWS", 1)
    found = list(ledger.history(ledger.published(out), model_id=MODEL, schema=SCHEMA))
    assert [(part.date[-1], part.keys["image"].to_pylist()) for part in found] == [
        (str(day), [f"{day}{name}"]) for day in range(1, 6) for name in "ab"
    ]
    assert {tuple(part.keys.column_names) for part in found} == {("image", "version")}
    assert not np.concatenate([part.may_pass for part in found]).any()


def write_night(out: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink)
    storage.write_bytes(target(out, "2026-11-01", "r"), sink.getvalue().to_pybytes())


def test_files_of_others(out: str) -> None:
    def history() -> list[ledger.History]:
        return list(ledger.history(ledger.published(out), model_id=MODEL, schema=SCHEMA))

    # Of no model that it names: none of this one's.
    write_night(out, made_rows("a").replace_schema_metadata(None))
    assert history() == []
    write_night(out, pa.table({"city": ["x"], "people": [1]}))
    with pytest.raises(UserError, match=r"another kind \(city, people\) than") as caught:
        history()
    assert caught.value.reason == "other-classes"
    storage.write_bytes(target(out, "2026-11-01", "r"), b"PAR1 and no more")
    with pytest.raises(UserError, match=r"r\.parquet is damaged: ") as caught:
        history()
    assert caught.value.reason == "bad-predictions"


def test_only_failures_that_can_pass_are_tried_again() -> None:
    rows = [
        ("failed", "cannot-read: OSError: away", True),
        ("failed", "not-found: it is not there", True),
        ("failed", "needs-heif: pip", True),
        ("failed", "corrupt: cannot-read", False),
        ("failed", "not-finite: the network gave no number", False),
        ("review", "cannot-read: no such reason of a review", False),
        ("ok", None, False),
        ("failed", None, False),
    ]
    table = pa.table({"status": [row[0] for row in rows], "reason": [row[1] for row in rows]})
    assert ledger._may_pass(table).tolist() == [row[2] for row in rows]


def test_slugs_of_reasons() -> None:
    reasons = pa.chunked_array([["a: b: c", None], ["d: e; f: g", "h"]])
    assert slugs(reasons).to_pylist() == ["a", "d", "h"]


def test_how_often_a_photograph_is_tried() -> None:
    """By the night on which it failed, and how often it has on earlier ones."""

    def failed(date: str, *names: str) -> ledger.History:
        return ledger.History(date, made_rows(*names).select(["image", "version"]), may_pass(names))

    def may_pass(names: tuple[str, ...]) -> ledger.Bools:
        return np.array([not name.startswith("final") for name in names])

    history = [
        failed("2026-11-27", "thrice", "final", "gone"),
        failed("2026-11-28", "thrice", "twice"),
        failed("2026-11-29", "thrice", "twice", "once"),
        failed("2026-11-30", "tonight"),
    ]
    names = ("thrice", "twice", "once", "tonight", "final", "new")
    for retries, expected in (
        (0, [False, False, False, False, False, True]),
        (1, [False, False, True, False, False, True]),
        (2, [False, True, True, False, False, True]),
        (3, [True, True, True, False, False, True]),
    ):
        found = ledger.difference(listed(*names), history, date="2026-11-30", retries=retries)
        assert found.todo.tolist() == expected
        assert found.again == sum(expected) - 1
        assert found.already_done == 6 - sum(expected)
    later = ledger.difference(listed(*names), history, date="2026-12-01", retries=1)
    assert later.todo.tolist() == [False, False, True, True, False, True]


def test_places_among_the_listed() -> None:
    def table(*keys: tuple[str, str | None]) -> pa.Table:
        columns = {"image": [key[0] for key in keys], "version": [key[1] for key in keys]}
        return pa.table(columns, schema=pa.schema({"image": pa.string(), "version": pa.string()}))

    among = ledger.keys(table(("x", "1"), ("y", "1"), ("z", "1"), ("n", None)))
    asked = table(("z", "1"), ("q", "1"), ("x", "1"), ("z", "1"), ("y", "2"), ("n", None))
    assert ledger.places(among, asked).tolist() == [2, -1, 0, 2, -1, 3]
    assert ledger.places(among, table(("q", "1"))).tolist() == [-1]
    assert ledger.places(among, table()).tolist() == []
    # Where one ends and the other begins is not forgotten.
    assert ledger.places(among, table(("x1", None), ("", "x1"))).tolist() == [-1, -1]
    assert len(set(ledger.keys(table(("ab", "c"), ("a", "bc"), ("abc", None))).to_pylist())) == 3


def test_what_an_interrupted_run_left_is_found_as_it_was(out: str) -> None:
    root = staging_root(out, model_id=MODEL, images="in")
    started = start_staging(root, date="2026-11-01", number=1, found=None)
    assert re.fullmatch(r"\d{8}T\d{6}Z-000001-[0-9a-f]{6}", started.run_id)
    at = datetime.fromisoformat(started.started_at)
    assert re.fullmatch(r"[0-9-]{10}T[0-9:]{8}\+00:00", started.started_at)
    assert abs((datetime.now(UTC) - at).total_seconds()) < 60
    assert started.run_id.startswith(f"{at:%Y%m%dT%H%M%SZ}-")
    assert (
        find_staging(root)
        == started
        == Staging(root, started.run_id, started.started_at, "2026-11-01", number=1)
    )
    for name in "abc":
        started.add(made_rows(name))
    started.keep_aside("thumbnails", made_rows("t"))
    assert started.kept == ["part-00000001-000000", "part-00000001-000001", "part-00000001-000002"]
    found = find_staging(root)
    assert found is not None
    assert (found.run_id, found.kept) == (started.run_id, started.kept)
    names = [started.read(name)["image"].to_pylist() for name in [*started.kept, "thumbnails"]]
    assert names == [["a"], ["b"], ["c"], ["t"]]
    # The next job has another number, and with it other names.
    storage.delete(storage.join(root, "part-00000001-000001"))
    found = find_staging(root)
    assert found is not None
    resumed = start_staging(root, date="2026-11-02", number=4, found=found)
    resumed.add(made_rows("d"))
    expected = ["part-00000001-000000", "part-00000001-000002", "part-00000004-000000"]
    assert resumed.kept == storage.list_names(root)[:3] == expected
    assert resumed.run_id == started.run_id
    stored = pa.BufferReader(storage.read_bytes(storage.join(root, "part-00000001-000000")))
    assert pa.parquet.read_metadata(stored).row_group(0).column(0).compression == "ZSTD"


def test_a_summary_is_kept_with_what_is_not_published(out: str) -> None:
    root = staging_root(out, model_id=MODEL, images="in")
    staging = start_staging(root, date="2026-11-01", number=1, found=None)
    staging.keep_summary({"rows": 3, "ä": None})
    assert staging.read_summary() == {"rows": 3, "ä": None}
    assert storage.list_names(root) == ["run.json", "summary.json"]


def test_nothing_of_the_staging_is_left(tmp_path: Path) -> None:
    publish(str(tmp_path), "2026-11-01", made_rows("a"))
    assert [path.name for path in tmp_path.iterdir()] == ["date=2026-11-01"]


def test_each_model_and_each_folder_of_photographs_has_its_staging(out: str) -> None:
    pairs = [("a", "b"), ("b", "a"), ("a", "c"), ("ab", ""), ("", "ab")]
    roots = {staging_root(out, model_id=model, images=images) for model, images in pairs}
    assert len(roots) == len(pairs)
    for root in roots:
        assert root.startswith(storage.join(out, "_staging/"))
        assert re.fullmatch("[0-9a-f]{16}", root.rpartition("/")[2])


def test_finished_rows_that_nobody_wants_any_more_are_dropped(out: str) -> None:
    root = staging_root(out, model_id=MODEL, images="in")
    staging = start_staging(root, date="2026-11-01", number=1, found=None)
    photographs = listed("a", "b", "c", "d")
    todo = np.array([True, True, False, True])
    assert adopt(staging, photographs, Difference(todo, 0)).tolist() == [False] * 4
    for names in (["a", "b"], ["c"], ["d", "c", "x", "a"]):
        staging.add(made_rows(*names))
    done = adopt(staging, photographs, Difference(todo, 0))
    assert done.tolist() == [True, True, False, True]
    # The first part is untouched, the second has nothing left, of the third one row is.
    assert staging.kept == ["part-00000001-000000", "part-00000001-000003"]
    assert storage.list_names(root) == ["part-00000001-000000", "part-00000001-000003", "run.json"]
    images = [staging.read(name)["image"].to_pylist() for name in staging.kept]
    assert images == [["a", "b"], ["d"]]


def test_a_long_history_is_looked_up_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is that of the listing, however long the history."""
    asked = []

    def places(among: pa.ChunkedArray, table: pa.Table) -> ledger.Ints:
        asked.append(table.num_rows)
        return np.full(table.num_rows, -1)

    monkeypatch.setattr(ledger, "places", places)
    monkeypatch.setattr(ledger, "_LOOK_UP_ROWS", 4)
    part = ledger.History("2026-11-01", listed("a", "b"), np.zeros(2, bool))
    ledger.difference(listed("a"), [part] * 5, date="2026-11-02", retries=0)
    assert asked == [4, 4, 2]


def test_what_cannot_be_asked_for_its_version_is_not_scored_again(out: str) -> None:
    """A store that is away while a list is listed; tomorrow it answers again."""
    publish(out, "2026-11-01", made_rows("a", "b", version="1"))
    publish(out, "2026-11-02", made_rows("c", reason="not-found: x", version=None))
    unasked = listed("a", "b", "c", "d").set_column(1, "version", pa.nulls(4, pa.string()))
    found = compare(out, unasked, date="2026-11-03")
    assert found.todo.tolist() == [False, False, True, True]  # of c there are no bytes yet
    assert (found.again, found.unasked, found.already_done) == (1, 2, 2)
    mixed = pa.concat_tables([unasked.slice(0, 1), listed("b", versions="2"), listed("d")])
    found = compare(out, mixed, date="2026-11-03")
    assert found.todo.tolist() == [False, True, True]
    found = compare(out, listed("a", "b"), date="2026-11-03")
    assert (found.todo.tolist(), found.unasked) == ([False, False], 0)


def test_a_photograph_that_is_listed_twice_ends_the_night_before_it_begins() -> None:
    with pytest.raises(RuntimeError, match=r"^b is listed twice"):
        ledger.difference(listed("a", "b", "c", "b"), [], date="2026-11-01", retries=0)
    versions = pa.concat_tables([listed("a"), listed("a", versions="2")])
    assert ledger.difference(versions, [], date="2026-11-01", retries=0).todo.all()
    empty = ledger.difference(listed(), [], date="2026-11-01", retries=0)
    assert empty.todo.tolist() == []


def test_parts_of_an_earlier_version_are_found(out: str) -> None:
    root = staging_root(out, model_id=MODEL, images="in")
    run = {"run_id": "20261101T010000Z-abcdef", "started_at": "x", "date": "2026-11-01"}
    storage.write_json(storage.join(root, "run.json"), run)
    started = Staging(root, "r", "x", "2026-11-01", 1)
    started.keep_aside("part-000003", made_rows("a"))
    found = find_staging(root)
    assert found is not None
    assert (found.run_id, found.kept) == (run["run_id"], ["part-000003"])


def test_what_a_job_writes_that_has_lost_the_output_is_in_no_night(out: str) -> None:
    """It is suspended, another finishes its night; then it wakes up and goes on."""
    root = staging_root(out, model_id=MODEL, images="in")
    first = start_staging(root, date="2026-11-01", number=1, found=None)
    first.add(made_rows("a"))
    second = start_staging(root, date="2026-11-01", number=2, found=find_staging(root))
    second.add(made_rows("b"))
    first.add(made_rows("b"))  # under the number that the other's part has as well
    scoring_staging.publish(second, out, schema=SCHEMA, check=lambda counts: None)
    with pytest.raises(UserError, match="another job has published") as told:
        scoring_staging.publish(first, out, schema=SCHEMA, check=lambda counts: None)
    assert (told.value.reason, told.value.exit_code) == ("lock-lost", 3)
    (night,) = ledger.published(out)
    assert sorted(rows_of(night).read()["image"].to_pylist()) == ["a", "b"]
    second.delete()
    # And after that, when nothing of the staging is there any more.
    first.add(made_rows("c"))
    assert find_staging(root) is None
    third = start_staging(root, date="2026-11-02", number=3, found=None)
    third.add(made_rows("d"))
    found = find_staging(root)
    assert found is not None
    assert found.kept == third.kept


@pytest.mark.parametrize("data", [b"", b"{}", b'{"run_id": "../x", "started_at": "", "date": ""}'])
def test_a_staging_that_is_damaged_is_refused_by_name(out: str, data: bytes) -> None:
    root = staging_root(out, model_id=MODEL, images="in")
    storage.write_bytes(storage.join(root, "run.json"), data)
    with pytest.raises(UserError, match=f"delete {root}, and they are scored again") as told:
        find_staging(root)
    assert told.value.reason == "bad-staging"


def test_a_start_whose_lock_begins_anew_writes_over_no_part(tmp_path: Path) -> None:
    """The folder of the lock was deleted, and so its number is that of an earlier start."""
    root = staging_root(str(tmp_path), model_id="m", images="in")
    first = start_staging(root, date="2026-11-24", number=1, found=None)
    for value in (1, 2):
        first.add(pa.table({"image": [value]}))
    again = start_staging(root, date="2026-11-24", number=1, found=find_staging(root))
    again.add(pa.table({"image": [3]}))
    assert [again.read(name)["image"][0].as_py() for name in again.kept] == [1, 2, 3]
