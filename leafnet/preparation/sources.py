"""Where photographs come from: how a source is laid out, and reading the examples in it.

A source is looked at before any machine is taken: names, sizes and labels, no image bytes. What is
read later comes as samples, and what is wrong with a single photograph is a value, not an error.
"""

import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.core.storage import File
from leafnet.data.images import SIDECAR_SUFFIXES
from leafnet.preparation.folders import file_sample, look_at_folders
from leafnet.preparation.parquet import look_at_parquet, parquet_samples
from leafnet.preparation.samples import IMAGE_SUFFIXES, NO_CLASS, Layout, Listing, Sample
from leafnet.preparation.webdataset import look_at_tars, tar_samples

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def look(source: str) -> Listing:
    """Find out how `source`, a path or URL, is laid out, and list it.

    Raises:
        UserError: nothing is there, or nothing that a classifier can be trained on.
    """
    source = storage.absolute(source)
    if not storage.exists(source):
        raise UserError("no-such-folder", f"--source {source} does not exist")
    root = source if storage.is_folder(source) else posixpath.dirname(source)
    files = _list(source, root)
    kinds: dict[str, list[tuple[str, File]]] = {"Parquet files": [], "tars": [], "photographs": []}
    skipped: Counter[str] = Counter()
    for name, file in files:
        suffix = _suffix(name)
        if suffix == ".parquet":
            kinds["Parquet files"].append((name, file))
        elif name.lower().endswith(_TAR_SUFFIXES):
            kinds["tars"].append((name, file))
        # Only class folders make a photograph of a file with any other name.
        elif suffix in IMAGE_SUFFIXES or ("/" in name and suffix not in SIDECAR_SUFFIXES):
            kinds["photographs"].append((name, file))
        else:
            skipped[suffix] += 1
    others = f"{sum(skipped.values()):,} other files ({_listed(skipped)})"
    found = {kind: entries for kind, entries in kinds.items() if entries}
    if not found:
        raise UserError(
            "empty-folder",
            f"--source {source} holds no photographs, "
            + (f"only {others}" if skipped else "not a single file"),
        )
    if len(found) > 1:
        told = ", ".join(f"{len(v):,} {kind} ({v[0][0]}, …)" for kind, v in found.items())
        raise UserError(
            "mixed-layouts", f"--source {source} holds {told}; give a folder with one kind of them"
        )
    if kinds["Parquet files"]:
        return look_at_parquet(source, kinds["Parquet files"])
    if kinds["tars"]:
        return look_at_tars(source, root, kinds["tars"])
    notes = [f"skipped {others}"] if skipped else []
    return look_at_folders(source, kinds["photographs"], files, notes)


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


def _list(source: str, root: str) -> list[tuple[str, File]]:
    """Name below `root` and file, for each file of `source`, by name."""
    files = []
    for file in storage.list_files(source):
        name = file.url[len(root.rstrip("/")) + 1 :]
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                "bad-name", f"the name of {file.url!r} is not valid UTF-8; rename the file"
            ) from None
        if name.split("/")[0] not in NO_CLASS:
            files.append((name, file))
    return sorted(files)


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _listed(suffixes: Counter[str]) -> str:
    return ", ".join(
        f"{count:,} {suffix or 'without suffix'}" for suffix, count in suffixes.most_common(5)
    )
