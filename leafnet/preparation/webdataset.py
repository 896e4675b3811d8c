"""Sources that are tars: in the WebDataset layout, or of class folders."""

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa

from leafnet.core import storage
from leafnet.data.listing import IMAGE_SUFFIXES, Found, kind_passed
from leafnet.preparation.folders import find_levels
from leafnet.preparation.samples import (
    ITEM_SCHEMA,
    Listing,
    Sample,
    class_name,
    damaged,
    fingerprint,
    label_text,
    make_sample,
    settle_splits,
    split_of_name,
    split_of_value,
)

_FIRST = 64  # members of each tar that tell whether labels are files in it

_JSON_LABELS = ("label", "cls", "class", "class_name", "category", "labels")


def look_at_tars(source: str, root: str, tars: Sequence[Found]) -> Listing:
    """What the names of tars tell, and those of their members where class folders are in them."""
    items: list[dict[str, Any]] = [
        {
            "key": file.name,
            "url": file.url,
            "part": 0,
            "size": file.size or 0,
            "examples": None,
            "label": None,
            "split": split_of_name(file.name),
        }
        for file in tars
    ]
    has_splits = settle_splits(source, items)
    classes = None
    if not any(_has_labels(file.url) for file in tars):
        classes = _look_at_folders_inside(source, items)
        has_splits = bool(classes.keys() - {"train"})
    beside = {posixpath.dirname(file.url) for file in tars} | {root}
    lists = [storage.join(folder, "classes.txt") for folder in sorted(beside)]
    names: tuple[str, ...] = ()
    lists = list(filter(storage.exists, lists))
    for url in lists:
        lines = storage.read_bytes(url).decode("utf-8", "replace").splitlines()
        names = tuple(name for line in lines if (name := class_name(line)))
    return Listing(
        source=source,
        layout="tars",
        items=pa.Table.from_pylist(items, ITEM_SCHEMA),
        has_splits=has_splits,
        label_names=names,
        notes=(),
        fingerprint=fingerprint(tars),
        classes=classes,
        tables=tuple(url[len(root) :].lstrip("/") for url in lists),
    )


@contextmanager
def _opened(url: str) -> Iterator[tarfile.TarFile]:
    with (
        storage.open_file(url, stream=True) as opened,
        tarfile.open(fileobj=opened, mode="r|*") as tar,
    ):
        yield tar


def _has_labels(url: str) -> bool:
    """Whether the first members are labels as well as photographs, or no photograph in a folder."""
    photographs = False
    try:
        with _opened(url) as tar:
            for number, member in enumerate(_files(tar)):
                suffix = posixpath.splitext(member.name)[1].lower()
                if suffix in (".cls", ".json"):
                    return True
                photographs |= suffix in IMAGE_SUFFIXES and "/" in _plain(member.name)
                if number == _FIRST:
                    break
    except (tarfile.TarError, EOFError, OSError):
        return True  # told when it is read
    return not photographs


