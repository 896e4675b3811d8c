"""Examples in groups that a person can name, and how a model does on each.

N examples.
"""

import itertools
import posixpath
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafnet.metrics.intervals import share

NO_MATCH = "(no match)"
# Shorter side of the original: what is thrown away or made up to get to the network's size.
_SIDES = (128, 256, 512, 1024, 2048)


def by_pattern(keys: Sequence[str], pattern: re.Pattern[str]) -> dict[str, NDArray[np.str_]]:
    """Columns [N] of what `pattern` finds in each key, anywhere in it.

    A column for each named group; without any, one column `key` of group 1, or of the whole match
    where the pattern has no group. A key without a match, or without that group, has `NO_MATCH`.

    Raises:
        ValueError: no key matches.

    >>> columns = by_pattern(["a_day2.jpg", "b.jpg"], re.compile("day(?P<day>[0-9])"))
    >>> {name: column.tolist() for name, column in columns.items()}
    {'day': ['2', '(no match)']}
    """
    found = [pattern.search(key) for key in keys]
    if not any(found):
        raise ValueError(
            f"{pattern.pattern!r} matches none of {len(keys):,} keys, of which the first is "
            f"{keys[0]!r}"
        )
    columns: dict[str, str | int] = {name: name for name in pattern.groupindex}
    if not columns:
        columns = {"key": 1 if pattern.groups else 0}
    return {
        name: np.array([(match and match[group]) or NO_MATCH for match in found])
        for name, group in columns.items()
    }


def by_size(widths: NDArray[np.integer], heights: NDArray[np.integer]) -> NDArray[np.str_]:
    """The class [N] of each original's shorter side in pixels.

    >>> by_size(np.array([3000, 256]), np.array([4000, 256])).tolist()
    ['2048 and more', '256 to 511']
    """
    names = [
        f"under {_SIDES[0]}",
        *(f"{a} to {b - 1}" for a, b in itertools.pairwise(_SIDES)),
        f"{_SIDES[-1]} and more",
    ]
    place = np.searchsorted(_SIDES, np.minimum(widths, heights), side="right")
    found: NDArray[np.str_] = np.array(names)[place]
    return found


def by_folder(keys: Sequence[str], without: Collection[str]) -> NDArray[np.str_]:
    """The folder [N] of each key below the source, less the parts named in `without`.

    Those are classes and splits, which say nothing of where a photograph comes from.

    >>> by_folder(["train/rust/1.jpg", "rust/farm_a/2.jpg"], ["train", "rust"]).tolist()
    ['.', 'farm_a']
    """
    folders = [posixpath.dirname(key).split("/") for key in keys]
    return np.array(["/".join(p for p in parts if p not in without) or "." for parts in folders])


def accuracies(
    column: NDArray[np.str_],
    correct: NDArray[np.bool_],
    *,
    groups: NDArray[np.integer] | None = None,
) -> list[dict[str, Any]]:
    """Examples and accuracy of each value of `column` [N], the least accurate first.

    `low` and `high` bound the 95 % interval of `intervals.share`, which holds for slices of a few
    examples too. The worst of many slices is low by chance alone.
    """
    rows: list[dict[str, Any]] = []
    values, counts = np.unique(column, return_counts=True)
    order = np.argsort(column, kind="stable")
    for value, inside in zip(values.tolist(), np.split(order, np.cumsum(counts)[:-1]), strict=True):
        right = correct[inside]
        low, high = share(right, groups=None if groups is None else groups[inside])
        rows.append(
            {
                **{"value": value, "examples": len(right), "accuracy": float(right.mean())},
                **{"low": low, "high": high},
            }
        )
    return sorted(rows, key=lambda row: (row["accuracy"], -row["examples"], row["value"]))


def columns_of(
    keys: Sequence[str],
    widths: NDArray[np.integer],
    heights: NDArray[np.integer],
    *,
    known: Collection[str],
    pattern: re.Pattern[str] | None,
) -> dict[str, NDArray[np.str_]]:
    """The columns of `pattern`, and those of size and folder where they tell examples apart.

    Args:
        keys: [N].
        widths: [N], of the originals in pixels.
        heights: [N], likewise.
        known: folders of these names say nothing: classes and splits.
        pattern: None: only size and folder.
    """
    own = {"shorter side [pixels]": by_size(widths, heights), "folder": by_folder(keys, known)}
    # A folder for each photograph says no more than the photographs do.
    most = max(2, len(keys) // 2)
    telling = {name: column for name, column in own.items() if 1 < len(np.unique(column)) <= most}
    return (by_pattern(keys, pattern) if pattern else {}) | telling
