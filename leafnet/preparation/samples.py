"""What every kind of source is turned into: samples, with their label and split."""

import hashlib
import json
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from leafnet.core.errors import UserError
from leafnet.data.listing import Found

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

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "dev", "devel", "development"), "valid"),
    # As the `datasets` library has them.
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation"), "test"),
}

# Words beside a split's that say nothing: train_set, split=train, test-images.
_FILLERS = frozenset(
    ("set", "sets", "data", "dataset", "image", "images", "img", "imgs", "photos", "split", "part")
)

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
    passed_over: dict[str, int] = field(default_factory=dict)  # kind -> files, or whole folders
    tables: tuple[str, ...] = ()  # files beside the photographs that name classes
    classes: Mapping[str, set[str]] | None = None  # by split; None: not known before it is read

    @property
    def examples(self) -> int | None:
        """How many there are; None for tars, which do not say."""
        return None if self.layout == "tars" else int(sum(self.items["examples"].to_pylist()))

    @property
    def size(self) -> int:
        """Bytes of all items."""
        return int(sum(self.items["size"].to_pylist()))


def fingerprint(files: Iterable[Found]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([file.name, file.size]).encode() + b"\n")
    return digest.hexdigest()


def some(names: Iterable[str], limit: int = 4) -> str:
    """A few of `names`, for a message.

    >>> some(["b", "a"]), some("abcdef")
    ('a, b', 'a, b, c, d and 2 more')
    """
    ordered = sorted(names)
    more = f" and {len(ordered) - limit:,} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def split_words(name: str) -> tuple[str | None, str, bool]:
    """The split that one word of a name tells, the other words, and whether it is at an end.

    >>> split_words("training_set"), split_words("split=dev"), split_words("train2017")
    (('train', '', True), ('valid', '', True), ('train', '', True))
    >>> split_words("PlantVillage_test"), split_words("contest")
    (('test', 'plantvillage', True), (None, 'contest', False))
    """
    words = []
    for word in re.findall(r"[^\W\d_]+", name.lower()):
        short = re.sub(r"(set|data|images)$", "", word)
        words.append(short if short in _SPLIT_WORDS else word)
    words = [word for word in words if word not in _FILLERS]
    told = [word for word in words if word in _SPLIT_WORDS]
    at_end = bool(words) and (words[0] in _SPLIT_WORDS or words[-1] in _SPLIT_WORDS)
    split = _SPLIT_WORDS[told[0]] if told else None
    return split, " ".join(word for word in words if word not in told[:1]), at_end


def split_of_value(value: str) -> str | None:
    """The split that a value of a column tells; None: none, or two."""
    split, rest, _ = split_words(value)
    return None if any(word in _SPLIT_WORDS for word in rest.split()) else split


def split_of_name(name: str) -> str | None:
    """The split that a container's path tells, by a folder or by a word of the file name.

    >>> split_of_name("data/train-00000-of-00002.parquet"), split_of_name("Testing/0.tar")
    ('train', 'test')
    >>> split_of_name("leaves-000.tar")
    """
    parts = posixpath.splitext(name)[0].split("/")
    return next((split for part in parts if (split := split_words(part)[0])), None)


def check_classes(
    source: str, classes: Mapping[str, set[str]], *, evaluation: bool = False
) -> list[str]:
    """Check the class names of each split ("train" alone where there are no splits); notes.

    `evaluation`: nothing is to be trained on it, so that one class is enough.

    Raises:
        UserError: valid without train, one class only, classes that differ in case alone, or a
            class that training never sees.
    """
    check_spelling(source, set().union(*classes.values()))
    train = classes.get("train", set())
    if set(classes) == {"test"}:
        return ["a test split alone: the data set is for evaluation, not for training"]
    if not train:
        raise UserError(
            "no-train-split",
            f"--source {source} has {some(classes)} but no train examples",
        )
    if len(train) < 2 and not evaluation:
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
    return []


def check_spelling(source: str, names: Iterable[str]) -> None:
    """Refuse class names that differ in case alone: other readers take them for one.

    Raises:
        UserError: there are two.
    """
    spelled: dict[str, str] = {}
    for name in sorted(names):
        other = spelled.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(
                "class-twice",
                f"--source {source} has the classes {other} and {name}, which differ in case "
                "alone; give them one name",
            )


def class_name(text: str) -> str | None:
    """A class name as it is kept: NFC, without spaces around it; None: it is empty.

    A Mac writes `û` as two characters and others as one, which look the same.
    """
    return unicodedata.normalize("NFC", text).strip() or None


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
    return class_name(str(value)) if value is not None else None


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
