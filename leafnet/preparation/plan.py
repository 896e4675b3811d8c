"""What becomes of each photograph: duplicate or not, split, and place in the shards.

Decisions on a few columns of metadata, without the photographs and without Ray. They depend on the
keys, the settings and the seed, never on the order in which photographs were read.

In shapes N is the number of photographs, U that of distinct hashes, P that of pairs.
"""

from collections import Counter
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
from leafnet.preparation.examples import NONE, TEST, TRAIN, Bools, Examples, Policy, read_examples
from leafnet.preparation.samples import check_spelling
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
        RuntimeError: a photograph would be lost without a word.
    """
    read = read.sort_by("key")
    good = read.filter(pc.is_null(read["reason"]))
    rejected = rejected_of(read)
    if not good.num_rows:
        reasons = _counted(rejected["reason"].to_pylist())
        raise UserError(
            "nothing-readable",
            f"none of the {read.num_rows:,} photographs can be used: {reasons}; "
            f"{commonest(rejected)}",
        )
    examples = read_examples(good)
    listed = set(pc.unique(read["label"]).to_pylist()) - {None}
    evaluation = policy.shares[TRAIN] == 0
    evaluation |= has_splits and set(examples.split.tolist()) == {TEST}
    _check_classes(examples, listed, source, evaluation=evaluation)
    pairs = near_pairs(examples.hash, policy.near_distance, examples.turned)
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
    _check_balance(read, rejected, gone, split)
    if not evaluation:
        _check_training(examples, split, dropped, source)
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
        rejected=rejected,
        duplicates=duplicates,
        dropped={why: int(mask.sum()) for why, mask in dropped.items()},
        notes=tuple(notes),
    )


def _counted(reasons: Sequence[str]) -> str:
    values, counts = np.unique(np.array(reasons, np.str_), return_counts=True)
    return ", ".join(f"{count:,} {value}" for value, count in zip(values, counts, strict=True))


def rejected_of(read: pa.Table) -> pa.Table:
    """The photographs with a reason, of REJECTED_SCHEMA, by key."""
    found = read.filter(pc.is_valid(read["reason"])).select(REJECTED_SCHEMA.names)
    return found.sort_by("key").cast(REJECTED_SCHEMA)


def commonest(rejected: pa.Table) -> str:
    """The first photograph with the commonest reason, and what is wrong with it.

    >>> rows = [("a", "empty", "no bytes"), ("b", "cut", "cut off"), ("c", "cut", "cut off")]
    >>> columns = [list(column) for column in zip(*rows)]
    >>> commonest(pa.table(columns, schema=REJECTED_SCHEMA))
    'such as b: cut off'
    """
    reasons = rejected["reason"].to_pylist()
    ((reason, _),) = Counter(reasons).most_common(1)
    row = reasons.index(reason)
    return f"such as {rejected['key'][row]}: {rejected['message'][row]}"


def _check_balance(read: pa.Table, rejected: pa.Table, gone: Bools, split: Ints) -> None:
    """read = kept + rejected + dropped, or nothing is written.

    Raises:
        RuntimeError: it is not.
    """
    kept, dropped = int(np.sum(split != NONE)), int(gone.sum())
    if kept + rejected.num_rows + dropped != read.num_rows:
        raise RuntimeError(
            f"{read.num_rows:,} photographs were read, and {kept:,} kept + {rejected.num_rows:,} "
            f"rejected + {dropped:,} dropped are not as many"
        )


def _check_classes(examples: Examples, listed: set[str], source: str, *, evaluation: bool) -> None:
    check_spelling(source, examples.class_names)
    lost = listed - set(examples.class_names)
    if lost:
        raise UserError(
            "class-unreadable",
            f"no photograph of the class {min(lost)} of {source} can be read; repair them or "
            "remove the class",
        )
    if len(examples.class_names) < 2 and not evaluation:
        raise UserError(
            "one-class",
            f"--source {source} has one class only, {examples.class_names[0]}; a classifier "
            "needs at least two",
        )


def _check_training(
    examples: Examples, split: Ints, dropped: dict[str, Bools], source: str
) -> None:
    trained = np.bincount(examples.label[split == TRAIN], minlength=len(examples.class_names))
    for number in np.flatnonzero(trained == 0).tolist():
        of_class = examples.label == number
        why = "add photographs, or see --duplicates, --split and --group"
        for reason, what in (
            ("other-label", "under another label"),
            ("other-split", "in another split"),
        ):
            twice = np.flatnonzero(of_class & dropped[reason])
            if not twice.size:
                continue
            first = int(twice[0])
            same = examples.pixels == examples.pixels[first]
            same &= (
                ~of_class if reason == "other-label" else examples.split != examples.split[first]
            )
            other = examples.keys[int(np.flatnonzero(same)[0])] if same.any() else "another"
            why = (
                f"{twice.size:,} were dropped since the same picture is {what}, such "
                f"as {examples.keys[first]} and {other}: remove one of the two"
            )
        raise UserError(
            "class-without-training",
            f"the class {examples.class_names[number]} of {source} has no training example left "
            f"({int(of_class.sum()):,} readable); {why}",
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
