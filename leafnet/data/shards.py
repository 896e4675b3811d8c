"""The data set: Parquet shards of encoded photographs and a small index.

A data set is a folder or prefix with `index.json` and the shards that it names. The index is
written last, after every shard, so a folder without one is an interrupted write and not an empty
data set. Examples are shuffled once, when they are written: any run of rows is a fair sample.
"""

import bisect
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import model_validator

from leafnet.core import storage
from leafnet.core.cache import LocalCache, read
from leafnet.core.documents import ClassNames, Count, Document, FileName, Sha256, parse
from leafnet.core.errors import UserError
from leafnet.core.settings import DataSettings

SPLITS = ("train", "valid", "test")

INDEX_VERSION = 1
INDEX_NAME = "index.json"
_REMEDY = "prepare the data set again with jobs/prepare.py"
_EXAMPLE = re.compile(rf"(.*?/(?:{'|'.join(SPLITS)})-\d{{5}}\.parquet)#(.*)", re.DOTALL)

DUPLICATES_NAME = "duplicates.parquet"

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # path below the source, unique
        pa.field("image", pa.binary(), nullable=False),  # the original encoded bytes
        pa.field("label", pa.int32(), nullable=False),  # place in the index's class_names
        pa.field("split", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),  # pixels, EXIF orientation applied
        pa.field("height", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),  # of `image`
    ]
)


@dataclass(frozen=True)
class Shard:
    """One Parquet file: its name below the root, its split, and what it must be."""

    name: str
    split: str
    rows: int
    row_groups: tuple[int, ...]  # rows of each row group, in order
    bytes: int
    sha256: str  # of the file


