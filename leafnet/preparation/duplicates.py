"""Photographs that are the same, or look alike."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from leafnet.core.errors import UserError
from leafnet.data.groups import Ints
from leafnet.data.shards import SPLITS
from leafnet.preparation.examples import NONE, TRAIN, VALID, Bools, Examples

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

_BANDS = 4  # near_distance < _BANDS: one band of two near hashes is always equal
_MAX_PAIRS = 20_000_000
_PAIRS_AT_ONCE = 4_000_000
_LONG_RUN = 256
_MAX_REPORTED = 1_000_000


# Near duplicates


class Pairs(NamedTuple):
    """Near hashes among the distinct ones."""

    inverse: Ints  # [N], place of each photograph's hash among the distinct ones
    a: Ints  # [P], places among the distinct ones; a < b
    b: Ints
    distance: NDArray[np.int32]  # [P], differing bits; 0 only where one is turned


def near_pairs(
    hashes: NDArray[np.uint64], distance: int, turned: NDArray[np.uint64] | None = None
) -> Pairs:
    """All pairs of distinct values in `hashes` [N] that differ in at most `distance` bits.

    With `turned` [N, 7], of the same pictures flipped and turned, also those of which one differs
    so little from the other in one of these ways.

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
    values, owner = distinct, np.arange(distinct.size)
    if turned is not None:
        values = np.concatenate([distinct, turned.ravel()])
        owner = np.concatenate([owner, np.repeat(inverse, turned.shape[1])])
    own = np.arange(values.size) < distinct.size
    # One mask of all bits finds what is equal.
    masks = [second for first in _parts(0) for second in _parts(first)] if distance else [2**64 - 1]
    found, waiting = np.empty((0, 3), np.int64), list[NDArray[np.int64]]()
    for i, j in _near(values, np.arange(values.size), masks, distance):
        a, b = np.minimum(owner[i], owner[j]), np.maximum(owner[i], owner[j])
        # Two turned ones say what one of them and an upright one say.
        new = (own[i] | own[j]) & (a != b)
        bits = np.bitwise_count(values[i[new]] ^ values[j[new]]).astype(np.int64)
        waiting.append(np.stack([a[new], b[new], bits], axis=1))
        if sum(map(len, waiting)) > _MAX_PAIRS - len(found):
            found, waiting = _nearest([found, *waiting]), []
            if len(found) > _MAX_PAIRS:
                raise UserError(
                    "too-many-near-duplicates",
                    f"more than {_MAX_PAIRS:,} pairs of photographs look alike; give a lower "
                    "--near_distance, 0 for equal hashes only",
                )
    found = _nearest([found, *waiting])
    return Pairs(inverse.astype(np.int64), found[:, 0], found[:, 1], found[:, 2].astype(np.int32))


def _nearest(found: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Rows of (a, b, bits), each pair once, by a and b, with the least of its bits."""
    pairs = np.concatenate(found)
    pairs = pairs[np.lexsort((pairs[:, 2], pairs[:, 1], pairs[:, 0]))]
    first = np.r_[True, (pairs[1:, :2] != pairs[:-1, :2]).any(axis=1)]
    nearest: NDArray[np.int64] = pairs[first[: len(pairs)]]
    return nearest


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


def drop(
    examples: Examples, alike: Ints, pairs: tuple[Ints, Ints], dropped: dict[str, Bools]
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
    highest = around(examples.label, np.maximum, NONE)
    conflict = kept & (lowest != highest)
    dropped["other-label"] |= conflict
    kept &= ~conflict
    # From the top, so that what valid gives up drops nothing from train.
    for split in (VALID, TRAIN):
        above = around(examples.split, np.maximum, NONE) > split
        goes = kept & (examples.split == split) & above
        dropped["other-split"] |= goes
        kept &= ~goes


def duplicate_links(codes: Ints) -> tuple[Ints, Ints]:
    """(a, b) that tie each photograph to the first with the same code."""
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    return np.arange(codes.size), first[inverse]


# Report


def duplicate_rows(
    examples: Examples, split: Ints, gone: Bools, pairs: Pairs
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
