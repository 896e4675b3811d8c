"""What was scored, what waits to be published, and how a night becomes visible.

The published predictions are the ledger: there is no second record that could disagree with them.
A night is one Parquet file, `date=YYYY-MM-DD/RUN_ID.parquet`, which appears by one rename or one
put. Before that its rows wait in parts below `_staging/`, from which an interrupted run goes on
under the same RUN_ID; a part is no `.parquet`, so that no pattern of a reader's finds one.
"""

import contextlib
import hashlib
import json
import re
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from leafnet import storage
from leafnet.errors import UserError
from leafnet.scoring import PASSING

STAGING, RUNS = "_staging", "_runs"
_PUBLISHED = re.compile(r"date=(\d{4}-\d{2}-\d{2})/([^/]+)\.parquet")
_PART = re.compile(r"part-(\d{6})")

_KEYS = ["image", "version"]
# Rows that are looked up at once. A look-up builds a hash table of the listing each time.
_LOOK_UP_ROWS = 250_000
_ROW_GROUP = 65_536
_READERS = 16
# Few values in many rows; of the others nearly each value is another, and a dictionary only costs.
_DICTIONARY = ["status", "label", "reason", "model_id", "run_id"]

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


# What was scored


class Published(NamedTuple):
    """A published file."""

    url: str
    date: str
    run_id: str


def published(out: str) -> list[Published]:
    """The published files below `out`, by date and run."""
    found = []
    for folder in storage.list_names(out):
        if not folder.startswith("date="):
            continue
        for name in storage.list_names(storage.join(out, folder)):
            match = _PUBLISHED.fullmatch(f"{folder}/{name}")
            if match:
                found.append(Published(storage.join(out, folder, name), match[1], match[2]))
    return found


class History(NamedTuple):
    """Some rows that this model has published."""

    date: str
    keys: pa.Table  # image and version
    may_pass: Bools  # failed for a reason that can pass


