"""Reading and decoding photographs, where each failure is a value and not the end of the job."""

import itertools
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data import shards
from leafnet.data.images import ImageError, Photo, decode
from leafnet.data.isolated import DecoderProcess
from leafnet.scoring.rows import Pixels

# Reasons that are of an S3 store as a whole: keys that expired, a server that is away.
_OF_THE_STORE = storage.UNREACHABLE | {"wrong-keys", "no-keys", "clock-skew"}

# A table's binary column holds less than 2 GiB, and no photograph has half of it.
_MAX_IMAGE_BYTES = 512_000_000

# What is known of a photograph before the network has seen it. Rows without a reason have pixels.
PHOTOGRAPH = pa.schema(
    [
        ("place", pa.int64()),  # in the night's list
        ("image", pa.string()),
        ("version", pa.string()),
        ("reason", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("captured_at", pa.timestamp("us")),
        ("latitude", pa.float64()),
        ("longitude", pa.float64()),
    ]
)


# Before the network


class Decoded(NamedTuple):
    """Some photographs, those without a reason decoded."""

    photographs: pa.Table  # of PHOTOGRAPH
    pixels: Pixels  # of the rows without a reason, in their order
    seconds: float  # of a CPU, for reading and decoding


def decode_photographs(
    listed: pa.Table,
    *,
    image_size: int,
    batch_size: int,
    max_pixels: int,
    careful: bool = False,
) -> Iterator[Decoded]:
    """Read and decode the photographs of a listing, in their order.

    Args:
        listed: `listing.SCHEMA` and `place`.
        image_size: pixels.
        batch_size: photographs with pixels in all results but the last.
        max_pixels: of a photograph, see `images.decode`.
        careful: decode in another process, which a photograph may kill.

    Raises:
        UserError: the store that holds them is away, or refuses.
    """
    if not careful:
        yield from _decode_all(decode, listed, image_size, batch_size, max_pixels)
        return
    with DecoderProcess() as process:
        yield from _decode_all(process.decode, listed, image_size, batch_size, max_pixels)


def _decode_all(
    decode: Callable[..., Photo],
    listed: pa.Table,
    image_size: int,
    batch_size: int,
    max_pixels: int,
) -> Iterator[Decoded]:
    rows: list[dict[str, Any]] = []
    stack = np.empty((batch_size, image_size, image_size, 3), np.uint8)
    filled, seconds = 0, 0.0
    for row, data in _read_all(listed):
        began = time.perf_counter()
        photograph: dict[str, Any] = dict.fromkeys(PHOTOGRAPH.names)
        photograph.update(place=row["place"], image=row["image"], version=row["version"])
        try:
            if isinstance(data, ImageError):
                raise data
            photo = decode(data, image_size, max_pixels=max_pixels)
            stack[filled] = photo.pixels
            filled += 1
            photograph.update(
                width=photo.width,
                height=photo.height,
                captured_at=photo.captured_at,
                latitude=photo.latitude,
                longitude=photo.longitude,
            )
        except ImageError as error:
            photograph["reason"] = f"{error.reason}: {error}"
        rows.append(photograph)
        seconds += time.perf_counter() - began
        if filled == batch_size or len(rows) >= 8 * batch_size:
            yield Decoded(pa.Table.from_pylist(rows, PHOTOGRAPH), stack[:filled], seconds)
            rows, filled, seconds = [], 0, 0.0
            stack = np.empty_like(stack)
    if rows:
        yield Decoded(pa.Table.from_pylist(rows, PHOTOGRAPH), stack[:filled], seconds)


def _read_all(listed: pa.Table) -> Iterator[tuple[dict[str, Any], bytes | ImageError]]:
    """Each row with its bytes, or with why there are none."""
    rows = listed.to_pylist()
    if rows and rows[0]["row"] is not None:
        for url, group in itertools.groupby(
            rows, key=lambda row: shards.split_url(row["image"])[0]
        ):
            yield from _read_shard(url, list(group))
    elif all(storage.is_local(row["image"]) for row in rows):
        for row in rows:
            yield row, _read(row)
    else:
        yield from zip(rows, storage.each(_read, rows), strict=True)


def _read(row: dict[str, Any]) -> bytes | ImageError:
    url = row["image"]
    if row["size"] is not None and row["size"] > _MAX_IMAGE_BYTES:
        return _too_many(row["size"])
    try:
        if storage.is_local(url):
            # Opening a pipe would wait for its writer for ever.
            if not stat.S_ISREG(os.stat(url).st_mode):
                return ImageError("not-a-file", "a folder, a pipe or a device, not a file")
            with open(url, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size > _MAX_IMAGE_BYTES:
                    return _too_many(status.st_size)
                # Of the bytes that are judged, which may have come since the listing.
                row["version"] = f"{status.st_mtime_ns}-{status.st_size}"
                return file.read()
        return storage.read_bytes(url)
    # Every filesystem has errors of its own, and what is wrong with one file must not end the job.
    except Exception as error:
        if _ends_the_job(error, url):
            raise
        if isinstance(error, FileNotFoundError):
            if "\\udc" in url:
                return ImageError("bad-name", "its name is not valid UTF-8; rename the file")
            return ImageError("not-found", "it is not there")
        return ImageError("cannot-read", _one_line(error))


def _too_many(size: int) -> ImageError:
    return ImageError("too-many-bytes", f"the file has {size / 1e6:,.0f} MB")


def _read_shard(
    url: str, rows: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], bytes | ImageError]]:
    """The rows of one shard, from one read of it, its sha256 checked against the listing."""
    waiting = deque(sorted(rows, key=lambda row: row["row"]))
    try:
        data = storage.read_bytes(url)
        digest = storage.sha256(data)
        if digest[:16] != rows[0]["version"]:
            raise OSError("the shard was changed since it was listed")
        first = 0
        for table in shards.tables(data):
            while waiting and waiting[0]["row"] < first + table.num_rows:
                row = waiting.popleft()
                yield row, table["image"][row["row"] - first].as_py()
            first += table.num_rows
    except (OSError, pa.ArrowException, UserError) as error:
        if _ends_the_job(error, url):
            raise
        for row in waiting:
            yield row, ImageError("cannot-read", f"the shard: {_one_line(error)}")


def _ends_the_job(error: Exception, url: str) -> bool:
    """True when the store of `url` is away, and not this one file.

    As rows that would be a night of photographs that could not be read, each after a minute of
    trying; an error ends the job, and the same command goes on later.
    """
    if not isinstance(error, UserError) or error.reason not in _OF_THE_STORE:
        return False
    if not url.startswith(("s3://", "s3a://")):  # of https:// URLs each may have another host
        return False
    try:
        storage.exists(f"{url}.another")
    except UserError as of_another:
        return of_another.reason in _OF_THE_STORE
    return False


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
