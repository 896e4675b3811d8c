"""Sources that are tars in the WebDataset layout."""

import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from leafnet.core import storage
from leafnet.core.storage import File
from leafnet.preparation.samples import (
    IMAGE_SUFFIXES,
    ITEM_SCHEMA,
    Listing,
    Sample,
    check_classes,
    damaged,
    fingerprint,
    label_text,
    make_sample,
    settle_splits,
    split_of_name,
)


def look_at_tars(source: str, root: str, tars: list[tuple[str, File]]) -> Listing:
    items: list[dict[str, Any]] = [
        {
            "key": name,
            "url": file.url,
            "part": 0,
            "size": file.size,
            "examples": None,
            "label": None,
            "split": split_of_name(name),
        }
        for name, file in tars
    ]
    has_splits = settle_splits(source, items)
    if has_splits and not any(item["split"] == "train" for item in items):
        check_classes(source, {item["split"]: set() for item in items})
    beside = {posixpath.dirname(file.url) for _, file in tars} | {root}
    lists = [storage.join(folder, "classes.txt") for folder in sorted(beside)]
    names: tuple[str, ...] = ()
    for url in filter(storage.exists, lists):
        lines = storage.read_bytes(url).decode("utf-8", "replace").splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
    return Listing(
        source=source,
        layout="tars",
        items=pa.Table.from_pylist(items, ITEM_SCHEMA),
        has_splits=has_splits,
        label_names=names,
        notes=(),
        fingerprint=fingerprint(tars),
    )


def tar_samples(item: Mapping[str, Any], names: Sequence[str]) -> Iterator[Sample]:
    row, seen = 0, set()
    try:
        with (
            storage.open_file(item["url"], stream=True) as opened,
            tarfile.open(fileobj=opened, mode="r|*") as tar,
        ):
            for stem, parts in _tar_groups(tar):
                sample = _tar_sample(row, stem, parts, item, names)
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


def _tar_groups(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Name and files, by suffix, of each sample: consecutive members alike up to the first dot."""
    current, parts = None, dict[str, bytes]()
    for member in tar:
        folder, name = posixpath.split(member.name)
        if not member.isfile() or name.startswith("."):
            continue
        stem, _, suffix = name.partition(".")
        stem = posixpath.join(folder, stem).removeprefix("./")
        if current is not None and stem != current:
            yield current, parts
            parts = {}
        current = stem
        opened = tar.extractfile(member)
        if opened is not None and (f".{suffix}".lower() in IMAGE_SUFFIXES or suffix == "cls"):
            parts[suffix.lower()] = opened.read()
    if current is not None:
        yield current, parts


def _tar_sample(
    row: int, stem: str, parts: dict[str, bytes], item: Mapping[str, Any], names: Sequence[str]
) -> Sample:
    suffix = next((suffix for suffix in parts if suffix != "cls"), None)
    key = f"{item['key']}/{stem}" + (f".{suffix}" if suffix else "")
    text = parts.get("cls", b"").decode("utf-8", "replace").strip()
    label = label_text(int(text) if re.fullmatch(r"-?\d+", text) else text, names)
    image = parts[suffix] if suffix else None
    return make_sample(row, key, label, item["split"], image, text)
