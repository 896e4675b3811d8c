"""The few photographs that a person should see to judge a model: its mistakes, and some others.

They lie beside the numbers of an evaluation as small JPEG files, so that a report can be written,
and written again, from what is stored.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leafnet.core import storage
from leafnet.data import shards
from leafnet.data.images import Pixels, decode
from leafnet.data.shards import Shard, ShardIndex
from leafnet.data.thumbnails import LARGE, jpeg, of_photograph
from leafnet.metrics import mistakes
from leafnet.metrics.scores import softmax
from leafnet.models import cam
from leafnet.models.weights import Array

Kind = Literal["likely-wrong-label", "confident-error", "confused-pair", "sample"]
# (RGB [B, S, S, 3], classes [B]) -> class maps [B, h, w], see `cam.class_maps`.
Explain = Callable[[Pixels, NDArray[np.int64]], Array]

FOLDER = "gallery"
_PER_KIND = 12
_PAIRS, _PER_PAIR = 3, 4
_OURS = re.compile(r"\d{3}(-cam)?\.jpg")


@dataclass(frozen=True)
class Item:
    """A photograph and what the model says of it."""

    kind: str  # see `Kind`
    key: str
    label: str  # class that is given
    predicted: str  # class that the model says; for a likely wrong label, that it suggests
    confidence: float  # probability of that
    jpeg: bytes  # thumbnail, at most 160 pixels
    cam_jpeg: bytes | None = None  # the same under the class activation map of `predicted`


class Choice(NamedTuple):
    """What to show of a split."""

    kind: Kind
    row: int  # place among the examples of the split, in the order of `ordered`
    label: int
    predicted: int
    confidence: float


def ordered(index: ShardIndex, split: str) -> list[Shard]:
    """The shards of `split` in the order that numbers its examples from 0."""
    return sorted(index.of_split(split), key=lambda shard: shard.name)


def choose(
    logits: NDArray[np.float32], labels: NDArray[np.integer], *, seed: int = 0
) -> list[Choice]:
    """A few dozen examples at most: of each kind a dozen.

    Likely wrong labels and errors, the worst first; of the three most confused pairs the four most
    confident each; and examples that are right, drawn at random, the classes in turn. An example
    may be there as more than one kind.

    Args:
        logits: [N, C].
        labels: [N], class indices.
        seed: of the random ones.
    """
    probabilities = softmax(logits)
    predicted = probabilities.argmax(axis=1)

    def choice(kind: Kind, row: int, shown: int) -> Choice:
        return Choice(kind, row, int(labels[row]), shown, float(probabilities[row, shown]))

    suspects = mistakes.likely_wrong_labels(probabilities, labels)
    found = [
        choice("likely-wrong-label", int(row), int(suggested))
        for row, suggested in zip(
            suspects.rows[:_PER_KIND], suspects.suggested[:_PER_KIND], strict=True
        )
    ]
    errors = mistakes.confident_errors(probabilities, labels)
    found += [choice("confident-error", int(r), int(predicted[r])) for r in errors[:_PER_KIND]]
    pairs, counts = np.unique(
        np.stack([labels[errors], predicted[errors]], axis=1), axis=0, return_counts=True
    )
    for pair in pairs[np.argsort(-counts, kind="stable")[:_PAIRS]]:
        of_pair = errors[(labels[errors] == pair[0]) & (predicted[errors] == pair[1])]
        found += [choice("confused-pair", int(r), int(pair[1])) for r in of_pair[:_PER_PAIR]]
    right = np.random.default_rng(seed).permutation(np.flatnonzero(predicted == labels))
    turn = np.zeros(len(right), np.int64)
    for label in np.unique(labels[right]):
        of_label = labels[right] == label
        turn[of_label] = np.arange(of_label.sum())
    samples = right[np.lexsort((labels[right], turn))][:_PER_KIND]
    return found + [choice("sample", int(r), int(predicted[r])) for r in samples]


def make(
    index: ShardIndex,
    split: str,
    chosen: Sequence[Choice],
    *,
    image_size: int,
    explain: Explain | None,
) -> list[Item]:
    """The items of `chosen`, their photographs read from the shards.

    Args:
        index: of the data set.
        split: whose examples they are.
        chosen: of `choose`.
        image_size: S of the network, pixels.
        explain: makes class maps; None: no activation maps.
    """
    photographs = _read(index, split, sorted({choice.row for choice in chosen}))
    items = []
    for choice in chosen:
        key, data = photographs[choice.row]
        heat = None
        if explain:
            pixels = decode(data, image_size).pixels[None]
            heat = explain(pixels, np.array([choice.predicted]))[0]
        small, mapped = thumbnails(data, heat)
        items.append(
            Item(
                choice.kind,
                key,
                index.class_names[choice.label],
                index.class_names[choice.predicted],
                choice.confidence,
                small,
                mapped,
            )
        )
    return items


def _read(index: ShardIndex, split: str, rows: Sequence[int]) -> dict[int, tuple[str, bytes]]:
    """(key, file) of each of `rows`, which are ascending."""
    found: dict[int, tuple[str, bytes]] = {}
    first = 0
    for shard in ordered(index, split):
        inside = [row for row in rows if first <= row < first + shard.rows]
        if inside:
            table = shards.read_rows(index.root, shard, [row - first for row in inside])
            values = zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True)
            found |= dict(zip(inside, values, strict=True))
        first += shard.rows
    return found


def thumbnails(photograph: bytes, class_map: Array | None) -> tuple[bytes, bytes | None]:
    """Make a thumbnail of the encoded `photograph`, and the same under its `class_map` [h, w].

    Both have the proportions of the photograph: the network sees it stretched to a square, and the
    map is stretched back with it.
    """
    if class_map is None:
        return of_photograph(photograph), None
    photo = decode(photograph, LARGE)
    plain, mapped = (
        jpeg(pixels, width=photo.width, height=photo.height, side=LARGE)
        for pixels in (photo.pixels, cam.overlay(photo.pixels, class_map))
    )
    return plain, mapped


def write(folder: str, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Store the pictures of `items` below `folder`; what `read` needs to find them, for JSON.

    Pictures of an earlier gallery that are not replaced are deleted.
    """
    place, rows, written = storage.join(folder, FOLDER), [], set()
    for i, item in enumerate(items):
        row: dict[str, Any] = {
            "kind": item.kind,
            "key": item.key,
            "label": item.label,
            "predicted": item.predicted,
            "confidence": item.confidence,
        }
        for field, name, data in (
            ("jpeg", f"{i:03d}.jpg", item.jpeg),
            ("cam_jpeg", f"{i:03d}-cam.jpg", item.cam_jpeg),
        ):
            row[field] = None
            if data is not None:
                storage.write_bytes(storage.join(place, name), data)
                row[field] = f"{FOLDER}/{name}"
                written.add(name)
        rows.append(row)
    for name in storage.list_names(place) if items else ():
        if _OURS.fullmatch(name) and name not in written:
            storage.delete(storage.join(place, name))
    return rows


def read(folder: str, rows: Sequence[Mapping[str, Any]]) -> list[Item]:
    """The items that `write` stored below `folder` and described as `rows`."""
    return [
        Item(
            kind=row["kind"],
            key=row["key"],
            label=row["label"],
            predicted=row["predicted"],
            confidence=row["confidence"],
            jpeg=storage.read_bytes(storage.join(folder, row["jpeg"])),
            cam_jpeg=row["cam_jpeg"] and storage.read_bytes(storage.join(folder, row["cam_jpeg"])),
        )
        for row in rows
    ]
