"""Photographs to rows of the output: reading and decoding before the network, the row after it.

A photograph that gives no pixels becomes a row as well, with its reason; nothing here raises for
what is wrong with one of them. B photographs, S image size, C classes, D features.
"""

import itertools
import json
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

import leafnet
from leafnet import shards, storage
from leafnet.apart import Apart
from leafnet.errors import UserError
from leafnet.images import DECODER_VERSION, ImageError, Photo, decode
from leafnet.metrics import softmax
from leafnet.review import Review

Pixels = NDArray[np.uint8]  # [B, S, S, 3]
Array = NDArray[np.float32]

# Reasons that another night may find gone. All others are of the bytes, which do not change
# without the version.
PASSING = ("cannot-read", "not-found", "needs-heif")
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


def schema(class_names: Sequence[str], *, model_id: str = "", run_id: str = "") -> pa.Schema:
    """The columns of the predictions of a model with these classes.

    The schema's metadata names the classes in the order of the logits (`class_names`, JSON), the
    model and the run.
    """
    probabilities = pa.struct([pa.field(name, pa.float32()) for name in class_names])
    return pa.schema(
        [
            pa.field("image", pa.string(), nullable=False),  # URL; in a shard: URL#key
            pa.field("version", pa.string()),  # etag, or time of change and size; null: not found
            pa.field("status", pa.string(), nullable=False),  # ok, review or failed
            pa.field("label", pa.string()),  # class of the highest probability; null: failed
            pa.field("confidence", pa.float32()),  # its probability
            pa.field("probabilities", probabilities),  # a field for each class; null: failed
            pa.field("reason", pa.string()),  # `slug: what is the matter`; null: ok
            pa.field("width", pa.int32()),  # of the original, upright [pixels]
            pa.field("height", pa.int32()),
            pa.field("captured_at", pa.timestamp("us")),  # EXIF: the camera's clock, no time zone
            pa.field("latitude", pa.float64()),  # EXIF, degrees, north positive
            pa.field("longitude", pa.float64()),  # EXIF, degrees, east positive
            pa.field("novelty", pa.float32()),  # distance from the training features
            pa.field("decoder_version", pa.int32(), nullable=False),
            pa.field("model_id", pa.string(), nullable=False),
            pa.field("run_id", pa.string(), nullable=False),
            pa.field("scored_at", pa.timestamp("us", tz="UTC"), nullable=False),
        ],
        metadata={
            "class_names": json.dumps(list(class_names), ensure_ascii=False),
            "model_id": model_id,
            "run_id": run_id,
            "decoder_version": str(DECODER_VERSION),
            "leafnet": leafnet.__version__,
        },
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
    with Apart() as apart:
        yield from _decode_all(apart.decode, listed, image_size, batch_size, max_pixels)


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
        for url, group in itertools.groupby(rows, key=lambda row: row["image"].split("#", 1)[0]):
            yield from _read_shard(url, list(group))
    elif all(storage.is_local(row["image"]) for row in rows):
        for row in rows:
            yield row, _read(row)
    else:
        yield from zip(rows, storage.each(_read, rows), strict=True)


def _read(row: dict[str, Any]) -> bytes | ImageError:
    url = row["image"]
    if row["size"] is not None and row["size"] > _MAX_IMAGE_BYTES:
        return ImageError("too-many-bytes", f"the file has {row['size'] / 1e6:,.0f} MB")
    try:
        if storage.is_local(url):
            # Opening a pipe would wait for its writer for ever.
            if not stat.S_ISREG(os.stat(url).st_mode):
                return ImageError("not-a-file", "a folder, a pipe or a device, not a file")
            with open(url, "rb") as file:
                return file.read(_MAX_IMAGE_BYTES + 1)
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


# After the network


def rows(
    photographs: pa.Table,
    logits: Array,
    novelty: Array | None,
    *,
    output: pa.Schema,
    class_names: Sequence[str],
    review: Review | None,
    model_id: str,
    run_id: str,
) -> pa.Table:
    """The rows of the output for some photographs.

    Args:
        photographs: of PHOTOGRAPH.
        logits: [B, C], of the rows without a reason, in their order.
        novelty: [B], likewise; None: the model has no such measure.
        output: `schema` of the model.
        class_names: in the order of the logits.
        review: thresholds; None: the model has none.
        model_id: of the model.
        run_id: of the job's run.

    Returns:
        A table of `output`. A photograph for which the network gave no finite numbers is failed.
    """
    count = photographs.num_rows
    decoded = np.flatnonzero(pc.is_null(photographs["reason"]).to_numpy())
    if len(decoded) != len(logits):
        raise ValueError(f"{len(logits)} rows of logits for {len(decoded)} decoded photographs")
    reasons = np.array(photographs["reason"].to_pylist(), object)
    finite = np.isfinite(logits).all(axis=1)
    reasons[decoded[~finite]] = "not-finite: the network gave no number for it"
    scored = decoded[finite]
    probabilities = np.zeros((count, len(class_names)), np.float32)
    if len(scored):
        probabilities[scored] = softmax(logits[finite])
    best = probabilities.argmax(axis=1)
    confidence = probabilities[np.arange(count), best]
    distances = np.full(count, np.nan, np.float32)
    if novelty is not None:
        distances[scored] = novelty[finite]

    status = np.full(count, "failed", object)
    status[scored] = "ok"
    for i in scored:
        told = review and review.reason(float(confidence[i]), float(distances[i]))
        if told:
            status[i], reasons[i] = "review", told
    failed = np.ones(count, bool)
    failed[scored] = False
    names = np.array(class_names, object)
    now = datetime.now(UTC)
    columns = {
        "image": photographs["image"],
        "version": photographs["version"],
        "status": pa.array(status),
        "label": pa.array(names[best], pa.string(), mask=failed),
        "confidence": pa.array(confidence, mask=failed),
        "probabilities": pa.StructArray.from_arrays(
            [pa.array(np.ascontiguousarray(column)) for column in probabilities.T],
            fields=list(output.field("probabilities").type),
            mask=pa.array(failed),
        ),
        "reason": pa.array(reasons, pa.string()),
        **{
            name: photographs[name]
            for name in ("width", "height", "captured_at", "latitude", "longitude")
        },
        "novelty": pa.array(distances, mask=failed | np.isnan(distances)),
        "decoder_version": pa.array([DECODER_VERSION] * count, pa.int32()),
        "model_id": pa.array([model_id] * count),
        "run_id": pa.array([run_id] * count),
        "scored_at": pa.array([now] * count, pa.timestamp("us", tz="UTC")),
    }
    return pa.table([columns[name] for name in output.names], schema=output)
