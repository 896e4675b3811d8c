"""Photographs that must stay together: groups named by a pattern, and parts joined by links."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from leafnet.core.errors import UserError
from leafnet.data import shards
from leafnet.data.shards import ShardIndex


def groups_of(index: ShardIndex, keys: Sequence[str]) -> NDArray[np.int64] | None:
    """What jobs/prepare.py was told to keep together, [N]; None: nothing.

    A key that does not match is a group of its own, as it was there.
    """
    settings = shards.prepared(index.root).get("settings") or {}
    if not settings.get("group"):
        return None
    pattern = re.compile(settings["group"])
    found = [(key, pattern.search(key)) for key in keys]
    names = [
        f"= {match[1 if pattern.groups else 0]}" if match else f"key {key}" for key, match in found
    ]
    groups: NDArray[np.int64] = np.unique(names, return_inverse=True)[1]
    return groups


def groups_of_split(index: ShardIndex, split: str) -> NDArray[np.int64] | None:
    """`groups_of` all examples of `split`, in the order of the index."""
    if not (shards.prepared(index.root).get("settings") or {}).get("group"):
        return None
    tables = [shards.read_columns(index.root, one, ["key"]) for one in index.of_split(split)]
    return groups_of(index, [key for table in tables for key in table["key"].to_pylist()])


Ints = NDArray[np.int64]


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


def named_groups(keys: Sequence[str], pattern: str | None) -> tuple[Ints | None, list[str]]:
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