@dataclass(frozen=True)
class ShardIndex:
    """What `index.json` says."""

    root: str
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    counts: dict[str, dict[str, int]]  # split -> class name -> examples
    fingerprint: str  # of class names and shards: equal fingerprints, equal data
    cache: LocalCache | None = None  # where each machine keeps copies of the shards that it reads

    def of_split(self, split: str) -> tuple[Shard, ...]:
        """The shards of `split`, in the order that numbers its examples from 0."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def examples(self, split: str) -> int:
        """How many examples `split` has."""
        return sum(shard.rows for shard in self.of_split(split))


class _Shard(Document):
    name: FileName
    split: Literal["train", "valid", "test"]
    rows: Count
    row_groups: list[Count]
    bytes: Count
    sha256: Sha256

    @model_validator(mode="after")
    def _rows_add_up(self) -> Self:
        if sum(self.row_groups) != self.rows:
            raise ValueError("rows are not the sum of row_groups")
        return self


class _Index(Document):
    class_names: ClassNames
    counts: dict[str, dict[str, Count]]
    fingerprint: Sha256
    shards: list[_Shard]


def write_shard(root: str, name: str, table: pa.Table, *, row_group: int) -> Shard:
    """Write `table` (of `SCHEMA`, one split) as the shard `name` below `root`."""
    table = table.select(SCHEMA.names).cast(SCHEMA)
    sink = io.BytesIO()
    # Photographs are compressed already; a second compression costs time and gains nothing.
    compression = {column: "none" if column == "image" else "zstd" for column in SCHEMA.names}
    pq.write_table(
        table,
        sink,
        row_group_size=row_group,
        compression=compression,
        use_dictionary=["split"],
        write_page_checksum=True,
    )
    data = sink.getvalue()
    storage.write_bytes(storage.join(root, name), data)
    metadata = pq.read_metadata(io.BytesIO(data))
    return Shard(
        name=name,
        split=table.column("split")[0].as_py(),
        rows=table.num_rows,
        row_groups=tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)),
        bytes=len(data),
        sha256=storage.sha256(data),
    )


def write_index(
    root: str,
    *,
    class_names: Sequence[str],
    shards: Sequence[Shard],
    counts: dict[str, dict[str, int]],
    prepared: dict[str, Any],
) -> ShardIndex:
    """Make the shards below `root` a data set. `prepared` says how it came to be, for people."""
    document = {
        "version": INDEX_VERSION,
        "class_names": list(class_names),
        "counts": counts,
        "fingerprint": fingerprint(class_names, shards),
        "shards": [asdict(shard) for shard in shards],
        "prepared": prepared,
    }
    storage.write_json(storage.join(root, INDEX_NAME), document)
    return read_index(root)


def fingerprint(class_names: Sequence[str], shards: Sequence[Shard]) -> str:
    """A sha256 over everything that training can see of a data set."""
    content = [list(class_names), [(shard.split, shard.sha256) for shard in shards]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_index(root: str) -> ShardIndex:
    """The index of the data set at `root`, a folder or URL.

    Raises:
        UserError: there is none, or one that this code does not read.
    """
    root = storage.absolute(root)
    url = storage.join(root, INDEX_NAME)
    try:
        document = storage.read_json(url)
    except FileNotFoundError:
        found = "an interrupted prepare" if storage.exists(root) else "nothing"
        raise UserError(
            "no-data-set", f"{url} does not exist ({found} is there); write it with jobs/prepare.py"
        ) from None
    stored = parse(
        _Index, document, url=url, version=INDEX_VERSION, reason="bad-index", remedy=_REMEDY
    )
    index = ShardIndex(
        root=root,
        class_names=tuple(stored.class_names),
        shards=tuple(
            Shard(**shard.model_dump() | {"row_groups": tuple(shard.row_groups)})
            for shard in stored.shards
        ),
        counts=stored.counts,
        fingerprint=stored.fingerprint,
    )
    if fingerprint(index.class_names, index.shards) != index.fingerprint:
        raise UserError("bad-index", f"{url} was edited: its fingerprint does not match; {_REMEDY}")
    return index


def check_sizes(index: ShardIndex) -> None:
    """Compare the files below the index's root with the index, by name and size.

    Cheap enough for the start of every job; contents are checked as they are read.

    Raises:
        UserError: a shard is missing or has another size.
    """
    found = {file.url: file.size for file in storage.list_files(index.root)}
    for shard in index.shards:
        url = storage.join(index.root, shard.name)
        if url not in found:
            raise UserError("shard-missing", f"{url} is gone; prepare the data set again")
        if found[url] != shard.bytes:
            raise UserError(
                "shard-changed",
                f"{url} has {found[url]:,} bytes, the index says {shard.bytes:,}; it was changed "
                "after preparation: prepare the data set again",
            )


def row_groups(root: str, shard: Shard, *, cache: LocalCache | None = None) -> Iterator[pa.Table]:
    """The row groups of `shard`, in order, from one read of the file, its sha256 checked.

    Args:
        root: of the data set.
        shard: of its index.
        cache: where this machine keeps copies, as `ShardIndex.cache`.

    Raises:
        UserError: the file is gone or is not the one that was prepared.
    """
    url = storage.join(root, shard.name)
    try:
        data = read(cache, sha256=shard.sha256, fetch=lambda: storage.read_bytes(url))
    except FileNotFoundError:
        raise UserError("shard-missing", f"{url} is gone; prepare the data set again") from None
    if data is None:
        raise UserError(
            "shard-changed",
            f"{url} is not the file that was prepared (its sha256 differs); "
            "prepare the data set again",
        )
    yield from tables(data)


def tables(data: bytes) -> Iterator[pa.Table]:
    """The row groups of the shard whose file is `data`, in order."""
    file = pq.ParquetFile(pa.BufferReader(data))
    for i in range(file.num_row_groups):
        yield file.read_row_group(i)


def read_columns(root: str, shard: Shard, names: Sequence[str]) -> pa.Table:
    """The columns `names` of `shard`, without reading the photographs; sha256 is not checked."""
    with storage.open_file(storage.join(root, shard.name)) as file:
        return pq.read_table(file, columns=list(names))


def unchecked_groups(index: ShardIndex, split: str, names: Sequence[str]) -> Iterator[pa.Table]:
    """The columns `names` of each row group of `split`, read when it is asked for.

    For a look at the first of them: sha256 is not checked.
    """
    for shard in index.of_split(split):
        with storage.open_file(storage.join(index.root, shard.name)) as file:
            parquet = pq.ParquetFile(file)
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group, columns=list(names))


def split_url(image: str) -> tuple[str, str]:
    """The shard and the key of an example as predictions name it; "" where it is a file itself.

    Folders and keys may have `#` in their names as well.

    >>> split_url("/field#7/test-00000.parquet#a/b#1.jpg"), split_url("/field#7/1.jpg")
    (('/field#7/test-00000.parquet', 'a/b#1.jpg'), ('/field#7/1.jpg', ''))
    """
    match = _EXAMPLE.fullmatch(image)
    return (match[1], match[2]) if match else (image, "")


def read_rows(root: str, shard: Shard, rows: Sequence[int]) -> pa.Table:
    """Some `rows` of `shard`, all columns, in the order that is given.

    Only the row groups that they are in are read. Each photograph is checked by its own sha256.

    Raises:
        UserError: the file is gone, or a photograph is not the one that was prepared.
    """
    starts = [0, *itertools.accumulate(shard.row_groups)]
    groups = sorted({bisect.bisect_right(starts, row) - 1 for row in rows})
    url = storage.join(root, shard.name)
    try:
        with storage.open_file(url) as file, pq.ParquetFile(file) as parquet:
            table = parquet.read_row_groups(groups)
    except FileNotFoundError:
        raise UserError("shard-missing", f"{url} is gone; prepare the data set again") from None
    found = [row for group in groups for row in range(starts[group], starts[group + 1])]
    place = {row: i for i, row in enumerate(found)}
    table = table.take([place[row] for row in rows])
    for row in table.select(["key", "image", "sha256"]).to_pylist():
        if storage.sha256(row["image"]) != row["sha256"]:
            raise UserError(
                "shard-changed",
                f"{row['key']} in {url} is not the photograph that was prepared (its sha256 "
                "differs); prepare the data set again",
            )
    return table


def prepared(root: str) -> dict[str, Any]:
    """What the index at `root` says about how the data set came to be; {} when nothing."""
    return dict(storage.read_json(storage.join(root, INDEX_NAME)).get("prepared") or {})


def duplicates(root: str) -> list[tuple[str, str]]:
    """Pairs of keys that jobs/prepare.py found to look alike, in the data set or left out of it."""
    try:
        data = storage.read_bytes(storage.join(root, DUPLICATES_NAME))
    except FileNotFoundError:  # a data set that something else wrote
        return []
    table = pq.read_table(pa.BufferReader(data), columns=["key_a", "key_b"])
    return list(zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True))


def split_fingerprint(index: ShardIndex, split: str) -> str:
    """Sha256 over the photographs of `split` and their classes.

    It is the same wherever they lie, in whatever order and shards, and under whatever keys.
    """
    rows = []
    for shard in index.of_split(split):
        table = read_columns(index.root, shard, ["sha256", "label"])
        for digest, label in zip(*(column.to_pylist() for column in table.columns), strict=True):
            rows.append(f"{digest} {index.class_names[label]}\n")
    return hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()


def open_index(root: str, settings: DataSettings) -> ShardIndex:
    """`shards.read_index` with the cache of the settings."""
    cache = None
    if settings.local_cache is not None:
        cache = LocalCache(settings.local_cache, settings.local_cache_gb)
    return replace(read_index(root), cache=cache)