def history(files: Iterable[Published], *, model_id: str, schema: pa.Schema) -> Iterator[History]:
    """Every row of the model `model_id` in `files`.

    Raises:
        UserError: a file has other columns: it is of a model with other classes, or of others.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        files = list(files)
        for start in range(0, len(files), _READERS):
            some = files[start : start + _READERS]
            yield from (
                part
                for parts in pool.map(lambda f: _history(f, model_id, schema), some)
                for part in parts
            )


def _history(file: Published, model_id: str, schema: pa.Schema) -> list[History]:
    with storage.open_file(file.url) as opened:
        try:
            parquet = pq.ParquetFile(opened)
        except pa.ArrowException as error:
            raise UserError("bad-predictions", f"{file.url} is damaged: {error}") from None
        found = parquet.schema_arrow
        if not found.equals(schema):
            others = found.names
            if "probabilities" in found.names:
                others = [f.name for f in found.field("probabilities").type]
            raise UserError(
                "other-classes",
                f"{file.url} is of another kind ({', '.join(others)}) than this model's "
                "predictions; give another --out",
            )
        if (found.metadata or {}).get(b"model_id") != model_id.encode():
            return []
        parts = []
        for batch in parquet.iter_batches(_LOOK_UP_ROWS, columns=[*_KEYS, "status", "reason"]):
            table = pa.Table.from_batches([batch])
            parts.append(History(file.date, table.select(_KEYS), _may_pass(table)))
    return parts


def _may_pass(table: pa.Table) -> Bools:
    slug = pc.list_element(
        pc.split_pattern(pc.fill_null(table["reason"], "-"), ":", max_splits=1), 0
    )
    passing = pc.is_in(slug, pa.array(PASSING))
    result: Bools = pc.and_(pc.equal(table["status"], "failed"), passing).to_numpy()
    return result


@dataclass
class Difference:
    """A listing against what was scored. Arrays have an entry for each row of the listing."""

    todo: Bools
    again: int  # of `todo`, how many have failed before

    @property
    def already_done(self) -> int:
        """How many were scored before, or are not to be tried again."""
        return int((~self.todo).sum())


def difference(
    photographs: pa.Table, scored: Iterable[History], *, date: str, retries: int
) -> Difference:
    """Which rows of a listing are to be scored on the night `date`.

    Those that no row of the same version tells of, and those that failed on an earlier night for a
    reason that can pass, at most `retries` times after the first. Memory is that of the listing,
    however long the history.
    """
    listed = keys(photographs)
    attempts = np.zeros(photographs.num_rows, np.int32)
    over = np.zeros(photographs.num_rows, bool)

    def count(waiting: list[History]) -> None:
        found = places(listed, pa.concat_tables([part.keys for part in waiting]))
        final = np.concatenate([~part.may_pass | (part.date >= date) for part in waiting])
        known = found >= 0
        np.add.at(attempts, found[known], 1)
        over[found[known & final]] = True

    waiting: list[History] = []
    rows = 0
    for part in scored:
        waiting.append(part)
        rows += part.keys.num_rows
        if rows >= _LOOK_UP_ROWS:
            count(waiting)
            waiting, rows = [], 0
    if waiting:
        count(waiting)
    todo = ~over & (attempts <= retries)
    return Difference(todo, again=int((todo & (attempts > 0)).sum()))


def keys(table: pa.Table) -> pa.ChunkedArray:
    """Image and version of each row as one string."""
    text = pa.large_string()  # 32-bit offsets end at 2 GB
    return pc.binary_join_element_wise(
        table["image"].cast(text),
        pc.fill_null(table["version"], "").cast(text),
        # In no URL and no etag: it would let two pairs give one key.
        pa.scalar("\n", text),
    )


def places(listed: pa.ChunkedArray, table: pa.Table) -> Ints:
    """The place of each row of `table` among the keys `listed`, which are unique; -1: not there."""
    # The hash table is that of `table`, of which there is a part at a time: one of a million listed
    # keys takes 400 MB.
    encoded = keys(table).combine_chunks().dictionary_encode()
    found = pc.fill_null(pc.index_in(listed, value_set=encoded.dictionary), -1).to_numpy()
    place_of = np.full(len(encoded.dictionary) + 1, -1, np.int64)
    here = np.flatnonzero(found >= 0)
    place_of[found[here]] = here
    result: Ints = place_of[encoded.indices.to_numpy()]
    return result


# What waits to be published


@dataclass
class Staging:
    """The rows of a run that are not published yet.

    One for each model and `--images`, so that jobs for other photographs leave it alone.
    """

    root: str
    run_id: str
    started_at: str
    date: str
    next_part: int = 0
    kept: list[str] = field(default_factory=list)  # parts, in order

    def add(self, rows: pa.Table) -> None:
        """Keep finished rows."""
        name = f"part-{self.next_part:06d}"
        self.keep_aside(name, rows)
        self.kept.append(name)
        self.next_part += 1

    def keep_aside(self, name: str, rows: pa.Table) -> None:
        """Keep a table under `name`, which is none of a part: it is not of the night's rows."""
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd")
        storage.write_bytes(storage.join(self.root, name), sink.getvalue().to_pybytes())

    def read(self, name: str) -> pa.Table:
        """The rows of a part, or of what was kept aside."""
        return pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(self.root, name))))

    def keep_summary(self, summary: dict[str, Any]) -> None:
        """Keep what is told of the run, for a start that finds it published and no more."""
        storage.write_json(storage.join(self.root, "summary.json"), summary)

    def read_summary(self) -> dict[str, Any]:
        """What `keep_summary` kept."""
        summary: dict[str, Any] = storage.read_json(storage.join(self.root, "summary.json"))
        return summary

    def delete(self) -> None:
        """Forget it all: it is published."""
        storage.delete(self.root)
        if storage.is_local(self.root):
            with contextlib.suppress(OSError):  # another run's staging is beside it
                Path(storage.absolute(self.root)).parent.rmdir()


def staging_root(out: str, *, model_id: str, images: str) -> str:
    """Where a run of this model on these photographs keeps what is not published."""
    digest = hashlib.sha256(json.dumps([model_id, images]).encode()).hexdigest()
    return storage.join(out, STAGING, digest[:16])