def _look_at_folders_inside(source: str, items: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Set where the class stands in the paths of the tars' members; the classes of each split.

    Reads the tars to their ends, for only their names tell.
    """
    found = []
    for item in items:
        with _opened(item["url"]) as tar:
            names = [_plain(member.name).split("/") for member in _files(tar)]
        found += [
            (name, item["split"])
            for name in names
            if posixpath.splitext(name[-1])[1].lower() in IMAGE_SUFFIXES
        ]
    # One folder around all, as an archive of a folder has it.
    around = 0
    while len({n[around] for n, _ in found}) == 1 and all(len(n) > around + 2 for n, _ in found):
        around += 1
    levels = find_levels(source, ["/".join(name[around:]) for name, _ in found])
    classes: dict[str, set[str]] = {}
    for name, split in found:
        told = split or levels.splits.get(name[around]) or "train"
        classes.setdefault(told, set()).add(class_name(name[around + levels.depth]) or "")
    for item in items:
        item["part"] = around + levels.depth + 1
    return classes


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Its files, without what systems leave in archives."""
    for member in tar:
        if member.isfile() and not any(map(kind_passed, _plain(member.name).split("/"))):
            yield member


def tar_samples(item: Mapping[str, Any], names: Sequence[str]) -> Iterator[Sample]:
    row, seen = 0, set()
    try:
        with _opened(item["url"]) as tar:
            for group in _tar_groups(tar):
                for parts in _samples_of(group):
                    sample = _tar_sample(row, parts, item, names)
                    if sample.key in seen:
                        sample = sample._replace(
                            key=f"{sample.key}#{row}",
                            image=None,
                            reason="duplicate-key",
                            message="the tar has an earlier sample of this name",
                        )
                    seen.add(sample.key)
                    yield sample
                    row += 1
            # A tar ends with blocks of zeros. `tarfile` takes one that was cut off between two
            # members for whole: it then has read nothing past the last member.
            if tar.fileobj is None or tar.fileobj.tell() <= tar.offset:
                raise EOFError("the end-of-archive mark is missing")
    except (tarfile.TarError, EOFError, OSError) as error:
        yield damaged(row, item["key"], item["split"], "damaged-tar", "tar", error)


class _Part(NamedTuple):
    """A member of a sample."""

    stem: str  # up to the first dot
    suffix: str  # after it, such as `jpg` or `rgb.png`
    data: bytes

    @property
    def kind(self) -> str:
        """The last extension, which decides, as in the webdataset library."""
        return self.suffix.rpartition(".")[2]

    @property
    def is_image(self) -> bool:
        return f".{self.kind}" in IMAGE_SUFFIXES


def _tar_groups(tar: tarfile.TarFile) -> Iterator[list[_Part]]:
    """The files of each sample: consecutive members alike up to the first dot of their names."""
    current, parts = None, list[_Part]()
    for member in _files(tar):
        folder, name = posixpath.split(member.name)
        stem, _, suffix = name.partition(".")
        stem = _plain(posixpath.join(folder, stem))
        if current is not None and stem != current:
            yield parts
            parts = []
        current = stem
        part = _Part(stem, suffix.lower(), b"")
        opened = tar.extractfile(member)
        if opened is not None and (part.is_image or part.kind in ("cls", "json")):
            parts.append(part._replace(data=opened.read()))
        elif not parts:
            parts = [part]
    if current is not None:
        yield parts


def _samples_of(group: list[_Part]) -> list[list[_Part]]:
    """Several photographs with dots in their names, each with a label of its name, are several."""
    pieces: dict[str, list[_Part]] = {}
    for part in group:
        pieces.setdefault(part.suffix.rpartition(".")[0], []).append(part)
    whole = [p for p in pieces.values() if any(part.is_image for part in p)]
    labelled = all(any(not part.is_image for part in piece) for piece in whole)
    return list(pieces.values()) if len(whole) > 1 and labelled else [group]


def _tar_sample(
    row: int, parts: list[_Part], item: Mapping[str, Any], names: Sequence[str]
) -> Sample:
    photographs = [part for part in parts if part.is_image]
    # The shortest suffix: `seg.png` beside `jpg` is a mask of it.
    photographs.sort(key=lambda part: part.suffix.count("."))
    stem = parts[0].stem
    image = photographs[0] if photographs else None
    key = f"{item['key']}/{stem}" + (f".{image.suffix}" if image else "")
    label, given, split = _label(parts, names), _given(parts), item["split"]
    if item["part"] and label is None:
        folders = stem.split("/")[:-1]
        depth = item["part"] - 1
        label = class_name(folders[depth]) if depth < len(folders) else None
        told = split_of_value(folders[depth - 1]) if 0 < depth < len(folders) else None
        split = split or told
    several = [p for p in photographs if p.suffix.count(".") == photographs[0].suffix.count(".")]
    if len(several) > 1:
        message = f"the sample has several photographs ({several[0].suffix}, {several[1].suffix})"
        return Sample(row, key, label, split, None, "several-images", message)
    return make_sample(row, key, label, split, image.data if image else None, given)


def _given(parts: list[_Part]) -> str:
    return next((p.data.decode("utf-8", "replace").strip() for p in parts if p.kind == "cls"), "")


def _label(parts: list[_Part], names: Sequence[str]) -> str | None:
    """By the `.cls`, or else the `.json` of a sample."""
    text = _given(parts)
    if text:
        return label_text(int(text) if re.fullmatch(r"-?\d+", text) else text, names)
    for part in parts:
        if part.kind == "json":
            try:
                value = json.loads(part.data)
            except ValueError:
                continue
            if isinstance(value, dict):
                value = next((value[name] for name in _JSON_LABELS if name in value), None)
            if isinstance(value, str | int):
                return label_text(value, names)
    return None
