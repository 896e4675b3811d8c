"""Features of augmented views, computed once and kept.

The backbone is frozen while the head learns, so what it makes of a view never changes. A cache
holds them as *parts*: one Parquet file for the views of one row group of one shard, so that an
interruption costs one part, and more views or more shards cost only what is missing.

    CACHE/KEY/SHARD/g0003.plain.parquet            view 0 of row group 3
    CACHE/KEY/SHARD/g0003.AUGMENTATION.v1-8.parquet    views 1 to 7

KEY covers all that changes the features of a given picture, SHARD the pictures, AUGMENTATION the
way views are drawn. Two runs that fill a cache at once write the same bytes under the same names.
"""

import hashlib
import io
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from leafnet.core import scratch, storage
from leafnet.core.errors import DamagedParts
from leafnet.data.images import DECODER_VERSION
from leafnet.data.shards import Shard
from leafnet.features.moments import Features
from leafnet.features.views import MAX_TURN
from leafnet.models.weights import FEATURES

_AUGMENTATION = f"flips, rotation {MAX_TURN}, reflect, version 1"

_USED = "used.json"
_AT_ONCE_BYTES = 256_000_000  # of parts that are read at the same time


def cache_key(*, weights_fingerprint: str, image_size: int, precision: str) -> str:
    """The folder of a cache: 16 hexadecimal digits over what changes a picture's features."""
    content = {
        "weights": weights_fingerprint,
        "image_size": image_size,
        "precision": precision,
        "decoder": DECODER_VERSION,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _augmentation_key(seed: int) -> str:
    return hashlib.sha256(f"{_AUGMENTATION}, seed {seed}".encode()).hexdigest()[:12]


class Part(NamedTuple):
    """The features of views `first` to `stop - 1` of one row group."""

    shard: Shard
    row_group: int
    first: int
    stop: int
    seed: int  # of the augmentation; view 0 does not depend on it

    @property
    def rows(self) -> int:
        """Examples in the row group."""
        return self.shard.row_groups[self.row_group]

    @property
    def views(self) -> int:
        """Views of all its examples together."""
        return self.rows * (self.stop - self.first)

    @property
    def name(self) -> str:
        """Path below the cache's key folder."""
        folder = self.shard.sha256[:16]
        if self.first == 0:
            return f"{folder}/g{self.row_group:04d}.plain.parquet"
        views = f"v{self.first}-{self.stop}"
        return f"{folder}/g{self.row_group:04d}.{_augmentation_key(self.seed)}.{views}.parquet"


@dataclass(frozen=True)
class Plan:
    """What a run needs from a cache: parts that are there and parts that are not."""

    root: str  # CACHE/KEY
    present: tuple[Part, ...]
    missing: tuple[Part, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, in order of shard, row group and view."""
        both = self.present + self.missing
        return tuple(sorted(both, key=lambda p: (p.shard.name, p.row_group, p.first)))


def plan(root: str, wanted: Iterable[tuple[Shard, int]], *, seed: int) -> Plan:
    """Look at the cache folder `root` for the features of `wanted` (shard, number of views)."""
    # One listing: a question for each shard would be a request each in an object store.
    found: dict[str, list[str]] = {}
    for file in storage.list_files(root):
        folder, _, name = file.url.removeprefix(f"{root}/").rpartition("/")
        found.setdefault(folder, []).append(name)
    present: list[Part] = []
    missing: list[Part] = []
    for shard, views in wanted:
        names = found.get(shard.sha256[:16], [])
        for group in range(len(shard.row_groups)):
            plain = Part(shard, group, 0, 1, seed)
            (present if plain.name.split("/")[1] in names else missing).append(plain)
            # Ranges that earlier runs left, longest first from each place; then the gap.
            pattern = re.compile(rf"g{group:04d}\.{_augmentation_key(seed)}\.v(\d+)-(\d+)\.parquet")
            ranges = [
                (int(match[1]), int(match[2])) for match in map(pattern.fullmatch, names) if match
            ]
            at = 1
            while at < views:
                stop = max((stop for first, stop in ranges if first == at), default=0)
                if stop:
                    present.append(Part(shard, group, at, stop, seed))
                else:
                    stop = min((first for first, _ in ranges if first > at), default=views)
                    stop = min(stop, views)
                    missing.append(Part(shard, group, at, stop, seed))
                at = stop
    return Plan(root, tuple(present), tuple(missing))


def write_part(root: str, part: Part, features: Features, labels: NDArray[np.int32]) -> None:
    """Store `features` [rows, views, D] and `labels` [rows] of `part`, whole or not at all."""
    rows, views, width = features.shape
    assert (rows, views) == (part.rows, part.stop - part.first), (features.shape, part)
    flat = pa.array(np.ascontiguousarray(features).reshape(-1))
    table = pa.table(
        {
            "row": np.repeat(np.arange(rows, dtype=np.int32), views),
            "view": np.tile(np.arange(part.first, part.stop, dtype=np.int32), rows),
            "label": np.repeat(labels.astype(np.int32), views),
            "features": pa.FixedSizeListArray.from_arrays(flat, width),
        }
    )
    sink = io.BytesIO()
    # Features have few repeats to find; a page checksum finds a damaged file when it is read.
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_page_checksum=True)
    storage.write_bytes(storage.join(root, part.name), sink.getvalue())


def read_part(root: str, part: Part) -> tuple[Features, NDArray[np.int32]] | None:
    """(features [rows, views, D], labels [rows]) of `part`; None when it is missing or damaged.

    Features that are not finite are damage: none are written.
    """
    try:
        data = storage.read_bytes(storage.join(root, part.name))
        table = pq.read_table(
            pa.BufferReader(data), page_checksum_verification=True, use_threads=False
        )
    except (OSError, pa.ArrowException):
        return None
    views = part.stop - part.first
    if table.num_rows != part.rows * views or "features" not in table.column_names:
        return None
    column = table.column("features").combine_chunks()
    values = np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float16)
    if values.size != part.rows * views * FEATURES or not np.isfinite(values).all():
        return None
    return values.reshape(part.rows, views, FEATURES), table.column("label").to_numpy().astype(
        np.int32
    )[::views]


class SplitFeatures(NamedTuple):
    """Features [N, K, D] float16 and labels [N] int32 of one split, in order of its examples."""

    features: Features
    labels: NDArray[np.int32]


def assemble(root: str, parts: Sequence[Part], views: int, *, path: str) -> SplitFeatures:
    """One memory-mapped array at `path` (a local file) of all `parts` of a split.

    Features larger than memory work: a few parts are read at a time, and what is mapped is paged in
    as it is used.

    Raises:
        DamagedParts: some parts cannot be read.
    """
    starts: dict[tuple[str, int], int] = {}
    total = 0
    for part in sorted(parts, key=lambda p: (p.shard.name, p.row_group, p.first)):
        if part.first == 0:
            starts[part.shard.name, part.row_group] = total
            total += part.rows
    if total == 0:
        return SplitFeatures(np.zeros((0, 1, FEATURES), np.float16), np.zeros(0, np.int32))
    mapped = scratch.mapped(Path(path), dtype=np.float16, shape=(total, views, FEATURES))
    labels = np.zeros(total, np.int32)
    damaged = []
    largest = max(part.rows * (part.stop - part.first) for part in parts) * FEATURES * 2
    at_once = max(1, min(storage.AT_ONCE, _AT_ONCE_BYTES // largest))
    found = storage.each(lambda part: read_part(root, part), parts, at_once=at_once)
    for part, read in zip(parts, found, strict=True):
        if read is None:
            damaged.append(part.name)
            continue
        start = starts[part.shard.name, part.row_group]
        stop = min(part.stop, views)
        mapped[start : start + part.rows, part.first : stop] = read[0][:, : stop - part.first]
        labels[start : start + part.rows] = read[1]
    if damaged:
        raise DamagedParts(damaged)
    mapped.flush()
    return SplitFeatures(np.load(path, mmap_mode="r"), labels)


def mark_used(root: str) -> None:
    """Note that the cache folder `root` is in use now, for `evict`."""
    storage.write_json(storage.join(root, _USED), {"used": time.time()})


def evict(cache: str, *, max_gb: float, keep: str) -> list[str]:
    """Delete the least recently used folders of `cache` until the rest is at most `max_gb`.

    The folder named `keep` stays. A run that loses parts it counted on computes them again.

    Returns:
        The names of the folders that were deleted.
    """
    sizes: dict[str, int] = {}
    used: dict[str, float] = {}
    for name in storage.list_names(cache):
        root = storage.join(cache, name)
        try:
            used[name] = float(storage.read_json(storage.join(root, _USED))["used"])
        except (FileNotFoundError, NotADirectoryError):
            continue  # not a folder of ours
        sizes[name] = sum(file.size for file in storage.list_files(root))
    gone = []
    for name in sorted(used, key=lambda name: used[name]):
        if sum(sizes.values()) <= max_gb * 1e9:
            break
        if name != keep:
            root = storage.join(cache, name)
            storage.delete_folder(root, mark=storage.join(root, _USED))
            del sizes[name]
            gone.append(name)
    return gone
