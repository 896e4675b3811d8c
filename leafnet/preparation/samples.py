"""What every kind of source is turned into: samples, with their label and split."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from leafnet.core.errors import UserError
from leafnet.core.storage import File

Layout = Literal["folders", "parquet", "tars"]

ITEM_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # path below the source
        ("url", pa.string()),
        ("part", pa.int32()),  # row group of a Parquet file, otherwise 0
        ("size", pa.int64()),  # bytes
        ("examples", pa.int64()),  # null: not known before it is read
        ("label", pa.string()),  # class name; null: the container says it for each example
        ("split", pa.string()),  # null: none, or the container says it for each example
    ]
)

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".heic", ".heif", ".avif", ".ppm", ".pgm"),
)
NO_CLASS = frozenset({"__MACOSX"})
# Of a Parquet file whose column `key` names each example: leafnet's own, which knows it is unique.
WITH_KEYS = {"leafnet": "examples with keys"}


class Sample(NamedTuple):
    """One example as it was found: a photograph, or why there is none."""

    row: int  # place in its item, from 0
    key: str  # unique in the source
    label: str | None
    split: str | None
    image: bytes | None
    reason: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class Listing:
    """What a source holds, without the photographs themselves."""

    source: str
    layout: Layout
    items: pa.Table  # of ITEM_SCHEMA, by key: files of photographs, row groups, or tars
    has_splits: bool  # it says valid or test (or both) itself
    label_names: tuple[str, ...]  # what whole-number labels mean; empty: their own digits
    notes: tuple[str, ...]  # what a person should know about it
    fingerprint: str  # sha256 over names and sizes

    @property
    def examples(self) -> int | None:
        """How many there are; None for tars, which do not say."""
        return None if self.layout == "tars" else int(sum(self.items["examples"].to_pylist()))

    @property
    def size(self) -> int:
        """Bytes of all items."""
        return int(sum(self.items["size"].to_pylist()))


def fingerprint(files: Iterable[tuple[str, File]]) -> str:
    digest = hashlib.sha256()
    for name, file in files:
        digest.update(json.dumps([name, file.size]).encode() + b"\n")
    return digest.hexdigest()


def some(names: Iterable[str], limit: int = 4) -> str:
    """A few of `names`, for a message.

    >>> some(["b", "a"]), some("abcdef")
    ('a, b', 'a, b, c, d and 2 more')
    """
    ordered = sorted(names)
    more = f" and {len(ordered) - limit:,} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def split_of_name(name: str) -> str | None:
    """The split that a container's path tells, by a folder or by a word of the file name.

    >>> split_of_name("data/train-00000-of-00002.parquet"), split_of_name("Testing/0.tar")
    ('train', 'test')
    >>> split_of_name("leaves-000.tar")
    """
    *folders, last = name.split("/")
    words = folders + re.split(r"[-_. ]", last)
    return next((SPLIT_NAMES[w.lower()] for w in words if w.lower() in SPLIT_NAMES), None)


def check_classes(source: str, classes: Mapping[str, set[str]]) -> None:
    """Check the class names of each split ("train" alone where there are no splits).

    Raises:
        UserError: no training examples, one class only, or a class that training never sees.
    """
    train = classes.get("train", set())
    if not train:
        raise UserError(
            "no-train-split",
            f"--source {source} has {some(classes)} but no train examples",
        )
    if len(train) < 2:
        raise UserError(
            "one-class",
            f"--source {source} has one class only, {some(train)}; a classifier needs at least two",
        )
    for split, names in classes.items():
        unknown = names - train
        if unknown:
            raise UserError(
                "class-not-in-train",
                f"{split} of {source} has {some(unknown)}, which train has not "
                f"({some(train)}); name the classes alike in all splits",
            )


def settle_splits(source: str, items: list[dict[str, Any]]) -> bool:
    """Whether the items tell valid or test. Train alone is as good as no split."""
    found = {item["split"] for item in items}
    if None in found and len(found) > 1:
        without = next(item["key"] for item in items if item["split"] is None)
        told = next(item["key"] for item in items if item["split"] is not None)
        raise UserError(
            "mixed-layouts",
            f"in --source {source}, {told} names its split and {without} does not; "
            "name train, valid or test for all or none",
        )
    if found - {None, "train"}:
        return True
    for item in items:
        item["split"] = None
    return False


def label_text(value: Any, names: Sequence[str]) -> str | None:
    """The class name of a stored label; None where there is none.

    >>> label_text(1, ["a", "b"]), label_text(7, []), label_text(" rust", [])
    ('b', '7', 'rust')
    >>> label_text(-1, []), label_text(2, ["a", "b"])
    (None, None)
    """
    if isinstance(value, int):
        if names:
            return names[value] if 0 <= value < len(names) else None
        # The Hub's way to say that the labels of a test split are withheld.
        return str(value) if value >= 0 else None
    return str(value).strip() or None if value is not None else None


def damaged(
    row: int, key: str, split: str | None, reason: str, what: str, error: BaseException
) -> Sample:
    message = f"the {what} cannot be read after its first {row:,} examples: {one_line(error)}"
    return Sample(row, key, None, split, None, reason, message)


def make_sample(
    row: int, key: str, label: str | None, split: str | None, image: bytes | None, given: Any
) -> Sample:
    sample = Sample(row, key, label, split, image)
    if image is None:
        return sample._replace(reason="no-image", message="there are no image bytes")
    if label is None:
        return sample._replace(
            image=None, reason="no-label", message=f"the label {given!r} names no class"
        )
    return sample


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
