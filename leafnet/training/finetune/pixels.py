"""Decoded photographs of a split, for training on pixels.

What fits is decoded once into a file on each node's disk and mapped into memory: an epoch then
costs no decoding, and 100,000 photographs of 256 pixels are 20 GB. What does not fit is decoded
again in each epoch, shards one after the other; examples are shuffled when shards are written, so
some shards at a time, mixed, are as good as all.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from leafnet.core import scratch
from leafnet.core.cache import LocalCache
from leafnet.core.scratch import Shared
from leafnet.data import shards
from leafnet.data.images import DECODER_VERSION, decode
from leafnet.data.shards import Shard

Pixels = NDArray[np.uint8]

# Shards whose examples are mixed where photographs are streamed; twice as many are in memory where
# one window ends and the next begins, 64 MB each.
_WINDOW = 4
_BLOCK = 256  # photographs that are decoded between two writes


class Photographs(NamedTuple):
    """The N photographs of a split, in order of shard and row, which is that of its features."""

    labels: NDArray[np.int32]  # [N]
    # (indices [M]) -> pixels [M, S, S, 3] uint8
    gather: Callable[[NDArray[np.int64]], Pixels]
    # Rows of each shard where photographs are streamed, and an epoch goes from shard to shard.
    # Empty: any order costs the same.
    shard_rows: tuple[int, ...] = ()
    shared: Shared | None = None  # the folder on this node's disk


def streamed_order(
    shard_rows: Sequence[int], *, seed: int, epoch: int, window: int = _WINDOW
) -> NDArray[np.int64]:
    """The order [N] in which `epoch` takes the examples of shards with `shard_rows` rows.

    Shards in random order, and the examples of each `window` shards mixed.

    >>> streamed_order([3, 2], seed=0, epoch=0, window=1).tolist()
    [2, 0, 1, 4, 3]
    """
    generator = np.random.default_rng([seed, epoch, 0])
    starts = np.concatenate([[0], np.cumsum(shard_rows)])
    order = generator.permutation(len(shard_rows))
    parts = []
    for at in range(0, len(order), window):
        rows = np.concatenate(
            [np.arange(starts[shard], starts[shard + 1]) for shard in order[at : at + window]]
        )
        parts.append(generator.permutation(rows))
    return np.concatenate(parts).astype(np.int64)


def open_split(
    root: str,
    of_split: Sequence[Shard],
    *,
    image_size: int,
    threads: int,
    max_local: float,
    cache: LocalCache | None = None,
) -> Photographs:
    """The photographs of the shards `of_split`, on this node's disk where they fit.

    Args:
        root: of the data set.
        of_split: its shards of one split.
        image_size: S, pixels.
        threads: that decode.
        max_local: bytes of decoded photographs that may be kept on this node's disk.
        cache: of shards on this node, see `shards.row_groups`.

    Raises:
        UserError: a shard is not the one that was prepared.
    """
    of_split = sorted(of_split, key=lambda shard: shard.name)
    rows = [shard.rows for shard in of_split]
    if sum(rows) * image_size * image_size * 3 <= max_local:
        return _local(root, of_split, image_size, threads, cache)
    labels = [shards.read_columns(root, shard, ["label"])["label"].to_numpy() for shard in of_split]
    stream = _Stream(root, of_split, image_size, threads, cache)
    return Photographs(np.concatenate(labels).astype(np.int32), stream.gather, tuple(rows))


def _local(
    root: str, of_split: Sequence[Shard], image_size: int, threads: int, cache: LocalCache | None
) -> Photographs:
    """All photographs in one mapped file, which the processes of this node share."""
    shape = (sum(shard.rows for shard in of_split), image_size, image_size, 3)

    def fill(folder: Path) -> None:
        pixels = scratch.mapped(folder / "pixels.npy", dtype=np.uint8, shape=shape)
        labels, done = [], 0
        with ThreadPoolExecutor(threads) as pool:
            for shard in of_split:
                for table in shards.row_groups(root, shard, cache=cache):
                    labels.append(table["label"].to_numpy().astype(np.int32))
                    for at in range(0, table.num_rows, _BLOCK):
                        images = table["image"].slice(at, _BLOCK)
                        pixels[done : done + len(images)] = _decoded(pool, images, image_size)
                        done += len(images)
        pixels.flush()
        np.save(folder / "labels.npy", np.concatenate(labels))

    content = ["photographs", DECODER_VERSION, image_size, [shard.sha256 for shard in of_split]]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    shared = scratch.share(digest, fill)
    opened = np.load(shared.path / "pixels.npy", mmap_mode="r")
    labels = np.load(shared.path / "labels.npy")
    return Photographs(labels, lambda indices: opened[indices], shared=shared)


def _decoded(pool: ThreadPoolExecutor, images: "pa.ChunkedArray", size: int) -> Pixels:
    return np.stack(list(pool.map(lambda image: decode(image.as_py(), size).pixels, images)))


class _Stream:
    """Photographs decoded as they are asked for, from the shards that were asked for last."""

    def __init__(
        self,
        root: str,
        of_split: Sequence[Shard],
        size: int,
        threads: int,
        cache: LocalCache | None,
    ) -> None:
        self._root, self._shards, self._size, self._cache = root, of_split, size, cache
        self._starts = np.concatenate([[0], np.cumsum([shard.rows for shard in of_split])])
        self._pool = ThreadPoolExecutor(threads)
        self._held: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def gather(self, indices: NDArray[np.int64]) -> Pixels:
        images = []
        for index in indices:
            shard = int(np.searchsorted(self._starts, index, side="right")) - 1
            images.append(self._images(shard)[int(index - self._starts[shard])])
        return np.stack(
            list(self._pool.map(lambda image: decode(image.as_py(), self._size).pixels, images))
        )

    def _images(self, shard: int) -> "pa.ChunkedArray":
        if shard not in self._held:
            tables = shards.row_groups(self._root, self._shards[shard], cache=self._cache)
            self._held[shard] = pa.chunked_array(
                [chunk for table in tables for chunk in table["image"].chunks], pa.binary()
            )
            while len(self._held) > 2 * _WINDOW:
                self._held.popitem(last=False)
        self._held.move_to_end(shard)
        return self._held[shard]