def find_staging(root: str) -> Staging | None:
    """What an interrupted run left at `root`, or None."""
    try:
        document = storage.read_json(storage.join(root, "run.json"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    names = [name for name in storage.list_names(root) if _PART.fullmatch(name)]
    last = int(_PART.fullmatch(names[-1])[1]) if names else -1  # type: ignore[index]
    return Staging(
        root=root,
        run_id=document["run_id"],
        started_at=document["started_at"],
        date=document["date"],
        next_part=last + 1,
        kept=names,
    )


def start_staging(root: str, *, date: str, found: Staging | None) -> Staging:
    """The staging of a new run, or `found` for the night `date`."""
    now = datetime.now(UTC)
    staging = found or Staging(
        root=root,
        run_id=f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}",
        started_at=now.isoformat(timespec="seconds"),
        date=date,
    )
    staging.date = date
    # Before anything is published under this date, so that the next start knows where to look.
    document = {"run_id": staging.run_id, "started_at": staging.started_at, "date": date}
    storage.write_json(storage.join(root, "run.json"), document)
    return staging


def adopt(staging: Staging, photographs: pa.Table, difference: Difference) -> Bools:
    """Which rows of the listing `staging` has finished rows of, [N].

    Rows of photographs that are gone or were replaced since are dropped from the parts, and so are
    second ones, which two jobs at once would leave.
    """
    listed = keys(photographs)
    done = np.zeros(photographs.num_rows, bool)
    kept = storage.each(lambda name: staging.read(name).select(_KEYS), staging.kept)
    read = list(zip(staging.kept, kept, strict=True))
    if not read:
        return done
    found = places(listed, pa.concat_tables([table for _, table in read]))
    wanted = found >= 0
    wanted[wanted] = difference.todo[found[wanted]]
    first = np.zeros(len(found), bool)
    first[np.unique(found, return_index=True)[1]] = True
    wanted &= first
    start = 0
    for name, table in read:
        keep = wanted[start : start + table.num_rows]
        start += table.num_rows
        if not keep.all():
            if keep.any():
                staging.add(staging.read(name).filter(pa.array(keep)))
            storage.delete(storage.join(staging.root, name))
            staging.kept.remove(name)
    done[found[wanted]] = True
    return done


# How a night becomes visible


class Counts(NamedTuple):
    """What the rows of a night say."""

    status: dict[str, int]
    label: dict[str, int]
    reason: dict[str, int]  # by slug

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(self.status.values())


def target(out: str, date: str, run_id: str) -> str:
    """Where the night is published."""
    return storage.join(out, f"date={date}", f"{run_id}.parquet")


def publish(
    staging: Staging, out: str, *, schema: pa.Schema, check: Callable[[Counts], None]
) -> Counts:
    """Put all parts into one file and make it appear, once `check` has seen their counts."""
    url = target(out, staging.date, staging.run_id)
    # A rename needs the same disk; an object store takes the whole file from this one's.
    beside = storage.absolute(staging.root) if storage.is_local(staging.root) else None
    status, label, reason = Counter[str](), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="publish-", dir=beside) as folder:
        local = Path(folder) / "night"  # no .parquet before it is published
        with pq.ParquetWriter(
            local, schema, compression="zstd", use_dictionary=_DICTIONARY, write_statistics=True
        ) as writer:
            for rows in _grouped(staging, schema.names):
                status.update(_count(rows["status"]))
                label.update(_count(rows["label"]))
                reason.update(_count(slugs(rows["reason"])))
                writer.write_table(rows.cast(schema), row_group_size=_ROW_GROUP)
        counts = Counts(dict(status), dict(label.most_common()), dict(reason.most_common()))
        check(counts)
        storage.move_in(local, url)
    return counts


def _grouped(staging: Staging, columns: list[str]) -> Iterator[pa.Table]:
    """The rows of all parts, a row group at a time, each by image: neighbours compress well."""
    waiting: list[pa.Table] = []
    rows = 0
    # A few parts at a time, which a long night fills with tens of thousands of rows each.
    for table in storage.each(staging.read, staging.kept, at_once=_READERS // 4):
        waiting.append(table.select(columns))  # thumbnails are not published
        rows += waiting[-1].num_rows
        if rows >= _ROW_GROUP:
            together = pa.concat_tables(waiting).combine_chunks()
            yield together.slice(0, _ROW_GROUP).sort_by("image")
            waiting = [together.slice(_ROW_GROUP)]
            rows -= _ROW_GROUP
    if rows:
        yield pa.concat_tables(waiting).sort_by("image")


def slugs(reasons: pa.ChunkedArray) -> pa.ChunkedArray:
    """The slug of each reason, which is `slug: message`, or several with `;` between them."""
    return pc.list_element(pc.split_pattern(reasons.drop_null(), ":", max_splits=1), 0)


def _count(column: pa.ChunkedArray) -> dict[str, int]:
    found = column.drop_null().value_counts()
    return {entry["values"]: entry["counts"] for entry in found.to_pylist()}
