"""Sources that are folders of photographs, one folder for each class."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data.listing import Found, kind_passed
from leafnet.preparation.samples import (
    ITEM_SCHEMA,
    Listing,
    Sample,
    class_name,
    fingerprint,
    one_line,
    settle_splits,
    some,
    split_words,
)


class Levels(NamedTuple):
    """Where in a path the class stands."""

    depth: int
    splits: dict[str, str]  # first folder -> split; {}: there are none


def look_at_folders(source: str, photos: Sequence[Found], files: Sequence[Found]) -> Listing:
    empty = _empty_folders(source, photos, files)
    levels = find_levels(source, [photo.name for photo in photos], empty)
    items: list[dict[str, Any]] = []
    for photo in photos:
        parts = photo.name.split("/")
        items.append(
            {
                "key": photo.name,
                "url": photo.url,
                "part": 0,
                "size": photo.size or 0,
                "examples": 1,
                "label": class_name(parts[levels.depth]),
                "split": levels.splits.get(parts[0]),
            }
        )
    classes: dict[str, set[str]] = {}
    for item in items:
        classes.setdefault(item["split"] or "train", set()).add(item["label"])
    if levels.splits:
        empty = set()
        for top, split in levels.splits.items():
            if split == "train":
                empty |= _empty_folders(storage.join(source, top), photos, files, top)
    empty = {name for name in empty if class_name(name) not in classes.get("train", set())}
    if empty:
        raise UserError(
            "empty-class",
            f"the class folder {min(empty)} of {source} holds no photograph; fill it, remove "
            "it, or give the right to read it",
        )
    notes = _note_of_one_class(photos, levels)
    return Listing(
        source=source,
        layout="folders",
        has_splits=settle_splits(source, items),
        items=pa.Table.from_pylist(items, ITEM_SCHEMA),
        label_names=(),
        notes=tuple(notes),
        fingerprint=fingerprint(photos),
        classes=classes,
    )


def find_levels(source: str, names: Sequence[str], empty: Iterable[str] = ()) -> Levels:
    """What the folders of `names`, paths of photographs, stand for.

    Raises:
        UserError: photographs without a class, splits for some only, or a folder too high or low.
    """
    direct = [name for name in names if "/" not in name]
    if direct:
        raise UserError(
            "photographs-in-root",
            f"{len(direct):,} photographs lie directly in {source} ({some(direct)}); put each "
            "into a folder named after its class, or give the folder above if this is a class",
        )
    tops = {name.split("/")[0] for name in names} | set(empty)
    without_class = {name.split("/")[0] for name in names if name.count("/") == 1}
    splits = _splits(source, tops, without_class)
    if splits.keys() == tops and without_class:
        raise UserError(
            "photographs-without-class",
            f"photographs lie directly in {source}/{min(without_class)}; put each into a folder "
            f"named after its class, such as {min(without_class)}/healthy, or leave them out: "
            "photographs without a class are for jobs/score.py",
        )
    splits = {top: split for top, split in splits.items() if top not in without_class}
    if splits and splits.keys() != tops:
        raise UserError(
            "mixed-layouts",
            f"--source {source} has {some(splits)}, which name splits, beside "
            f"{some(tops - splits.keys())}; put the classes below the splits or leave the splits "
            "out",
        )
    if splits:
        for top in splits:
            below = [name[len(top) + 1 :] for name in names if name.startswith(f"{top}/")]
            _check_level(storage.join(source, top), below)
        return Levels(1, splits)
    _check_level(source, names)
    return Levels(0, {})


def _splits(source: str, tops: set[str], without_class: set[str]) -> dict[str, str]:
    """The folders that name splits, by a word alone or all by one beside the same others.

    Raises:
        UserError: a folder of folders begins or ends with the word of a split.
    """
    told = {top: split_words(top) for top in tops}
    alike = len({rest for _, rest, _ in told.values()}) == 1 and all(s for s, _, _ in told.values())
    unclear = [
        top
        for top, (split, rest, at_end) in told.items()
        if split and rest and at_end and not alike and top not in without_class
    ]
    if unclear:
        raise UserError(
            "unclear-split",
            f"{min(unclear)} of --source {source} may name a split or a class; name splits train, "
            "valid and test, all of them, or put the photographs of a class directly into it",
        )
    return {top: split for top, (split, rest, _) in told.items() if split and (alike or not rest)}


def _check_level(source: str, names: Sequence[str]) -> None:
    """Refuse folders that are not classes: what they hold says so.

    Raises:
        UserError: they lie one level too high, or one holds all others again.
    """
    holding: dict[str, set[str]] = {}
    direct = False
    for name in names:
        top, *below = name.split("/")
        direct |= len(below) == 1
        holding.setdefault(top, set()).update(below[:1] if len(below) > 1 else ())
    for top, inside in holding.items():
        again = inside & (holding.keys() - {top})
        if len(again) > 1:
            raise UserError(
                "classes-twice",
                f"the folder {top} of {source} holds {some(again)}, which lie beside it as well; "
                "remove one of the two",
            )
    shared = set.intersection(*holding.values()) if holding else set()
    # Plants, cameras and days have numbers, and lie in the folder of every class.
    shared = {name for name in shared if not any(c.isdigit() for c in name)}
    if len(holding) > 1 and len(shared) > 1 and not direct:
        first = sorted(holding)[0]
        remedy = f"if these are the classes, give one of the folders, such as {source}/{first}"
        if all(split_words(name)[0] for name in shared):
            remedy = "put the classes below the splits, such as train/healthy"
        raise UserError(
            "wrong-level",
            f"all folders of {source} ({some(holding)}) hold the same folders ({some(shared)}); "
            f"{remedy}",
        )
    if len(holding) == 1:
        ((top, inside),) = holding.items()
        if len(inside) > 1:
            raise UserError(
                "one-class",
                f"--source {source} has one class folder only, {top}; if {some(inside)} are the "
                f"classes, give --source {storage.join(source, top)}",
            )


def _empty_folders(
    folder: str, photos: Iterable[Found], files: Iterable[Found], below: str = ""
) -> set[str]:
    """Folders directly in `folder` without a photograph; `below` is its name below the source."""
    prefix = f"{below}/" if below else ""
    full = {p.name[len(prefix) :].split("/")[0] for p in photos if p.name.startswith(prefix)}
    plain = {f.name[len(prefix) :] for f in files if f.name.startswith(prefix)}
    return {
        name
        for name in storage.list_names(folder)
        if name
        and name not in full | plain
        and not kind_passed(name)
        and storage.is_folder(storage.join(folder, name))
    }


def _note_of_one_class(photos: Sequence[Found], levels: Levels) -> list[str]:
    """What to tell of folders whose names look the same and are stored differently."""
    folders = {photo.name.split("/")[levels.depth] for photo in photos}
    spelled: dict[str | None, set[str]] = {}
    for folder in folders:
        spelled.setdefault(class_name(folder), set()).add(folder)
    merged = [str(name) for name, of_name in spelled.items() if len(of_name) > 1]
    if not merged:
        return []
    return [f"folders whose names are spelled by other characters are one class: {some(merged)}"]


def file_sample(item: Mapping[str, Any]) -> Sample:
    sample = Sample(0, item["key"], item["label"], item["split"], None)
    if item["label"] is None:
        return sample._replace(reason="no-label", message="the table of labels does not name it")
    return read_photograph(sample, item["url"])


def read_photograph(sample: Sample, url: str) -> Sample:
    """`sample` with the bytes at `url`, or with why there are none."""
    try:
        # Opening a pipe would wait for its writer for ever.
        if storage.is_local(url) and os.path.exists(url) and not os.path.isfile(url):
            raise OSError("a folder, a pipe or a device, not a file")
        return sample._replace(image=storage.read_bytes(url))
    except UserError as error:
        # A store that cannot be reached says nothing of the photograph.
        if error.reason != "no-access":
            raise
        return sample._replace(reason="cannot-read", message=f"cannot read it: {one_line(error)}")
    # Every filesystem has errors of its own, and what is wrong with one file must not end the job.
    except Exception as error:
        reason = "not-found" if isinstance(error, FileNotFoundError) else "cannot-read"
        return sample._replace(reason=reason, message=f"cannot read it: {one_line(error)}")
