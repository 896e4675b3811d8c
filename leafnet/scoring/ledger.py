"""What was scored, what waits to be published, and how a night becomes visible.

The published predictions are the ledger: there is no second record that could disagree with them.
A night is one Parquet file, `date=YYYY-MM-DD/RUN_ID.parquet`, which appears by one rename or one
put. Before that its rows wait in parts below `_staging/`, from which an interrupted run goes on
under the same RUN_ID; a part is no `.parquet`, so that no pattern of a reader's finds one.
"""

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.scoring.rows import PASSING

RUNS = "_runs"
_PUBLISHED = re.compile(r"date=(\d{4}-\d{2}-\d{2})/([^/]+)\.parquet")

KEYS = ["image", "version"]
# Rows that are looked up at once. A look-up builds a hash table of the listing each time.
_LOOK_UP_ROWS = 250_000
READERS = 16

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
    with ThreadPoolExecutor(READERS) as pool:
        files = list(files)
        for start in range(0, len(files), READERS):
            some = files[start : start + READERS]
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
        for batch in parquet.iter_batches(_LOOK_UP_ROWS, columns=[*KEYS, "status", "reason"]):
            table = pa.Table.from_batches([batch])
            parts.append(History(file.date, table.select(KEYS), _may_pass(table)))
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
    unasked: int = 0  # not of `todo`: scored before, and their version could not be asked for now

    @property
    def already_done(self) -> int:
        """How many were scored before, or are not to be tried again."""
        return int((~self.todo).sum())


def difference(
    photographs: pa.Table, scored: Iterable[History], *, date: str, retries: int
) -> Difference:
    """Which rows of a listing are to be scored on the night `date`.

    Those that no row of the same version tells of, and those that failed on an earlier night for a
    reason that can pass, at most `retries` times after the first. What was scored before and cannot
    be asked for its version now, since it is gone or its store is away, is left for another night.
    Memory is that of the listing, however long the history.

    Raises:
        RuntimeError: a photograph is listed twice.
    """
    listed = keys(photographs)
    _refuse_repeated(photographs, listed)
    without_version = pc.is_null(photographs["version"]).to_numpy()
    unasked = photographs["image"].filter(pa.array(without_version))
    scored_before = np.zeros(len(unasked), bool)
    attempts = np.zeros(photographs.num_rows, np.int32)
    over = np.zeros(photographs.num_rows, bool)

    def count(waiting: list[History]) -> None:
        together = pa.concat_tables([part.keys for part in waiting])
        if len(unasked):
            of_bytes = together.filter(pc.is_valid(together["version"]))["image"]
            scored_before[:] |= pc.is_in(unasked, of_bytes.combine_chunks()).to_numpy()
        found = places(listed, together)
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
    left = np.zeros_like(over)
    left[without_version] = scored_before
    todo = ~over & ~left & (attempts <= retries)
    return Difference(todo, int((todo & (attempts > 0)).sum()), int((left & ~over).sum()))


def _refuse_repeated(photographs: pa.Table, listed: pa.ChunkedArray) -> None:
    # Of 64 bits each: the strings themselves would take ten times the memory of the listing.
    hashes = [
        np.fromiter(map(hash, chunk.slice(at, _LOOK_UP_ROWS).to_pylist()), np.int64)
        for chunk in listed.chunks
        for at in range(0, len(chunk), _LOOK_UP_ROWS)
    ]
    together = np.concatenate([*hashes, np.zeros(0, np.int64)])
    _, first = np.unique(together, return_index=True)
    if len(first) < len(together):
        twice = np.setdiff1d(np.arange(len(together)), first)[0]
        raise RuntimeError(f"{photographs['image'][int(twice)]} is listed twice")


def keys(table: pa.Table) -> pa.ChunkedArray:
    """Image and version of each row as one string."""
    text = pa.large_string()  # 32-bit offsets end at 2 GB
    return pc.binary_join_element_wise(
        table["image"].cast(text),
        pc.fill_null(table["version"], "").cast(text),
        # In no path, URL or etag: it would let two pairs give one key.
        pa.scalar("\0", text),
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
