"""What becomes of each photograph: duplicate or not, split, and place in the shards.

Decisions on a few columns of metadata, without the photographs and without Ray. They depend on the
keys, the settings and the seed, never on the order in which photographs were read.

In shapes N is the number of photographs, U that of distinct hashes, P that of pairs.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from leafnet.config import SPLITS
from leafnet.errors import UserError

READ_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),  # unique; the photograph's bytes are found by it
        ("key", pa.string()),
        ("label", pa.string()),  # class name
        ("split", pa.string()),  # of the source; null: it has none
        ("bytes", pa.int64()),
        ("pixels_sha256", pa.string()),
        ("perceptual_hash", pa.uint64()),
        ("reason", pa.string()),  # why it is refused; null: it is not
        ("message", pa.string()),
    ]
)

REJECTED_SCHEMA = pa.schema(
    [("key", pa.string()), ("reason", pa.string()), ("message", pa.string())]
)

DUPLICATES_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),  # exact, near
        ("key_a", pa.string()),
        ("key_b", pa.string()),
        ("split_a", pa.string()),  # null: dropped before there was a split
        ("split_b", pa.string()),
        ("label_a", pa.string()),
        ("label_b", pa.string()),
        ("distance", pa.int32()),  # bits of the perceptual hashes; 0 for exact
        ("dropped_a", pa.bool_()),
        ("dropped_b", pa.bool_()),
    ]
)

# Places in SPLITS. Where identical pictures are in two splits, the one further down here keeps it.
_NONE, _TRAIN, _VALID, _TEST = -1, 0, 1, 2

_BANDS = 4  # near_distance < _BANDS: one band of two near hashes is always equal
_MAX_PAIRS = 20_000_000
_PAIRS_AT_ONCE = 4_000_000
_LONG_RUN = 256
_MAX_REPORTED = 1_000_000

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Policy(NamedTuple):
    """The settings that decide; see `config.PrepareSettings` for what they mean."""

    shares: tuple[int, int, int]  # of train, valid, test [%]
    group: str | None = None
    drop_exact: bool = True
    drop_near: bool = False
    near_distance: int = 3
    shard_bytes: int = 64_000_000
    seed: int = 0


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


@dataclass
class _Examples:
    """The readable photographs by key, as arrays [N]."""

    number: Ints
    keys: list[str]
    label: Ints  # place in class_names
    split: Ints  # place in SPLITS, or _NONE
    size: Ints
    pixels: Ints  # equal for equal pixels
    hash: NDArray[np.uint64]
    class_names: tuple[str, ...]


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
    examples = _examples(good)
    _check_classes(examples, set(pc.unique(read["label"]).to_pylist()) - {None}, source)
    pairs = near_pairs(examples.hash, policy.near_distance)
    dropped = {
        "other-label": np.zeros(examples.label.size, np.bool_),
        "other-split": np.zeros(examples.label.size, np.bool_),
    }
    if policy.drop_exact:
        none = np.empty(0, np.int64)
        _drop(examples, examples.pixels, (none, none), dropped)
    if policy.drop_near:
        _drop(examples, pairs.inverse, (pairs.a, pairs.b), dropped)
    gone = dropped["other-label"] | dropped["other-split"]
    split, notes = _assign_splits(examples, ~gone, pairs, policy, has_splits)
    _check_training(examples, split, source)
    counts = {
        name: {
            class_name: int(np.sum((split == i) & (examples.label == c)))
            for c, class_name in enumerate(examples.class_names)
        }
        for i, name in enumerate(SPLITS)
    }
    rows, shard_names, shard_rows = _place(examples, split, policy)
    duplicates, untold = _duplicates(examples, np.where(gone, examples.split, split), gone, pairs)
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


def _examples(good: pa.Table) -> _Examples:
    names = sort_names(pc.unique(good["label"]).to_pylist())
    order = pa.array(names, pa.string())
    splits = pc.index_in(good["split"], pa.array(SPLITS)).fill_null(_NONE)
    return _Examples(
        number=good["number"].to_numpy(),
        keys=good["key"].to_pylist(),
        label=pc.index_in(good["label"], order).to_numpy().astype(np.int64),
        split=splits.to_numpy().astype(np.int64),
        size=good["bytes"].to_numpy(),
        pixels=_codes(good["pixels_sha256"]),
        hash=good["perceptual_hash"].to_numpy(),
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


def _counted(reasons: Sequence[str]) -> str:
    values, counts = np.unique(np.array(reasons, np.str_), return_counts=True)
    return ", ".join(f"{count:,} {value}" for value, count in zip(values, counts, strict=True))


def _check_classes(examples: _Examples, listed: set[str], source: str) -> None:
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


def _check_training(examples: _Examples, split: Ints, source: str) -> None:
    trained = np.bincount(examples.label[split == _TRAIN], minlength=len(examples.class_names))
    for name in np.array(examples.class_names)[trained == 0]:
        total = int(np.sum(examples.label == examples.class_names.index(name)))
        raise UserError(
            "class-without-training",
            f"the class {name} of {source} has no training example left ({total:,} readable); add "
            "photographs, or see --duplicates, --split and --group",
        )


# Near duplicates


class Pairs(NamedTuple):
    """Near hashes among the distinct ones."""

    inverse: Ints  # [N], place of each photograph's hash among the distinct ones
    a: Ints  # [P], places among the distinct ones; a < b
    b: Ints
    distance: NDArray[np.int32]  # [P], differing bits, at least 1


def near_pairs(hashes: NDArray[np.uint64], distance: int) -> Pairs:
    """All pairs of distinct values in `hashes` [N] that differ in at most `distance` bits.

    Exact, in time that grows with N and the pairs found, not with N squared. Of four bands of 16
    bits, three differing bits leave one untouched; of four parts of the other 48 bits, they leave
    one untouched as well. So two near hashes agree in one of 16 selections of 28 bits, and two that
    have nothing to do with each other hardly ever do. One level of bands is not enough: perceptual
    hashes are far from evenly spread, and a band of 16 bits has buckets of thousands.

    Raises:
        UserError: more pairs than memory is good for.
    """
    if not 0 <= distance < _BANDS:
        raise ValueError(f"need 0 <= distance < {_BANDS}, got {distance}")
    distinct, inverse = np.unique(hashes, return_inverse=True)
    found_a, found_b = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    total = 0
    everything = np.arange(distinct.size)
    masks = [second for first in _parts(0) for second in _parts(first)] if distance else []
    for a, b in _near(distinct, everything, masks, distance):
        found_a.append(np.minimum(a, b))
        found_b.append(np.maximum(a, b))
        total += a.size
        if total > _MAX_PAIRS:
            raise UserError(
                "too-many-near-duplicates",
                f"more than {_MAX_PAIRS:,} pairs of photographs look alike; give a lower "
                "--near_distance, 0 for equal hashes only",
            )
    a, b = np.concatenate(found_a), np.concatenate(found_b)
    order = np.lexsort((b, a))
    a, b = a[order], b[order]
    bits = np.bitwise_count(distinct[a] ^ distinct[b]).astype(np.int32)
    return Pairs(inverse.astype(np.int64), a, b, bits)


def _parts(fixed: int) -> list[int]:
    """`fixed`, a mask of 64 bits, with each quarter of the bits that it leaves free."""
    free = [bit for bit in range(64) if not fixed >> bit & 1]
    ends = [len(free) * i // _BANDS for i in range(_BANDS + 1)]
    # Of like sizes: an empty one would select what `fixed` selects, and a long run stay as long.
    return [
        fixed | sum(1 << bit for bit in free[start:end]) for start, end in itertools.pairwise(ends)
    ]


def _near(
    values: NDArray[np.uint64], places: Ints, masks: Sequence[int], distance: int
) -> Iterator[tuple[Ints, Ints]]:
    """Each pair of `places` once whose values agree in a mask and are near."""
    for i, mask in enumerate(masks):
        selected = values[places] & np.uint64(mask)
        order = np.argsort(selected, kind="stable")
        ordered, selected = places[order], selected[order]
        starts = np.flatnonzero(np.r_[True, selected[1:] != selected[:-1]])
        sizes = np.diff(np.r_[starts, selected.size])
        long = sizes > _LONG_RUN if mask.bit_count() < 56 else np.zeros(sizes.size, np.bool_)
        found = [_pairs_in_runs(ordered[np.repeat(~long, sizes)], sizes[~long])]
        for start, size in zip(starts[long], sizes[long], strict=True):
            found.append(_near(values, ordered[start : start + size], _parts(mask), distance))
        for a, b in itertools.chain.from_iterable(found):
            differing = values[a] ^ values[b]
            near = np.bitwise_count(differing) <= distance
            # An earlier mask has found it already.
            for earlier in masks[:i]:
                near[near] = (differing[near] & np.uint64(earlier)) != 0
            yield a[near], b[near]


def _pairs_in_runs(places: Ints, sizes: Ints) -> Iterator[tuple[Ints, Ints]]:
    """All pairs within each run of `places`, a bounded number at a time; runs follow each other."""
    ends = np.repeat(np.cumsum(sizes), sizes)
    # Partner at every offset: all runs at once, and as many rounds as the longest run is long.
    left = np.arange(places.size)
    offset = 0
    while left.size:
        offset += 1
        left = left[left + offset < ends[left]]
        for start in range(0, left.size, _PAIRS_AT_ONCE):
            chunk = left[start : start + _PAIRS_AT_ONCE]
            yield places[chunk], places[chunk + offset]


# What is dropped


def _drop(
    examples: _Examples, alike: Ints, pairs: tuple[Ints, Ints], dropped: dict[str, Bools]
) -> None:
    """Mark what is alike under two labels, then what a higher split keeps.

    `alike` [N] has equal codes for pictures that are alike, `pairs` names more codes that are. It
    goes picture by picture: A like B and B like C says nothing on A and C.
    """
    size = int(alike.max()) + 1
    kept = ~(dropped["other-label"] | dropped["other-split"])

    def around(values: Ints, ufunc: np.ufunc, start: int) -> Ints:
        """[N], `ufunc` over the values of the kept pictures that each one is alike to."""
        of_code = np.full(size, start)
        ufunc.at(of_code, alike[kept], values[kept])
        wider = of_code.copy()
        ufunc.at(wider, pairs[0], of_code[pairs[1]])
        ufunc.at(wider, pairs[1], of_code[pairs[0]])
        return np.asarray(wider[alike])

    lowest = around(examples.label, np.minimum, len(examples.class_names))
    highest = around(examples.label, np.maximum, _NONE)
    conflict = kept & (lowest != highest)
    dropped["other-label"] |= conflict
    kept &= ~conflict
    # From the top, so that what valid gives up drops nothing from train.
    for split in (_VALID, _TRAIN):
        above = around(examples.split, np.maximum, _NONE) > split
        goes = kept & (examples.split == split) & above
        dropped["other-split"] |= goes
        kept &= ~goes


# Splits


def _assign_splits(
    examples: _Examples, kept: Bools, pairs: Pairs, policy: Policy, has_splits: bool
) -> tuple[Ints, list[str]]:
    """[N] places in SPLITS, _NONE where a photograph is not kept; and notes."""
    named, notes = _named_groups(examples.keys, policy.group)
    links = [_links(examples.pixels)]
    if named is not None:
        links.append(_links(named))
    if policy.drop_near:
        first = np.unique(pairs.inverse, return_index=True)[1]
        links += [_links(pairs.inverse), (first[pairs.a], first[pairs.b])]
    a, b = (np.concatenate(ends) for ends in zip(*links, strict=True))
    group = components(examples.label.size, a, b)

    split = np.where(kept, examples.split if has_splits else _TRAIN, _NONE)
    shares = list(policy.shares)
    if has_splits:
        if named is not None:
            notes += _crossing_note(named, examples.split)
        there = set(np.unique(examples.split).tolist())
        shares = [share if i == _TRAIN or i not in there else 0 for i, share in enumerate(shares)]
    carved = split == _TRAIN
    split[carved] = stratify(
        examples.label[carved], group[carved], (shares[0], shares[1], shares[2]), seed=policy.seed
    )
    for i in (_VALID, _TEST):
        if has_splits and i not in there:
            count = int(np.sum(split == i))
            notes.append(
                f"the source has no {SPLITS[i]} split: {count:,} photographs of train become it"
            )
    for i in (_VALID, _TEST):
        found = np.bincount(examples.label[split == i], minlength=len(examples.class_names))
        without = [name for name, n in zip(examples.class_names, found, strict=True) if not n]
        if without and found.any():
            notes.append(f"warning: {SPLITS[i]} has no example of {', '.join(without)}")
    return split, notes


def check_group(pattern: str | None) -> None:
    """Refuse a --group that is no regular expression.

    Raises:
        UserError: it is none.
    """
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise UserError(
            "bad-group", f"--group {pattern!r} is not a regular expression: {error}"
        ) from None


def _named_groups(keys: Sequence[str], pattern: str | None) -> tuple[Ints | None, list[str]]:
    """[N] codes that are equal where `pattern` finds the same; each key without a match alone."""
    if pattern is None:
        return None, []
    compiled = re.compile(pattern)
    codes: dict[tuple[str, bool], int] = {}
    group = np.empty(len(keys), np.int64)
    unmatched = 0
    for i, key in enumerate(keys):
        match = compiled.search(key)
        text = match.group(min(compiled.groups, 1)) if match else None
        unmatched += text is None
        name = (key, False) if text is None else (text, True)
        group[i] = codes.setdefault(name, len(codes))
    if unmatched == len(keys):
        raise UserError(
            "group-without-match",
            f"--group {pattern!r} matches no key; the first is {keys[0]}",
        )
    notes = [
        f"--group makes {len(codes) - unmatched:,} groups of {len(keys) - unmatched:,} photographs"
    ]
    if unmatched:
        notes.append(f"warning: --group does not match {unmatched:,} keys; each stands alone")
    return group, notes


def _crossing_note(group: Ints, split: Ints) -> list[str]:
    pairs = np.unique(np.stack([group, split]), axis=1)
    crossing = int(np.sum(np.bincount(pairs[0]) > 1))
    if not crossing:
        return []
    return [f"warning: {crossing:,} groups of --group are in more than one split of the source"]


def _links(codes: Ints) -> tuple[Ints, Ints]:
    """(a, b) that tie each photograph to the first with the same code."""
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    return np.arange(codes.size), first[inverse]


def components(size: int, a: Ints, b: Ints) -> Ints:
    """[size], the lowest place that each place is tied to by the pairs (`a`, `b`), also by others.

    >>> components(5, np.array([1, 2]), np.array([2, 4])).tolist()
    [0, 1, 1, 3, 1]
    """
    root = np.arange(size, dtype=np.int64)
    while True:
        low = np.minimum(root[a], root[b])
        before = root.copy()
        # The roots are tied as well as the places, which halves long chains each time.
        for ends in (a, b, before[a], before[b]):
            np.minimum.at(root, ends, low)
        root = root[root]
        if np.array_equal(root, before):
            return root


def stratify(label: Ints, group: Ints, shares: tuple[int, int, int], *, seed: int) -> Ints:
    """[N] places in SPLITS, with each class divided by `shares` and no group in two splits.

    Every class comes as close to its shares as its groups allow, exactly where each photograph is
    a group of its own. A class of three groups or more has an example in every split with a share.

    Args:
        label: [N], class of each photograph.
        group: [N], equal where photographs stay together.
        shares: of train, valid and test; their sum is the whole.
        seed: of the choice.
    """
    if not label.size:
        return np.empty(0, np.int64)
    _, of = np.unique(group, return_inverse=True)
    classes = int(label.max()) + 1
    cells, counts = np.unique(of * classes + label, return_counts=True)
    content: list[list[tuple[int, int]]] = [[] for _ in range(int(of.max()) + 1)]
    members: list[list[int]] = [[] for _ in range(classes)]  # groups of each class
    size_of = dict(zip(cells.tolist(), counts.tolist(), strict=True))
    for cell, count in size_of.items():
        content[cell // classes].append((cell % classes, count))
        members[cell % classes].append(cell // classes)
    totals = np.bincount(label, minlength=classes).tolist()
    missing = [_targets(n, len(members[c]), shares) for c, n in enumerate(totals)]
    place = [_NONE] * len(content)

    def put(number: int, split: int) -> None:
        place[number] = split
        for c, count in content[number]:
            missing[c][split] -= count

    shuffled = np.random.default_rng([seed, len(SPLITS)]).permutation(len(content)).tolist()
    rank = {number: i for i, number in enumerate(shuffled)}
    # One group for valid and test first, where a class has few and large ones: later there might
    # be no room for any. Rare classes choose first.
    for c in sorted(range(classes), key=lambda c: (len(members[c]), c)):
        for split in (_TEST, _VALID):
            wanted = missing[c][split]
            if len(members[c]) < len(SPLITS) or wanted <= 0:
                continue
            if any(place[number] == split for number in members[c]):
                continue
            free = [number for number in members[c] if place[number] == _NONE]
            if len(free) > 1:
                size = {number: size_of[number * classes + c] for number in free}
                put(min(free, key=lambda n: (max(size[n], wanted), rank[n])), split)
    open_splits = [i for i, share in enumerate(shares) if share]
    total = [sum(count for _, count in inside) for inside in content]
    for number in sorted(shuffled, key=lambda number: -total[number]):
        if place[number] != _NONE:
            continue
        inside = content[number]
        put(
            number,
            max(
                open_splits,
                key=lambda split: (sum(n * missing[c][split] for c, n in inside), -split),
            ),
        )
    return np.array(place, np.int64)[of]


def _targets(count: int, groups: int, shares: tuple[int, int, int]) -> list[int]:
    """How many of a class's `count` photographs each split should have, by largest remainder.

    >>> _targets(1000, 1000, (80, 10, 10)), _targets(3, 3, (80, 10, 10))
    ([800, 100, 100], [1, 1, 1])
    >>> _targets(2, 2, (80, 10, 10))
    [2, 0, 0]
    """
    exact = [count * share / sum(shares) for share in shares]
    targets = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (targets[i] - exact[i], i))
    for i in by_remainder[: count - sum(targets)]:
        targets[i] += 1
    if groups >= len(shares):
        for i, share in enumerate(shares):
            if share and not targets[i]:
                targets[targets.index(max(targets))] -= 1
                targets[i] = 1
    elif count and not targets[_TRAIN]:
        targets[targets.index(max(targets))] -= 1
        targets[_TRAIN] = 1
    return targets


# Order


def _place(
    examples: _Examples, split: Ints, policy: Policy
) -> tuple[dict[str, NDArray[np.generic]], tuple[str, ...], Ints]:
    """Rows by number, and the shards: a shuffle of each split, cut into shards of like size."""
    place = np.full(split.size, _NONE)
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
    kept = np.flatnonzero(place != _NONE)
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


# Report


def _duplicates(
    examples: _Examples, split: Ints, gone: Bools, pairs: Pairs
) -> tuple[pa.Table, int]:
    """Pairs of DUPLICATES_SCHEMA, at most _MAX_REPORTED, and how many more there are.

    Sets of many copies are told as a star: each with the one that stays, or else the first. Near
    ones are told once for each combination of splits and labels.
    """
    best = np.lexsort((np.arange(split.size), -split, gone, examples.pixels))
    first = np.unique(examples.pixels[best], return_index=True)[1]
    stays = best[first][np.unique(examples.pixels, return_inverse=True)[1]]
    copies = np.flatnonzero(stays != np.arange(split.size))
    exact = (stays[copies], copies, np.zeros(copies.size, np.int32))

    # One photograph for each picture, split and label: the others are told as exact already.
    kind_of = (split + 1) * len(examples.class_names) + examples.label
    many = (len(SPLITS) + 1) * len(examples.class_names)
    picture = np.unique(examples.pixels * many + kind_of, return_index=True)[1]
    cells, first, inverse = np.unique(
        pairs.inverse[picture] * many + kind_of[picture], return_index=True, return_inverse=True
    )
    heads = picture[first]
    inside = np.flatnonzero(heads[inverse] != picture)
    count = np.bincount(cells // many, minlength=int(pairs.inverse.max()) + 1)
    start = np.cumsum(count) - count
    # Cells of the same hash, then those of each near pair of hashes.
    same = np.flatnonzero(count > 1)
    left, right, distance = _products(
        start,
        count,
        np.concatenate([pairs.a, same]),
        np.concatenate([pairs.b, same]),
        np.concatenate([pairs.distance, np.zeros(same.size, np.int32)]),
    )
    a, b = heads[left], heads[right]
    real = (left != right) & (examples.pixels[a] != examples.pixels[b])
    real &= (distance > 0) | (left < right)
    near = (
        np.concatenate([heads[inverse][inside], a[real]]),
        np.concatenate([picture[inside], b[real]]),
        np.concatenate([np.zeros(inside.size, np.int32), distance[real]]),
    )
    is_near = np.repeat([False, True], [copies.size, near[0].size])
    a, b = np.concatenate([exact[0], near[0]]), np.concatenate([exact[1], near[1]])
    distance = np.concatenate([exact[2], near[2]])
    crossing = (split[a] != split[b]) | (examples.label[a] != examples.label[b])
    # By key, those that cross a border first, so that a cut loses the least.
    order = np.lexsort((b, a, is_near, ~crossing))
    told = order[:_MAX_REPORTED]
    a, b = a[told], b[told]
    keys = np.array(examples.keys, object)
    splits = np.array([*SPLITS, None], object)  # _NONE is the last
    labels = np.array(examples.class_names, object)
    columns = {
        "kind": np.where(is_near[told], "near", "exact").astype(object),
        "key_a": keys[a],
        "key_b": keys[b],
        "split_a": splits[split[a]],
        "split_b": splits[split[b]],
        "label_a": labels[examples.label[a]],
        "label_b": labels[examples.label[b]],
        "distance": distance[told],
        "dropped_a": gone[a],
        "dropped_b": gone[b],
    }
    table = pa.table({name: pa.array(v) for name, v in columns.items()})
    return table.cast(DUPLICATES_SCHEMA), max(0, order.size - _MAX_REPORTED)


def _products(
    start: Ints, count: Ints, a: Ints, b: Ints, distance: NDArray[np.int32]
) -> tuple[Ints, Ints, NDArray[np.int32]]:
    """For each pair of hashes, all pairs of their cells; the cells of hash u begin at start[u]."""
    each = count[a] * count[b]
    pair = np.repeat(np.arange(a.size), each)
    within = np.arange(pair.size) - np.repeat(np.cumsum(each) - each, each)
    wide = count[b[pair]]
    return start[a[pair]] + within // wide, start[b[pair]] + within % wide, distance[pair]
