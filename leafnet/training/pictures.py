"""The photographs in the report of a training run: galleries of mistakes, samples of classes."""

from collections.abc import Mapping, Sequence
from typing import Any

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data import shards
from leafnet.data.images import ImageError
from leafnet.data.shards import ShardIndex
from leafnet.data.thumbnails import of_photograph
from leafnet.evaluation import document
from leafnet.evaluation.gallery import Item

_SAMPLES = 8  # of a class, or fewer where there are many classes
_MAX_SAMPLES = 240
# Largest number of row groups read for samples; rare classes may be in none of them.
_MAX_GROUPS = 8
_KINDS = (
    ("confident-error", "Most confident errors", "The errors that the model is most confident of."),
    (
        "likely-wrong-label",
        "Likely wrong labels",
        "The model is confident of another label than the given one. Check which one is right.",
    ),
    (
        "confused-pair",
        "Most confused classes",
        "Photographs of the pairs of classes that are confused most.",
    ),
)


def gallery(run: str) -> list[Item]:
    """Return the gallery of the run's evaluation; empty if it has none."""
    try:
        _, items = document.read(storage.join(run, "evaluation"))
    except FileNotFoundError:  # no split to evaluate
        return []
    return items


def samples_of(model: Mapping[str, Any]) -> list[Item]:
    """Return samples of the training photographs; none if the data set is gone or has changed."""
    data = model.get("data", {})
    try:
        index = shards.read_index(data["shards"])
    except (KeyError, UserError):
        return []
    return samples(index) if index.fingerprint == data["fingerprint"] else []


def samples(index: ShardIndex, *, split: str = "train") -> list[Item]:
    """Return some photographs of each class of `split`, in the order of the classes.

    They are the first in the shards, which are shuffled. At most 8 row groups are read; therefore
    rare classes may have fewer. Of more than 240 classes some have none, evenly among all.
    """
    wanted = max(1, min(_SAMPLES, _MAX_SAMPLES // len(index.class_names)))
    classes = len(index.class_names)
    found: dict[int, list[Item]] = {i: [] for i in range(0, classes, -(-classes // _MAX_SAMPLES))}
    for number, table in enumerate(
        shards.unchecked_groups(index, split, ["key", "image", "label"])
    ):
        for row in table.to_pylist():
            of_class = found.get(row["label"])
            if of_class is not None and len(of_class) < wanted:
                name = index.class_names[row["label"]]
                try:
                    small = of_photograph(row["image"])
                except ImageError:  # judging the data set is not the job of this report
                    continue
                of_class.append(Item("sample", row["key"], name, name, 1.0, small, None))
        if number + 1 == _MAX_GROUPS or all(len(items) == wanted for items in found.values()):
            break
    return [item for items in found.values() for item in items]


def galleries(items: Sequence[Item], colour: Mapping[str, Any]) -> list[dict[str, Any]]:
    made = []
    for kind, title, words in _KINDS:
        mine = [item for item in items if item.kind == kind]
        if not mine:
            continue
        groups: dict[str, list[Item]] = {}
        for item in mine:
            pair = f"{item.label} taken for {item.predicted}" if kind == "confused-pair" else ""
            groups.setdefault(pair, []).append(item)
        made.append(
            {
                "kind": kind,
                "title": title,
                "words": words,
                "groups": groups,
                "maps": any(item.cam_jpeg for item in mine),
            }
        )
    return made


def by_class(items: Sequence[Item], names: Sequence[str]) -> dict[str, list[Item]]:
    found = {
        name: [item for item in items if item.kind == "sample" and item.label == name]
        for name in names
    }
    return {name: of_class for name, of_class in found.items() if of_class}
