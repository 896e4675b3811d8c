"""Where photographs come from: how a source is laid out, and reading the examples in it.

A source is looked at before any machine is taken: names, sizes and labels, no image bytes. What is
read later comes as samples, and what is wrong with a single photograph is a value, not an error.
"""

import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data import listing
from leafnet.data.listing import IMAGE_SUFFIXES, Found, PassedOver, kind_beside
from leafnet.preparation.folders import file_sample, look_at_folders
from leafnet.preparation.labels import look_at_labels
from leafnet.preparation.parquet import look_at_parquet, parquet_samples
from leafnet.preparation.samples import Layout, Listing, Sample, check_classes
from leafnet.preparation.webdataset import look_at_tars, tar_samples

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def look(source: str, *, evaluation: bool = False) -> Listing:
    """Find out how `source`, a path or URL, is laid out, and list it.

    `evaluation`: nothing is to be trained on it.

    Raises:
        UserError: nothing is there, or nothing that a classifier can be trained on.
    """
    source = storage.absolute(source)
    if not storage.exists(source):
        raise UserError("no-such-folder", f"--source {source} does not exist")
    root = source if storage.is_folder(source) else posixpath.dirname(source)
    passed = PassedOver()
    files = _list(source, passed)
    _refuse_other_libraries(source, files)
    parquet = [file for file in files if listing.suffix(file.name) == ".parquet"]
    tars = [file for file in files if file.name.lower().endswith(_TAR_SUFFIXES)]
    photos = [file for file in files if listing.suffix(file.name) in IMAGE_SUFFIXES]
    if not parquet and not tars:
        # Class folders make a photograph of a file with any other name.
        photos = [f for f in files if _may_be_photograph(f.name)]
    found = None
    if parquet and not tars:
        found = look_at_parquet(source, parquet, photos)
    kinds = {"Parquet files": parquet, "tars": tars, "photographs": photos}
    told = [f"{len(v):,} {kind} ({v[0].name}, …)" for kind, v in kinds.items() if v]
    if found is None and len(told) > 1:
        raise UserError(
            "mixed-layouts",
            f"--source {source} holds {', '.join(told)}; give a folder with one kind of them",
        )
    if not told:
        _nothing(source, files, passed)
    if tars:
        found = look_at_tars(source, root, tars)
    found = found or _look_at_photographs(source, photos, files)
    read = {file.name for kind in kinds.values() for file in kind} | set(found.tables)
    _count_others(files, read, passed)
    notes = (*passed.notes(), *found.notes, *_check(found, evaluation=evaluation))
    return replace(found, notes=notes, passed_over=dict(passed.counts))


def _check(found: Listing, *, evaluation: bool) -> list[str]:
    """Check the classes of a listing as far as they are known; notes."""
    splits = set(found.items["split"].to_pylist())
    # Two of each split for those that are not known.
    classes = found.classes or {split or "train": {"", " "} for split in splits}
    return check_classes(found.source, classes, evaluation=evaluation)


def _nothing(source: str, files: Sequence[Found], passed: PassedOver) -> NoReturn:
    _count_others(files, set(), passed)
    told = "; ".join(passed.notes()) or "not a single file"
    raise UserError("empty-folder", f"--source {source} holds no photographs: {told}")


def _count_others(files: Sequence[Found], read: set[str], passed: PassedOver) -> None:
    for name in (file.name for file in files if file.name not in read):
        passed.counts[kind_beside(name) or listing.suffix(name) or "without suffix"] += 1


def _may_be_photograph(name: str) -> bool:
    return listing.suffix(name) in IMAGE_SUFFIXES or ("/" in name and not kind_beside(name))


def _look_at_photographs(source: str, photos: Sequence[Found], files: Sequence[Found]) -> Listing:
    """By the tables that the `datasets` library reads, else by folders, else by other tables."""
    by_table = look_at_labels(source, photos, files, metadata=True)
    if by_table is not None:
        return by_table
    found = None
    try:
        found = look_at_folders(source, photos, files)
        _check(found, evaluation=False)
        return found
    except UserError:
        other = look_at_labels(source, photos, files, metadata=False) or found
        if other is None:
            raise
        return other


def read_samples(layout: Layout, item: Mapping[str, Any], names: Sequence[str]) -> Iterator[Sample]:
    """The examples of one item of a listing, a row of `Listing.items`, in order.

    A photograph that cannot be read comes with a reason and a message. `names` is the listing's
    `label_names`.
    """
    if layout == "parquet":
        return parquet_samples(item, names)
    if layout == "tars":
        return tar_samples(item, names)
    return iter([file_sample(item)])


def _list(source: str, passed: PassedOver) -> list[Found]:
    """The files of `source`, by name; a `//` in a key of an object store counts once.

    Raises:
        UserError: a name that Parquet cannot hold, or two that are one.
    """
    if storage.is_folder(source):
        found = listing.walk(source, passed)
    else:
        found = iter([listing.described(source, posixpath.basename(source))])
    files: dict[str, Found] = {}
    for file in found:
        name = "/".join(filter(None, file.name.split("/")))
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                "bad-name", f"the name of {file.url!r} is not valid UTF-8; rename the file"
            ) from None
        if file.version is None and storage.is_local(file.url) and os.path.islink(file.url):
            _refuse_broken_link(file)
        if files.setdefault(name, file._replace(name=name)).url != file.url:
            raise UserError(
                "bad-name", f"{file.url} and {files[name].url} differ in // alone; rename one"
            )
    return [files[name] for name in sorted(files)]


def _refuse_broken_link(file: Found) -> None:
    """Refuse a link to nowhere that may be one to a class or a split; a photograph's is a reason.

    Raises:
        UserError: it may be.
    """
    if listing.suffix(file.name) not in IMAGE_SUFFIXES and not kind_beside(file.name):
        raise UserError(
            "broken-link",
            f"the link {file.url} leads to {os.readlink(file.url)}, and nothing is there; mount "
            "what it leads to, correct it, or remove it",
        )


def _refuse_other_libraries(source: str, files: Sequence[Found]) -> None:
    """Refuse what other libraries keep for themselves, with the way to their photographs.

    Raises:
        UserError: it is a folder of `save_to_disk`, or the root of a cache of the hub.
    """
    names = [file.name for file in files]
    last = {posixpath.basename(name) for name in names}
    if last & {"dataset_dict.json", "state.json"} and any(n.endswith(".arrow") for n in last):
        raise UserError(
            "save-to-disk",
            f"--source {source} was written by save_to_disk of the datasets library; write "
            'Parquet: datasets.load_from_disk(FOLDER)["train"].to_parquet("train.parquet")',
        )
    snapshots = sorted({n.split("/")[1] for n in names if n.startswith("snapshots/")})
    if snapshots and any(name.startswith("blobs/") for name in names):
        raise UserError(
            "hub-cache",
            f"--source {source} is a cache of the Hugging Face hub; give the snapshot in it, "
            f"{storage.join(source, 'snapshots', snapshots[-1])}",
        )
