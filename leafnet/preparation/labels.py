"""Sources that are photographs and a table of labels beside them."""

import posixpath
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data.listing import Found
from leafnet.data.tables import SUFFIXES, columns, read_table
from leafnet.preparation.samples import (
    ITEM_SCHEMA,
    Listing,
    fingerprint,
    label_text,
    settle_splits,
    split_of_name,
    split_of_value,
)

FILE_COLUMNS = (
    *("file_name", "filename", "file", "image", "image_id", "image_name", "path", "image_path"),
    *("img", "name", "id"),
)
LABEL_COLUMNS = (
    *("label", "labels", "class", "class_name", "category", "disease", "species", "target"),
)


class _Table(NamedTuple):
    file: Found
    rows: list[dict[str, Any]]
    name: str  # column of the photograph
    label: str  # column


def look_at_labels(
    source: str, photos: Sequence[Found], files: Sequence[Found], *, metadata: bool
) -> Listing | None:
    """The photographs with the labels that tables beside them give; None: there is no such table.

    Args:
        source: of all of them.
        photos: the photographs.
        files: all files.
        metadata: only `metadata.csv` and `metadata.jsonl`, as the `datasets` library reads them,
            which say more than folders; else every table, for where there are no class folders.

    Raises:
        UserError: the tables contradict each other, or name photographs in two ways.
    """
    tables = _tables(files, metadata=metadata)
    if not tables:
        return None
    by_name, missing = _Names(photos), dict[str, dict[str, Any]]()
    labels: dict[str, str | None] = {}
    splits: dict[str, str | None] = {}
    for table in tables:
        folder = posixpath.dirname(table.file.name)
        for row in table.rows:
            told = str(row.get(table.name) or "")
            name = by_name.find(folder, told)
            label = _label(table, row)
            if name is None:
                missing.setdefault(posixpath.join(folder, told), {"label": label})
            elif labels.setdefault(name, label) != label:
                raise UserError(
                    "two-labels", f"{name} has two labels in the tables of {source}: "
                    f"{labels[name]} and {label}",
                )  # fmt: skip
            else:
                splits[name] = _split(table, row, name, several=len(tables) > 1)
    if not labels:
        raise UserError(
            "no-photograph-named",
            f"{tables[0].file.url} names no photograph of {source}: its column {tables[0].name} "
            f"begins with {next(iter(missing), '')!r}, and there is {photos[0].name}",
        )
    items = [
        _item(photo.name, photo.url, photo.size or 0, labels.get(photo.name), splits)
        for photo in photos
    ]
    # Told as what cannot be read, with their names.
    items += [
        _item(name, storage.join(source, name), 0, entry["label"], splits)
        for name, entry in missing.items()
        if entry["label"] is not None
    ]
    labelled = [item for item in items if item["label"] is not None]
    has_splits = settle_splits(source, labelled)
    classes: dict[str, set[str]] = {}
    for item in labelled:
        classes.setdefault(item["split"] or "train", set()).add(item["label"])
    read = ", ".join(table.file.name for table in tables[:3])
    notes = [f"labels from {read}: {len(labels):,} of {len(photos):,} photographs"]
    return Listing(
        source=source,
        layout="folders",
        items=pa.Table.from_pylist(sorted(items, key=lambda item: item["key"]), ITEM_SCHEMA),
        has_splits=has_splits,
        label_names=(),
        notes=tuple(notes),
        fingerprint=fingerprint([*photos, *(table.file for table in tables)]),
        classes=classes,
        tables=tuple(table.file.name for table in tables),
    )


def _tables(files: Sequence[Found], *, metadata: bool) -> list[_Table]:
    found = []
    for file in files:
        name = posixpath.basename(file.name).lower()
        if not name.endswith(SUFFIXES) or "submission" in name:
            continue
        if metadata and name.rpartition(".")[0] != "metadata":
            continue
        try:
            rows = read_table(file.url, storage.read_bytes(file.url))
        except UserError:
            if metadata:
                raise
            continue  # some other document
        there = columns(rows)
        image = next((column for column in FILE_COLUMNS if column in there), None)
        label = next((column for column in LABEL_COLUMNS if column in there), None)
        if image and label and (not metadata or image == "file_name"):
            found.append(_Table(file, rows, image, label))
    return found


class _Names:
    """Photographs by every name that a table may give them."""

    def __init__(self, photos: Sequence[Found]) -> None:
        self._names = {photo.name for photo in photos}
        self._short: dict[str, str | None] = {}
        for name in sorted(self._names):
            last = posixpath.basename(name)
            for short in {last, posixpath.splitext(last)[0]}:
                # Two photographs of one name: it names neither.
                self._short[short] = None if short in self._short else name

    def find(self, folder: str, told: str) -> str | None:
        below = posixpath.normpath(posixpath.join(folder, told))
        if below in self._names:
            return below
        return self._short.get(posixpath.basename(told)) if told else None


def _label(table: _Table, row: dict[str, Any]) -> str | None:
    value = row.get(table.label)
    if isinstance(value, list | dict | float):
        raise UserError(
            "label-type",
            f"the column {table.label} of {table.file.url} holds {value!r}; a photograph has one "
            "class, a text or a whole number",
        )
    return label_text(value, ())


def _split(table: _Table, row: dict[str, Any], name: str, *, several: bool) -> str | None:
    if row.get("split"):
        split = split_of_value(str(row["split"]))
        if split is None:
            raise UserError(
                "unknown-split",
                f"the column split of {table.file.url} says {row['split']!r}; expected train, "
                "valid or test",
            )
        return split
    of_table = split_of_name(posixpath.basename(table.file.name)) if several else None
    return split_of_name(posixpath.dirname(name)) or of_table


def _item(
    name: str, url: str, size: int, label: str | None, splits: dict[str, str | None]
) -> dict[str, Any]:
    return {
        "key": name,
        "url": url,
        "part": 0,
        "size": size,
        "examples": 1,
        "label": label,
        "split": splits.get(name, split_of_name(posixpath.dirname(name))),
    }
