"""The parts of a night before it is published."""

import contextlib
import hashlib
import json
import re
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from leafnet.core import storage
from leafnet.core.documents import Date, Document, FileName
from leafnet.core.errors import EXIT_IN_USE, UserError
from leafnet.scoring import ledger
from leafnet.scoring.ledger import KEYS, Bools, Difference, keys

STAGING = "_staging"
RUN = "run.json"
_PART = re.compile(r"part-(?:\d{8}-)?\d{6}")
_ROW_GROUP = 65_536
# Few values in many rows; of the others nearly each value is another, and a dictionary only costs.
_DICTIONARY = ["status", "label", "reason", "model_id", "run_id"]


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
    number: int  # of the lock: what a job writes that has lost it has other names
    next_part: int = 0
    kept: list[str] = field(default_factory=list)  # parts, in order

    def add(self, rows: pa.Table) -> None:
        """Keep finished rows."""
        name = f"part-{self.number:08d}-{self.next_part:06d}"
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
        """Forget it all: it is published, and so is all that tells of it."""
        storage.delete_folder(self.root, mark=storage.join(self.root, RUN))
        if storage.is_local(self.root):
            with contextlib.suppress(OSError):  # another run's staging is beside it
                Path(storage.absolute(self.root)).parent.rmdir()


class _Run(Document):
    run_id: FileName
    started_at: str
    date: Date
    number: int = 0


def staging_root(out: str, *, model_id: str, images: str) -> str:
    """Where a run of this model on these photographs keeps what is not published."""
    digest = hashlib.sha256(json.dumps([model_id, images]).encode()).hexdigest()
    return storage.join(out, STAGING, digest[:16])


def find_staging(root: str) -> Staging | None:
    """What an interrupted run left at `root`, or None."""
    url = storage.join(root, RUN)
    try:
        run = _Run.model_validate_json(storage.read_bytes(url))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        told = error.errors(include_url=False)[0]["msg"]
        raise UserError(
            "bad-staging",
            f"{url} is damaged ({told}): the rows beside it cannot be told from those of other "
            f"nights; delete {root}, and they are scored again",
        ) from None
    names = [name for name in storage.list_names(root) if _PART.fullmatch(name)]
    return Staging(root, run.run_id, run.started_at, run.date, run.number, kept=names)


def start_staging(root: str, *, date: str, number: int, found: Staging | None) -> Staging:
    """The staging of a new run, or `found` for the night `date`.

    Args:
        root: of `staging_root`.
        date: of the night.
        number: of the lock that the job holds.
        found: at `root`, by `find_staging`.
    """
    now = datetime.now(UTC)
    if found is None:
        for name in storage.list_names(root):
            if _PART.fullmatch(name):  # of a job that wrote on after it had lost the lock
                storage.delete(storage.join(root, name))
    staging = found or Staging(
        root=root,
        run_id=f"{now:%Y%m%dT%H%M%SZ}-{number:06d}-{uuid.uuid4().hex[:6]}",
        started_at=now.isoformat(timespec="seconds"),
        date=date,
        number=number,
    )
    staging.date, staging.number = date, number
    # The numbers of a lock never fall, but its folder may have been deleted.
    own = [name for name in staging.kept if name.startswith(f"part-{number:08d}-")]
    staging.next_part = 1 + max((int(name[-6:]) for name in own), default=-1)
    # Before anything is published under this date, so that the next start knows where to look.
    run = _Run(
        run_id=staging.run_id, started_at=staging.started_at, date=date, number=staging.number
    )
    storage.write_json(storage.join(root, RUN), run.model_dump())
    return staging


def adopt(staging: Staging, photographs: pa.Table, difference: Difference) -> Bools:
    """Which rows of the listing `staging` has finished rows of, [N].

    Rows of photographs that are gone or were replaced since are dropped from the parts, and so are
    second ones, which two jobs at once would leave.
    """
    listed = keys(photographs)
    done = np.zeros(photographs.num_rows, bool)
    kept = storage.each(lambda name: staging.read(name).select(KEYS), staging.kept)
    read = list(zip(staging.kept, kept, strict=True))
    if not read:
        return done
    found = ledger.places(listed, pa.concat_tables([table for _, table in read]))
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
    with (
        storage.told(beside or tempfile.gettempdir()),
        tempfile.TemporaryDirectory(prefix="publish-", dir=beside) as folder,
    ):
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
        if not storage.move_in(local, url):
            raise UserError(
                "lock-lost",
                f"another job has published {url} meanwhile; run the same command again",
                exit_code=EXIT_IN_USE,
            )
    return counts


def _grouped(staging: Staging, columns: list[str]) -> Iterator[pa.Table]:
    """The rows of all parts, a row group at a time, each by image: neighbours compress well."""
    waiting: list[pa.Table] = []
    rows = 0
    # A few parts at a time, which a long night fills with tens of thousands of rows each.
    for table in storage.each(staging.read, staging.kept, at_once=ledger.READERS // 4):
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
