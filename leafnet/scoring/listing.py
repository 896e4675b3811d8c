"""What there is to score: every photograph under `--images`, by URL and version.

Names, sizes and versions only, no image bytes, and a row for whatever cannot be read as well: it
gets its reason when it is read.
"""

import glob
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data import shards
from leafnet.data.images import SIDECAR_SUFFIXES
from leafnet.data.shards import Shard

Kind = Literal["folder", "prefix", "glob", "list", "shards", "file"]

SCHEMA = pa.schema(
    [
        # URL or absolute path; of an example in a shard, the shard's and `#` and its key.
        pa.field("image", pa.string(), nullable=False),
        # Changes when the content does: etag, or time of change and size. Null: nothing was found.
        pa.field("version", pa.string()),
        pa.field("size", pa.int64()),  # bytes; null: not known
        pa.field("row", pa.int32()),  # place in its shard; null: a file of its own
    ]
)

_LISTS = (".txt", ".lst", ".parquet")
_URL_COLUMNS = ("image", "url", "path", "file", "uri")
_CHUNK = 65_536
_INFO_THREADS = 32
_MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Listing:
    """The photographs under `images`, each once."""

    images: str
    kind: Kind
    photographs: pa.Table  # of SCHEMA
    notes: tuple[str, ...]  # what a person should know about it


def look(images: str) -> Listing:
    """List the photographs at `images`: a folder, prefix, glob, list of URLs or leafnet shards.

    In folders, hidden files and what people and tools leave beside photographs (.txt, .json, …)
    are passed over and told; any other file is taken for a photograph.

    Raises:
        UserError: nothing is there, or a list that is none.
    """
    images = storage.absolute(images)
    fs, path = storage.filesystem(images)
    if storage.is_file(images):
        name = posixpath.basename(path)
        if name == shards.INDEX_NAME and _is_index(images):
            return _of_shards(posixpath.dirname(images))
        if posixpath.splitext(name)[1].lower() in _LISTS:
            return _of_list(images)
        return Listing(images, "file", _table([_described(images)]), ())
    if storage.is_folder(images):
        if _is_index(storage.join(images, shards.INDEX_NAME)):
            return _of_shards(images)
        return _of_files(images, "folder", _in_folder(images))
    if glob.has_magic(path):
        # `**` brings folders too, and fsspec's glob returns only what exists.
        found = _of_infos(images, fs.glob(path, detail=True))
        return _not_empty(_of_files(images, "glob", found))
    return _not_empty(_of_files(images, "prefix", _with_prefix(images)))


def version(info: Mapping[str, Any]) -> str:
    """What changes when the content of a file does, from fsspec's `info` of it.

    >>> version({"ETag": '"9a0364"', "size": 3}), version({"mtime": 12.5, "size": 3})
    ('9a0364', '12.5-3')
    """
    for key in ("ETag", "etag", "e_tag", "md5Hash", "content_md5"):
        if info.get(key):
            return str(info[key]).strip('"')
    times = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")
    time = next((info[key] for key in times if info.get(key)), "")
    # One listing of a filesystem gives seconds and another a date.
    time = time.timestamp() if isinstance(time, datetime) else time
    return f"{time}-{info.get('size')}"


def _not_empty(found: Listing) -> Listing:
    if not found.photographs.num_rows:
        raise UserError("no-images", f"--images {found.images}: nothing is there")
    return found


def _is_index(url: str) -> bool:
    try:
        document = storage.read_json(url)
    except (FileNotFoundError, NotADirectoryError, UserError):
        return False
    return isinstance(document, dict) and {"shards", "class_names"} <= document.keys()


# Files


