"""What becomes of each photograph: duplicate or not, split, and place in the shards.

Decisions on a few columns of metadata, without the photographs and without Ray. They depend on the
keys, the settings and the seed, never on the order in which photographs were read.

In shapes N is the number of photographs, U that of distinct hashes, P that of pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from leafnet.core.errors import UserError
from leafnet.data.groups import Ints
from leafnet.data.shards import SPLITS
from leafnet.preparation.duplicates import drop, duplicate_rows, near_pairs
from leafnet.preparation.examples import NONE, TRAIN, Examples, Policy, read_examples
from leafnet.preparation.splits import assign_splits

REJECTED_SCHEMA = pa.schema(
    [("key", pa.string()), ("reason", pa.string()), ("message", pa.string())]
)


@dataclass(frozen=True)
class Plan:
    """Where every photograph goes."""

    class_names: tuple[str, ...]
    shard_names: tuple[str, ...]
    shard_rows: Ints  # of each shard
    rows: dict[str, NDArray[np.generic]]  # kept: number (ascending), label, place in all shards
    counts: dict[str, dict[str, int]]  # split -> class name -> examples
    rejected: pa.Table  # of REJECTED_SCHEMA
    duplicates: pa.Table  # of DUPLICATES_SCHEMA
    dropped: dict[str, int]  # why -> photographs
    notes: tuple[str, ...]


def decide(read: pa.Table, policy: Policy, *, has_splits: bool, source: str) -> Plan:
    """The plan for what was `read`, a table of READ_SCHEMA in any order.

    Raises:
        UserError: what is left cannot be trained on.
    """
    read = read.sort_by("key")
    good = read.filter(pc.is_null(read["reason"]))
    rejected = read.filter(pc.is_valid(read["reason"])).select(REJECTED_SCHEMA.names)
    if not good.num_rows:
        reasons = _counted(rejected["reason"].to_pylist())
        raise UserError(
            "nothing-readable", f"none of the {read.num_rows:,} photographs can be used: {reasons}"
        )
    examples = read_examples(good)
    _check_classes(examples, set(pc.unique(read["label"]).to_pylist()) - {None}, source)
    pairs = near_pairs(examples.hash, policy.near_distance)
    dropped = {
        "other-label": np.zeros(examples.label.size, np.bool_),
        "other-split": np.zeros(examples.label.size, np.bool_),
    }
    if policy.drop_exact:
        none = np.empty(0, np.int64)
        drop(examples, examples.pixels, (none, none), dropped)
    if policy.drop_near:
        drop(examples, pairs.inverse, (pairs.a, pairs.b), dropped)
    gone = dropped["other-label"] | dropped["other-split"]
    split, notes = assign_splits(examples, ~gone, pairs, policy, has_splits)
    _check_training(examples, split, source)
    counts = {
        name: {
            class_name: int(np.sum((split == i) & (examples.label == c)))
            for c, class_name in enumerate(examples.class_names)
        }
        for i, name in enumerate(SPLITS)
    }
    rows, shard_names, shard_rows = _place(examples, split, policy)
    duplicates, untold = duplicate_rows(
        examples, np.where(gone, examples.split, split), gone, pairs
    )
    if untold:
        notes.append(f"{untold:,} more pairs of duplicates are not listed")
    return Plan(
        class_names=examples.class_names,
        shard_names=shard_names,
        shard_rows=shard_rows,
        rows=rows,
        counts=counts,
        rejected=rejected.cast(REJECTED_SCHEMA),
        duplicates=duplicates,
        dropped={why: int(mask.sum()) for why, mask in dropped.items()},
        notes=tuple(notes),
    )


def _counted(reasons: Sequence[str]) -> str:
    values, counts = np.unique(np.array(reasons, np.str_), return_counts=True)
    return ", ".join(f"{count:,} {value}" for value, count in zip(values, counts, strict=True))


def _check_classes(examples: Examples, listed: set[str], source: str) -> None:
    lost = listed - set(examples.class_names)
    if lost:
        raise UserError(
            "class-unreadable",
            f"no photograph of the class {min(lost)} of {source} can be read; repair them or "
            "remove the class",
        )
    if len(examples.class_names) < 2:
        raise UserError(
            "one-class",
            f"--source {source} has one class only, {examples.class_names[0]}; a classifier "
            "needs at least two",
        )


def _check_training(examples: Examples, split: Ints, source: str) -> None:
    trained = np.bincount(examples.label[split == TRAIN], minlength=len(examples.class_names))
    for name in np.array(examples.class_names)[trained == 0]:
        total = int(np.sum(examples.label == examples.class_names.index(name)))
        raise UserError(
            "class-without-training",
            f"the class {name} of {source} has no training example left ({total:,} readable); add "
            "photographs, or see --duplicates, --split and --group",
        )


# Order


def _place(
    examples: Examples, split: Ints, policy: Policy
) -> tuple[dict[str, NDArray[np.generic]], tuple[str, ...], Ints]:
    """Rows by number, and the shards: a shuffle of each split, cut into shards of like size."""
    place = np.full(split.size, NONE)
    names: list[str] = []
    rows: list[int] = []
    for i, name in enumerate(SPLITS):
        of_split = np.flatnonzero(split == i)
        if not of_split.size:
            continue
        order = np.random.default_rng([policy.seed, i]).permutation(of_split)
        place[order] = sum(rows) + np.arange(order.size)
        counts = _cut(examples.size[order], policy.shard_bytes)
        names += [f"{name}-{number:05d}.parquet" for number in range(counts.size)]
        rows += counts.tolist()
    kept = np.flatnonzero(place != NONE)
    kept = kept[np.argsort(examples.number[kept])]
    columns: dict[str, NDArray[np.generic]] = {
        "number": examples.number[kept],
        "label": examples.label[kept].astype(np.int32),
        "place": place[kept],
    }
    return columns, tuple(names), np.array(rows, np.int64)


def _cut(sizes: Ints, target: int) -> Ints:
    """Rows of each shard, so that shards have like sizes, near `target` bytes.

    >>> _cut(np.full(10, 30), 100).tolist()
    [3, 4, 3]
    """
    ends = np.cumsum(sizes)
    count = max(1, round(int(ends[-1]) / target))
    middles = ends - sizes / 2
    shard = np.minimum((middles * count / ends[-1]).astype(np.int64), count - 1)
    return np.asarray(np.unique(shard, return_counts=True)[1], np.int64)
