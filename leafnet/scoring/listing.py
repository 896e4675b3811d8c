"""What there is to score: every photograph under `--images`, by URL and version.

Names, sizes and versions only, no image bytes, and a row for whatever cannot be read as well: it
gets its reason when it is read.
"""

import glob
import posixpath
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data import listing as files_of
from leafnet.data import shards
from leafnet.data.listing import Found, PassedOver
from leafnet.data.shards import Shard
from leafnet.data.tables import SUFFIXES, columns, read_table

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

_TEXTS = (".txt", ".lst")
_LISTS = (*_TEXTS, *SUFFIXES, ".parquet")
_URL_COLUMNS = ("image", "url", "path", "file", "uri", "file_name", "filename")
_CHUNK = 65_536
_INFO_THREADS = 32


@dataclass(frozen=True)
class Listing:
    """The photographs under `images`, each once."""

    images: str
    kind: Kind
    photographs: pa.Table  # of SCHEMA
    notes: tuple[str, ...]  # what a person should know about it
    passed_over: dict[str, int] = field(default_factory=dict)  # kind -> files, or whole folders


def look(images: str) -> Listing:
    """List the photographs at `images`: a folder, prefix, glob, list of URLs or leafnet shards.

    What `data.listing` passes over, in lists too, is counted; any other file is taken for a
    photograph.

    Raises:
        UserError: nothing is there, a list that is none, or a file of another kind.
    """
    images = storage.absolute(images)
    passed = PassedOver()
    if storage.is_file(images):
        return _of_one(images)
    if storage.is_folder(images):
        if _is_index(storage.join(images, shards.INDEX_NAME)):
            return _of_shards(images)
        return _of_files(images, "folder", files_of.walk(images, passed), passed)
    kind: Kind = "glob" if glob.has_magic(images) else "prefix"
    found = _of_files(images, kind, files_of.matching(images, passed), passed)
    if not found.photographs.num_rows:
        told = "".join(f"; {note}" for note in found.notes) or ": nothing is there"
        raise UserError("no-images", f"--images {images}{told}")
    return found


def _of_one(url: str) -> Listing:
    name = posixpath.basename(url)
    if name == shards.INDEX_NAME and _is_index(url):
        return _of_shards(posixpath.dirname(url))
    if name.lower().endswith(_LISTS):
        return _of_list(url)
    if files_of.kind_beside(name) or name.lower().endswith(_ARCHIVES):
        raise UserError(
            "no-images",
            f"--images {url} is no photograph; give a folder, a photograph, a pattern such as "
            f"'in/*.jpg', a data set of jobs/prepare.py, or a list ({', '.join(_LISTS)})",
        )
    return Listing(url, "file", _table([_row(files_of.described(url, name))]), ())


_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def _is_index(url: str) -> bool:
    try:
        document = storage.read_json(url)
    except (FileNotFoundError, NotADirectoryError, UserError):
        return False
    return isinstance(document, dict) and {"shards", "class_names"} <= document.keys()


# Files


def _of_files(images: str, kind: Kind, files: Iterable[Found], passed: PassedOver) -> Listing:
    table = _table(map(_row, files_of.without_beside(files, passed)))
    return Listing(images, kind, table, passed.notes(), dict(passed.counts))


def _row(file: Found) -> dict[str, Any]:
    url = _readable(file.url)
    return {"image": url, "version": file.version, "size": file.size, "row": None}


def _readable(path: str) -> str:
    """`path` as UTF-8, which Parquet demands: other bytes are written as escapes."""
    return path.encode("utf-8", "backslashreplace").decode()


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
    versions: list[str | None] | None = None
    if url.lower().endswith(".parquet"):
        urls, versions = _from_parquet(url)
    elif url.lower().endswith(_TEXTS):
        urls = _from_text(url)
    else:
        urls = _from_table(url)
    # Relative to the list, which may have been written on another machine.
    folder = posixpath.dirname(url)
    urls = [u if "://" in u or u.startswith("/") else storage.join(folder, u) for u in urls]
    # One photograph has one URL, however it is spelled: by it rows are found again.
    urls = [storage.absolute(u) for u in urls]
    first: dict[str, str | None] = {}
    for i, listed in enumerate(urls):
        first.setdefault(listed, versions[i] if versions else None)
    notes = []
    if len(first) < len(urls):
        notes.append(f"{len(urls) - len(first):,} of {len(urls):,} lines are repeated")
    passed = PassedOver()
    shown = _shown(list(first), passed)
    if versions:
        rows: Iterable[Found] = (Found(u, u, None, first[u]) for u in shown)
        table = _table(map(_row, rows))
    else:
        with ThreadPoolExecutor(_INFO_THREADS) as pool:
            table = _table(map(_row, pool.map(lambda u: files_of.described(u, u), shown)))
    return Listing(url, "list", table, (*notes, *passed.notes()), dict(passed.counts))


def _shown(urls: list[str], passed: PassedOver) -> list[str]:
    """`urls` without what a walk over their common folder would pass over."""
    try:
        common = len(posixpath.commonpath([posixpath.dirname(url) for url in urls]))
    except ValueError:  # none, or some with a protocol and others without
        common = 0
    shown = []
    for url in urls:
        parts = url[common:].split("/")
        kinds = (kind for part in parts if (kind := files_of.kind_passed(part)))
        kind = next(kinds, None) or files_of.kind_beside(url)
        if kind is None:
            shown.append(url)
        else:
            passed.counts[kind] += 1
    return shown


def _from_text(url: str) -> list[str]:
    try:
        text = storage.read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("bad-list", f"--images {url} is not UTF-8 text: {error}") from None
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _from_table(url: str) -> list[str]:
    rows = read_table(url, storage.read_bytes(url))
    found = columns(rows)
    # A list of JSON texts, or a CSV of one column without a head.
    if len(found) == 1 and (not found[0] or found[0].endswith(files_of.IMAGE_SUFFIXES)):
        head = [_head(url)] if found[0] else []
        return head + [str(row[found[0]]) for row in rows]
    column = next((name for name in _URL_COLUMNS if name in found), None)
    if column is None:
        raise _no_column(url, found)
    return [str(row[column]).strip() for row in rows if row.get(column)]


def _head(url: str) -> str:
    return storage.read_bytes(url).decode("utf-8-sig").splitlines()[0].strip().strip('"')


def _no_column(url: str, found: list[str]) -> UserError:
    return UserError(
        "bad-list",
        f"--images {url} has the columns {', '.join(found) or 'of nothing'}; expected one of "
        f"{', '.join(_URL_COLUMNS)} with a URL in each row",
    )


def _from_parquet(url: str) -> tuple[list[str], list[str | None] | None]:
    try:
        with storage.open_file(url) as file:
            parquet = pq.ParquetFile(file)
            names = parquet.schema_arrow.names
            column = next((name for name in _URL_COLUMNS if name in names), None)
            if column is None:
                raise _no_column(url, names)
            if pa.types.is_nested(of_type := parquet.schema_arrow.field(column).type):
                raise UserError(
                    "bad-list",
                    f"the column {column} of --images {url} is {of_type}, not URLs; photographs "
                    "inside Parquet become a data set with jobs/prepare.py, which is scored",
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