def _of_files(images: str, kind: Kind, found: Iterable[dict[str, Any]]) -> Listing:
    skipped: Counter[str] = Counter()

    def photographs() -> Iterator[dict[str, Any]]:
        for row in found:
            suffix = posixpath.splitext(row["image"])[1].lower()
            if suffix in SIDECAR_SUFFIXES:
                skipped[suffix] += 1
            else:
                yield row

    table = _table(photographs())
    notes = []
    if skipped:
        told = ", ".join(f"{count:,} {suffix}" for suffix, count in skipped.most_common(5))
        notes.append(f"passed over {skipped.total():,} other files ({told})")
    return Listing(images, kind, table, tuple(notes))


def _in_folder(folder: str) -> Iterator[dict[str, Any]]:
    """Every file below `folder`, a directory at a time, so that memory holds one of them."""
    if storage.is_local(folder):
        yield from _in_local_folder(folder)
        return
    fs, path = storage.filesystem(folder)
    below = len(path.rstrip("/")) + 1
    for _, _, files in fs.walk(path, detail=True):
        for info in files.values():
            name = info["name"][below:]
            if name and _is_shown(name):
                yield _row(storage.join(folder, name), info)


def _in_local_folder(folder: str) -> Iterator[dict[str, Any]]:
    # Not fsspec: its answer for a million files takes a gigabyte.
    folders = [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if not _is_shown(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    yield _local_row(entry.path)


def _with_prefix(prefix: str) -> Iterator[dict[str, Any]]:
    fs, path = storage.filesystem(prefix)
    if storage.is_local(prefix):
        found = fs.glob(glob.escape(path) + "*", detail=True)
    else:
        found = fs.glob(path + "*", detail=True)
    yield from _of_infos(prefix, found)


def _of_infos(asked: str, found: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The files of a glob's answer, and those below the folders in it.

    Hidden ones are among them where the pattern names them, as in a shell.
    """
    protocol = "" if storage.is_local(asked) else asked.split("://", 1)[0] + "://"
    pattern = asked.removeprefix(protocol).lstrip("/")
    fixed = len(_MAGIC.split(pattern, 1)[0].rpartition("/")[0])
    if _is_shown(pattern[fixed:].lstrip("/")):
        found = {
            name: info
            for name, info in found.items()
            if _is_shown(name.lstrip("/")[fixed:].strip("/"))
        }
    folders = [name for name, info in found.items() if info.get("type") == "directory"]
    listed = set()
    for name, info in found.items():
        if info.get("type") != "directory":
            listed.add(name)
            yield _local_row(name) if not protocol else _row(protocol + name.lstrip("/"), info)
    for folder in folders:
        for row in _in_folder(protocol + (folder.lstrip("/") if protocol else folder)):
            name = row["image"].removeprefix(protocol)
            if name not in listed and "/" + name not in listed:
                listed.add(name)
                yield row


def _is_shown(name: str) -> bool:
    """Hidden files and what is being written are none of ours, as in `storage.list_files`."""
    return not name.endswith((".tmp", "/")) and not any(
        part.startswith(".") for part in name.split("/")
    )


def _row(url: str, info: Mapping[str, Any]) -> dict[str, Any]:
    size = info.get("size")
    return {
        "image": url,
        "version": version(info),
        "size": None if size is None else int(size),
        "row": None,
    }


def _local_row(path: str) -> dict[str, Any]:
    """A row for the path, without a version where no regular file can be reached at it."""
    row: dict[str, Any] = {"image": _readable(path), "version": None, "size": None, "row": None}
    try:
        found = os.stat(path)
    except OSError:  # a link to nowhere, or gone already
        return row
    if stat.S_ISREG(found.st_mode):
        row |= {"version": f"{found.st_mtime_ns}-{found.st_size}", "size": found.st_size}
    return row


def _readable(path: str) -> str:
    """`path` as UTF-8, which Parquet demands: other bytes are written as escapes."""
    return path.encode("utf-8", "backslashreplace").decode()


def _described(url: str) -> dict[str, Any]:
    """The row of one URL, asked for by itself."""
    if storage.is_local(url):
        return _local_row(storage.absolute(url))
    try:
        fs, path = storage.filesystem(url)
        return _row(url, fs.info(path))
    # Every filesystem has errors of its own. Without a version the photograph is tried, and its
    # row then says why it could not be read.
    except Exception:
        return {"image": url, "version": None, "size": None, "row": None}


def _table(rows: Iterable[dict[str, Any]]) -> pa.Table:
    """`rows` as a table of SCHEMA, converted as they come: Python's dicts take ten times more."""
    batches, waiting = [], []
    for row in rows:
        waiting.append(row)
        if len(waiting) == _CHUNK:
            batches.append(pa.RecordBatch.from_pylist(waiting, SCHEMA))
            waiting = []
    batches.append(pa.RecordBatch.from_pylist(waiting, SCHEMA))
    return pa.Table.from_batches(batches, SCHEMA)


# Lists


def _of_list(url: str) -> Listing:
    notes = []
    if url.lower().endswith(".parquet"):
        urls, versions = _from_parquet(url)
    else:
        urls, versions = _from_text(url), None
    # Relative to the list, which may have been written on another machine.
    folder = posixpath.dirname(url)
    urls = [u if "://" in u or u.startswith("/") else storage.join(folder, u) for u in urls]
    # One photograph has one URL, however it is spelled: by it rows are found again.
    urls = [storage.absolute(u) for u in urls]
    first: dict[str, str | None] = {}
    for i, listed in enumerate(urls):
        first.setdefault(listed, versions[i] if versions else None)
    if len(first) < len(urls):
        notes.append(f"{len(urls) - len(first):,} of {len(urls):,} lines are repeated")
    if versions:
        rows: Iterable[dict[str, Any]] = (
            {"image": u, "version": v, "size": None, "row": None} for u, v in first.items()
        )
        return Listing(url, "list", _table(rows), tuple(notes))
    with ThreadPoolExecutor(_INFO_THREADS) as pool:
        return Listing(url, "list", _table(pool.map(_described, first)), tuple(notes))


def _from_text(url: str) -> list[str]:
    try:
        text = storage.read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("bad-list", f"--images {url} is not UTF-8 text: {error}") from None
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _from_parquet(url: str) -> tuple[list[str], list[str | None] | None]:
    try:
        with storage.open_file(url) as file:
            parquet = pq.ParquetFile(file)
            names = parquet.schema_arrow.names
            column = next((name for name in _URL_COLUMNS if name in names), None)
            if column is None:
                raise UserError(
                    "bad-list",
                    f"--images {url} has the columns {', '.join(names)}; expected one of "
                    f"{', '.join(_URL_COLUMNS)} with a URL in each row",
                )
            wanted = [column] + (["version"] if "version" in names else [])
            table = parquet.read(columns=wanted)
    except pa.ArrowException as error:
        raise UserError("bad-list", f"--images {url} is not a Parquet file: {error}") from None
    urls = table[column].cast(pa.string())
    if urls.null_count:
        table, urls = table.filter(pc.is_valid(urls)), urls.drop_null()
    versions = None
    if "version" in table.column_names:
        versions = table["version"].cast(pa.string()).to_pylist()
    return urls.to_pylist(), versions


# Shards


def _of_shards(root: str) -> Listing:
    index = shards.read_index(root)
    tables = storage.each(lambda shard: _of_shard(index.root, shard), index.shards)
    return Listing(root, "shards", pa.concat_tables(tables), ())


def _of_shard(root: str, shard: Shard) -> pa.Table:
    url = storage.join(root, shard.name)
    try:
        keys = shards.read_columns(root, shard, ["key"])["key"].combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            "shard-missing", f"cannot read {url} ({error}); prepare the data set again"
        ) from None
    rows = len(keys)
    return pa.table(
        {
            "image": pc.binary_join_element_wise(url, keys.cast(pa.string()), "#"),
            "version": pa.array([shard.sha256[:16]] * rows),
            "size": pa.nulls(rows, pa.int64()),
            "row": pa.array(range(rows), pa.int32()),
        },
    ).cast(SCHEMA)
