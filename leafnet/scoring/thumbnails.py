"""Small pictures of the photographs for review, made of pixels that are decoded already.

They wait with their rows, in a column `thumbnail` (JPEG; null: none) that is not published. Where
they are to be explained, a column `seen` has, of the same photographs, what the network saw.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from leafnet.data.thumbnails import jpeg

COLUMN = "thumbnail"
SEEN = "seen"  # JPEG as well, square, in the network's size
EXPLAINED = "explained"  # a thumbnail under its class activation map, see `explanations`
LIMIT = 500  # of a night: what a person looks through, and 3 MB of a page
_SEEN_QUALITY = 95


class Maker:
    """Makes thumbnails for stack after stack, of what may still be among the first `LIMIT`.

    Of a night of a million photographs some thousand get one, and not each of those for review.
    """

    def __init__(self, limit: int = LIMIT, *, seen: bool = False) -> None:
        self._limit, self._seen = limit, seen
        # Of each kind of reason, the values of the first so far, in order.
        self._first = {True: np.empty(0), False: np.empty(0)}

    def attach(
        self, rows: pa.Table, pixels: NDArray[np.uint8], decoded: NDArray[np.int64]
    ) -> pa.Table:
        """`rows` of the predictions with thumbnails, and with what the network saw if so made.

        Args:
            rows: of `rows.schema`.
            pixels: [B, S, S, 3], stretched to a square.
            decoded: [B], the row of each, in order.
        """
        made: list[bytes | None] = [None] * rows.num_rows
        seen = list(made)
        at, is_unlike, value = _doubts(rows)
        for unlike, first in self._first.items():
            mine = is_unlike == unlike
            if len(first) == self._limit:
                mine &= value <= first[-1]
            self._first[unlike] = np.sort(np.append(first, value[mine]))[: self._limit]
            sizes = rows.select(["width", "height"]).take(pa.array(at[mine])).to_pylist()
            for row, size in zip(at[mine].tolist(), sizes, strict=True):
                square = pixels[np.searchsorted(decoded, row)]
                made[row] = jpeg(square, **size)
                if self._seen:
                    side = len(square)
                    seen[row] = jpeg(
                        square, width=side, height=side, side=side, quality=_SEEN_QUALITY
                    )
        rows = rows.append_column(COLUMN, pa.array(made, pa.binary()))
        return rows.append_column(SEEN, pa.array(seen, pa.binary())) if self._seen else rows


def wanted(rows: pa.Table, limit: int = LIMIT) -> NDArray[np.int64]:
    """Which rows for review a person should see first, at most `limit`, the first of all first.

    The least sure and the least like the training photographs by turns, so that many of one kind
    leave room for the other.
    """
    at, is_unlike, value = _doubts(rows)
    # Equal ones by name, so that the order in which rows come decides nothing.
    keys = pa.table({"value": value, "image": rows["image"].take(pa.array(at))})
    by_value = pc.sort_indices(keys, [("value", "ascending"), ("image", "ascending")]).to_numpy()
    rank = np.empty(len(at), np.int64)
    for group in (is_unlike, ~is_unlike):
        mine = by_value[group[by_value]]
        rank[mine] = np.arange(len(mine))
    order = np.lexsort((is_unlike, rank))
    return np.asarray(at[order[:limit]], np.int64)


def _doubts(
    rows: pa.Table,
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]]:
    """Of the rows for review: place, whether it is unlike training, and a value, lower first."""
    at = np.flatnonzero(pc.equal(rows["status"], "review").to_numpy(zero_copy_only=False))
    chosen = rows.select(["reason", "confidence", "novelty"]).take(pa.array(at))
    unlike = pc.match_substring(pc.fill_null(chosen["reason"], ""), "unlike-training")
    is_unlike = unlike.to_numpy(zero_copy_only=False)
    value = np.where(is_unlike, -_numbers(chosen["novelty"]), _numbers(chosen["confidence"]))
    return at, is_unlike, value


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.asarray(pc.fill_null(column.cast(pa.float64()), 0.0).to_numpy(zero_copy_only=False))


def keep_wanted(rows: pa.Table, limit: int = LIMIT) -> pa.Table:
    """`rows` with the thumbnails that `wanted` names, and no others."""
    if COLUMN not in rows.column_names or rows[COLUMN].null_count >= rows.num_rows - limit:
        return rows
    kept = np.zeros(rows.num_rows, bool)
    kept[wanted(rows, limit)] = True
    none = pa.scalar(None, pa.binary())
    for place, name in enumerate(rows.column_names):
        if name in (COLUMN, SEEN):
            rows = rows.set_column(place, name, pc.if_else(pa.array(kept), rows[name], none))
    return rows


def of(rows: pa.Table) -> list[dict[str, Any]]:
    """Image, version, thumbnail and, if the rows have it, `EXPLAINED` of those with a thumbnail."""
    columns = [
        name for name in ("image", "version", COLUMN, EXPLAINED) if name in rows.column_names
    ]
    found: list[dict[str, Any]] = rows.filter(pc.is_valid(rows[COLUMN])).select(columns).to_pylist()
    return found
