"""Sources that are folders of photographs, one folder for each class."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.core.storage import File
from leafnet.preparation.samples import (
    ITEM_SCHEMA,
    NO_CLASS,
    SPLIT_NAMES,
    Listing,
    Sample,
    check_classes,
    fingerprint,
    one_line,
    settle_splits,
    some,
)


def look_at_folders(
    source: str, photos: list[tuple[str, File]], files: list[tuple[str, File]], notes: list[str]
) -> Listing:
    direct = [name for name, _ in photos if "/" not in name]
    if direct:
        raise UserError(
            "photographs-in-root",
            f"{len(direct):,} photographs lie directly in {source} ({some(direct)}); put each "
            "into a folder named after its class",
        )
    tops = {name.split("/")[0] for name, _ in photos} | _empty_folders(source, photos, files)
    without_class = {n.split("/")[0] for n, _ in photos if n.count("/") == 1}
    aliases = {top for top in tops if top.lower() in SPLIT_NAMES}
    if aliases == tops and without_class:
        raise UserError(
            "photographs-without-class",
            f"photographs lie directly in {source}/{min(without_class)}; put each into a folder "
            f"named after its class, such as {min(without_class)}/healthy",
        )
    splits = aliases - without_class
    if splits and splits != tops:
        raise UserError(
            "mixed-layouts",
            f"--source {source} has {some(splits)}, which name splits, beside "
            f"{some(tops - splits)}; put the classes below the splits or leave the splits out",
        )
    depth = 1 if splits else 0
    items = []
    for name, file in photos:
        parts = name.split("/")
        items.append(
            {
                "key": name,
                "url": file.url,
                "part": 0,
                "size": file.size,
                "examples": 1,
                "label": parts[depth],
                "split": SPLIT_NAMES[parts[0].lower()] if splits else None,
            }
        )
    _check_folder_classes(source, items, tops, splits, photos, files)
    has_splits = settle_splits(source, items)
    return Listing(
        source=source,
        layout="folders",
        items=pa.Table.from_pylist(items, ITEM_SCHEMA),
        has_splits=has_splits,
        label_names=(),
        notes=tuple(notes),
        fingerprint=fingerprint(photos),
    )


def _empty_folders(
    folder: str,
    photos: Iterable[tuple[str, File]],
    files: Iterable[tuple[str, File]],
    below: str = "",
) -> set[str]:
    """Folders directly in `folder` without a photograph; `below` is its name below the source."""
    prefix = f"{below}/" if below else ""
    full = {n[len(prefix) :].split("/")[0] for n, _ in photos if n.startswith(prefix)}
    plain = {n[len(prefix) :] for n, _ in files if n.startswith(prefix)}
    return {
        name
        for name in storage.list_names(folder)
        if name not in full | plain | NO_CLASS
        and not name.startswith(".")
        and storage.is_folder(storage.join(folder, name))
    }


def _check_folder_classes(
    source: str,
    items: list[dict[str, Any]],
    tops: set[str],
    splits: set[str],
    photos: list[tuple[str, File]],
    files: list[tuple[str, File]],
) -> None:
    classes: dict[str, set[str]] = {}
    for item in items:
        classes.setdefault(item["split"] or "train", set()).add(item["label"])
    empty = set() if splits else tops - classes["train"]
    for top in splits:
        if SPLIT_NAMES[top.lower()] == "train":
            found = _empty_folders(storage.join(source, top), photos, files, top)
            empty |= found - classes.get("train", set())
    if empty:
        raise UserError(
            "empty-class",
            f"the class folder {min(empty)} of {source} holds no photograph; fill it or remove it",
        )
    if not splits and len(tops) == 1:
        (top,) = tops
        below = {item["key"].split("/")[1] for item in items if item["key"].count("/") > 1}
        if len(below) > 1:
            raise UserError(
                "one-class",
                f"--source {source} has one class folder only, {top}; if {some(below)} are the "
                f"classes, give --source {storage.join(source, top)}",
            )
    check_classes(source, classes)


def file_sample(item: Mapping[str, Any]) -> Sample:
    sample = Sample(0, item["key"], item["label"], item["split"], None)
    try:
        return sample._replace(image=storage.read_bytes(item["url"]))
    except UserError as error:
        # A store that cannot be reached says nothing of the photograph.
        if error.reason != "no-access":
            raise
        return sample._replace(reason="cannot-read", message=f"cannot read it: {one_line(error)}")
    # Every filesystem has errors of its own, and what is wrong with one file must not end the job.
    except Exception as error:
        reason = "not-found" if isinstance(error, FileNotFoundError) else "cannot-read"
        return sample._replace(reason=reason, message=f"cannot read it: {one_line(error)}")
