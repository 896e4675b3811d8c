"""The figures of a night and of those before it, which its report shows."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from leafnet.core import storage
from leafnet.metrics import drift
from leafnet.metrics.drift import Histogram
from leafnet.reporting import maps
from leafnet.scoring import ledger, shares, thumbnails
from leafnet.scoring.ledger import Published

_NAMES = 50  # photographs that are named for each reason of failure
_MAX_PLACES = 200_000  # positions on the map; an even sample of more
_COLUMNS = (
    *("image", "version", "status", "label", "confidence", "reason", "novelty"),
    *("latitude", "longitude", "probabilities"),
)

Floats = NDArray[np.float64]


# What the rows say


@dataclass
class Night:
    """What is told of the rows of a night, added up a row group at a time."""

    classes: tuple[str, ...]
    confidence: Histogram
    novelty: Histogram | None
    status: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    reviewed: Counter[str] = field(default_factory=Counter)  # of each label, for review
    why: Counter[str] = field(default_factory=Counter)  # slugs of the first reasons for review
    failed: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # slug -> image, why
    others: Counter[str] = field(default_factory=Counter)  # model id -> rows of other models
    places: list[tuple[Floats, Floats, NDArray[np.int64]]] = field(default_factory=list)
    answers: list[NDArray[np.float32]] = field(default_factory=list)  # probabilities [N, C]
    waiting: pa.Table | None = None  # rows for review that a person should see first

    @property
    def scored(self) -> int:
        """How many photographs there are."""
        return self.status.total()

    def add(self, rows: pa.Table, *, every: int = 1) -> None:
        """Count some rows of `_COLUMNS`; of `every` so many the probabilities of one are kept."""
        self.status.update(_counts(rows["status"]))
        self.labels.update(_counts(rows["label"]))
        review = rows.filter(pc.equal(rows["status"], "review"))
        self.reviewed.update(_counts(review["label"]))
        for reasons, count in _counts(review["reason"]).items():
            self.why[failure_slugs(reasons)[0]] += count
        self._add_failed(rows.filter(pc.equal(rows["status"], "failed")))
        scored = rows.filter(pc.is_valid(rows["label"]))
        self.confidence = _added(self.confidence, scored["confidence"])
        self.answers.append(shares.probabilities(scored["probabilities"], every=every))
        if self.novelty is not None:
            self.novelty = _added(self.novelty, scored["novelty"])
        placed = scored.filter(pc.is_valid(scored["latitude"]))
        if placed.num_rows:
            group = pc.index_in(placed["label"], pa.array(self.classes)).to_numpy()
            latitude, longitude = (placed[c].to_numpy() for c in ("latitude", "longitude"))
            self.places.append((latitude, longitude, group.astype(np.int64)))
        known = [self.waiting] if self.waiting is not None else []
        together = pa.concat_tables([*known, review])
        self.waiting = together.take(pa.array(thumbnails.wanted(together)))

    def _add_failed(self, rows: pa.Table) -> None:
        for row in rows.select(["image", "reason"]).to_pylist():
            slug, _, told = (row["reason"] or "").partition(": ")
            self.failed[slug] += 1
            named = self.failures.setdefault(slug, [])
            if len(named) < _NAMES:
                named.append((row["image"], told))

    def probabilities(self) -> NDArray[np.float32]:
        """Of the photographs that did not fail, or of some evenly from all, [N, C]."""
        empty = np.empty((0, len(self.classes)), np.float32)
        return np.concatenate([empty, *self.answers])

    def placed(self) -> maps.Placed:
        """The positions, of at most `_MAX_PLACES` photographs."""
        columns = zip(*self.places, strict=True)
        latitude, longitude, group = (np.concatenate(column) for column in columns)
        every = -(-len(latitude) // _MAX_PLACES)
        return maps.Placed(latitude[::every], longitude[::every], group[::every])


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    found = column.drop_null().value_counts()
    return {entry["values"]: entry["counts"] for entry in found.to_pylist()}


def failure_slugs(reasons: str) -> list[str]:
    """The slugs of the reasons for review of one photograph.

    >>> failure_slugs("unlike-training: novelty 9 is over 8; low-confidence: 0.4 is under 0.8")
    ['unlike-training', 'low-confidence']
    """
    return [reason.split(":", 1)[0] for reason in reasons.split("; ")]


def _added(histogram: Histogram, values: pa.ChunkedArray) -> Histogram:
    numbers = values.drop_null().to_numpy()
    return histogram._replace(counts=histogram.counts + histogram.counted(numbers).counts)


def read(
    files: Iterable[Published], *, model_id: str, classes: Sequence[str], reference: Any
) -> Night:
    """The rows of the model `model_id` in `files`.

    Args:
        files: of one night.
        model_id: of the model; rows of others are counted and no more.
        classes: of the model, in order.
        reference: `drift.reference` of the model, whose bins are taken; None: it has none.
    """
    bins = {name: drift.histogram(found) for name, found in (reference or {}).items()}
    empty = np.zeros(drift.BINS, np.int64)
    novelty = bins.get("novelty")
    night = Night(
        classes=tuple(classes),
        confidence=Histogram(0.0, 1.0, empty),
        novelty=novelty and novelty._replace(counts=empty),
    )
    for file in files:
        with storage.open_file(file.url) as opened:
            parquet = pq.ParquetFile(opened)
            metadata = parquet.schema_arrow.metadata or {}
            of = metadata.get(b"model_id", b"").decode()
            if of != model_id:
                night.others[of] += parquet.metadata.num_rows
                continue
            every = shares.every(parquet.metadata.num_rows)
            for batch in parquet.iter_batches(65_536, columns=list(_COLUMNS)):
                night.add(pa.Table.from_batches([batch]), every=every)
    return night


# What the summaries say


class Earlier(NamedTuple):
    """Counts of a night, of all runs of the model that came last."""

    date: str
    status: Counter[str]
    labels: Counter[str]

    @property
    def scored(self) -> int:
        """How many photographs there were."""
        return self.status.total()


def summaries(out: str, files: Sequence[Published]) -> dict[str, list[dict[str, Any]]]:
    """The summaries of the runs that published `files`, by date, in their order."""

    def one(file: Published) -> dict[str, Any]:
        found: dict[str, Any]
        try:
            found = storage.read_json(storage.join(out, ledger.RUNS, f"{file.run_id}.json"))
        except FileNotFoundError:
            found = {}
        # A run that was killed once it was published, and not started again.
        return found if "status" in found else found | _counted(file)

    by_date: dict[str, list[dict[str, Any]]] = {}
    for file, summary in zip(files, storage.each(one, files), strict=True):
        by_date.setdefault(file.date, []).append(summary)
    return by_date


def _counted(file: Published) -> dict[str, Any]:
    with storage.open_file(file.url) as opened:
        table = pq.read_table(opened, columns=["status", "label"])
    metadata = table.schema.metadata or {}
    return {
        "status": _counts(table["status"]),
        "labels": _counts(table["label"]),
        "model": {"model_id": metadata.get(b"model_id", b"").decode()},
    }


def earlier_nights(date: str, summaries: Sequence[dict[str, Any]]) -> Earlier:
    model_id = summaries[-1].get("model", {}).get("model_id")
    status, labels = Counter[str](), Counter[str]()
    for summary in summaries:
        if summary.get("model", {}).get("model_id") == model_id:
            status.update(summary["status"])
            labels.update(summary["labels"])
    return Earlier(date, status, labels)
