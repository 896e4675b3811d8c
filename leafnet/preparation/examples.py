"""The examples of a data set while it is prepared, as columns of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from leafnet.data.groups import Ints
from leafnet.data.shards import SPLITS

READ_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),  # unique; the photograph's bytes are found by it
        ("key", pa.string()),
        ("label", pa.string()),  # class name
        ("split", pa.string()),  # of the source; null: it has none
        ("bytes", pa.int64()),
        ("pixels_sha256", pa.string()),
        ("perceptual_hash", pa.uint64()),
        ("turned_hashes", pa.list_(pa.uint64())),  # of the other seven symmetries
        ("reason", pa.string()),  # why it is refused; null: it is not
        ("message", pa.string()),
    ]
)

# Places in SPLITS. Where identical pictures are in two splits, the one further down here keeps it.
NONE, TRAIN, VALID, TEST = -1, 0, 1, 2
Bools = NDArray[np.bool_]


class Policy(NamedTuple):
    """The settings that decide; see `PrepareSettings` for what they mean."""

    shares: tuple[int, int, int]  # of train, valid, test [%]
    group: str | None = None
    drop_exact: bool = True
    drop_near: bool = False
    near_distance: int = 3
    shard_bytes: int = 64_000_000
    seed: int = 0


@dataclass
class Examples:
    """The readable photographs by key, as arrays [N]."""

    number: Ints
    keys: list[str]
    label: Ints  # place in class_names
    split: Ints  # place in SPLITS, or _NONE
    size: Ints
    pixels: Ints  # equal for equal pixels
    hash: NDArray[np.uint64]
    turned: NDArray[np.uint64]  # [N, 7], of the picture flipped and turned
    class_names: tuple[str, ...]


def read_examples(good: pa.Table) -> Examples:
    names = sort_names(pc.unique(good["label"]).to_pylist())
    order = pa.array(names, pa.string())
    splits = pc.index_in(good["split"], pa.array(SPLITS)).fill_null(NONE)
    return Examples(
        number=good["number"].to_numpy(),
        keys=good["key"].to_pylist(),
        label=pc.index_in(good["label"], order).to_numpy().astype(np.int64),
        split=splits.to_numpy().astype(np.int64),
        size=good["bytes"].to_numpy(),
        pixels=_codes(good["pixels_sha256"]),
        hash=good["perceptual_hash"].to_numpy(),
        turned=pc.list_flatten(good["turned_hashes"]).to_numpy().reshape(good.num_rows, -1),
        class_names=tuple(names),
    )


def _codes(column: pa.ChunkedArray) -> Ints:
    encoded = column.combine_chunks().dictionary_encode()
    return np.asarray(encoded.indices.to_numpy(zero_copy_only=False), np.int64)


def sort_names(names: Sequence[str]) -> list[str]:
    """Class names in the order of the index: alphabetical, or by value when all are numbers.

    >>> sort_names(["10", "9"]), sort_names(["rust", "10", "9"])
    (['9', '10'], ['10', '9', 'rust'])
    """
    numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if numbers else 0, name))
