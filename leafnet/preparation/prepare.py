"""What jobs/prepare.py does: photographs through Ray Data into shards, each read once.

    items -> read, fingerprint, stage -> decide on the driver -> gather from staging -> shards

Between the two passes the encoded photographs lie below the output, in files that are gone before
the data set is there. No process holds more of them than one task reads or writes; the driver and
Ray's object store have only their metadata.
"""

import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

import leafnet
from leafnet.core import interrupts, lock, storage, terminal
from leafnet.core.errors import UserError
from leafnet.core.lock import Lock
from leafnet.core.terminal import say
from leafnet.data import groups, images, isolated, shards
from leafnet.data.shards import SPLITS, Shard, ShardIndex
from leafnet.distributed import heartbeat, session
from leafnet.preparation import examples, samples, sources, tell
from leafnet.preparation.examples import Policy
from leafnet.preparation.plan import Plan, decide, rejected_of
from leafnet.preparation.samples import Listing, Sample
from leafnet.preparation.settings import PrepareSettings
from leafnet.preparation.tell import DUPLICATES, LOG, REJECTED

# There from the start until the index is written, so that what an interrupted start left can be
# told from what belongs to somebody else.
_UNFINISHED = "unfinished.json"
_STAGING = "_staging"
_OURS = re.compile(
    rf"(?:({'|'.join(SPLITS)})-\d{{5}}\.parquet|{REJECTED}|{DUPLICATES}|{_UNFINISHED})"
    r"(\.[0-9a-f]{8}\.tmp)?"
)
# Settings that change where and how the data set is written, and not what is in it.
_PLACEMENT = ("out", "overwrite", "lock_timeout", "ray")

_BLOCK_BYTES = 32_000_000
_BLOCK_EXAMPLES = 512
# A table's binary column holds less than 2 GiB.
_MAX_IMAGE_BYTES = 512_000_000
_READERS = 16
_POST_EVERY = 16  # examples

# Staged photographs that lie nearer to each other are read by one request, with what lies between:
# another request would cost more. But not by a long one, whose answer is held as a whole.
_NEAR_BYTES, _REQUEST_BYTES = 64_000, 8_000_000

_READ_SCHEMA = pa.schema(
    [
        *examples.READ_SCHEMA,
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),  # of the file
        ("note", pa.string()),  # what a person should know of its pixels
        # Where its bytes are staged; null where there is a reason.
        ("file", pa.int64()),
        ("offset", pa.int64()),
    ]
)


def run(settings: PrepareSettings, listing: Listing, *, say_next: bool = True) -> None:
    """Write the data set of `listing` to `settings.out`, unless it is there already.

    `say_next` ends with the command that a person may go on with.

    Raises:
        UserError: something in the settings or the photographs is wrong; another job is at work
            on the output (exit code 3).
    """
    out = storage.absolute(settings.out)
    groups.check_group(settings.group)
    _refuse_nested(listing.source, out)
    if storage.exists(out) and _already_prepared(settings, listing, out):
        say(f"{out} is already prepared; nothing to do")
        return
    _refuse_strangers(out)
    began = time.monotonic()
    terminal.keeps("nothing of the data set is kept, it is made in one go")
    with lock.hold(out, timeout_s=settings.lock_timeout) as held:
        _mark_unfinished(out)
        with terminal.log_to(out, LOG):
            tell.say_listing(listing)
            index, plan, read = _prepare(settings, listing, out, held)
            tell.say_results(index, plan, listing, read, time.monotonic() - began)
            if say_next:
                job, more = "train.py", " --name NAME"
                if not index.examples("train"):
                    job, more = "evaluate.py", " --model MODEL"
                say(f"next        python jobs/{job} --shards {index.root}{more}")
            terminal.result(
                shards=out, fingerprint=index.fingerprint, read=read, counts=index.counts
            )


def _prepare(
    settings: PrepareSettings, listing: Listing, out: str, held: Lock
) -> tuple[ShardIndex, Plan, int]:
    """The index, the plan, and how many examples were read."""
    # The session ends first, and with it what writes to staging.
    with _staging(out) as staging, session.session(settings.ray) as nodes:
        session.with_room(nodes, False, "auto", settings.ray)
        plan, written, read = _make_shards(settings, listing, staging, out, held)
    _write_table(storage.join(out, REJECTED), plan.rejected)
    _write_table(storage.join(out, DUPLICATES), plan.duplicates)
    _check_seen_here(out, written)
    held.check()
    index = shards.write_index(
        out,
        class_names=plan.class_names,
        shards=written,
        counts=plan.counts,
        prepared={
            "source": listing.source,
            "listing_sha256": listing.fingerprint,
            "settings": _decisive(settings),
            "read": read,
            "passed_over": listing.passed_over,
            "rejected": dict(Counter(plan.rejected["reason"].to_pylist())),
            "duplicates": dict(Counter(plan.duplicates["kind"].to_pylist())),
            "dropped": plan.dropped,
            "leafnet": leafnet.__version__,
            "finished_at": _now(),
        },
    )
    storage.delete(storage.join(out, _UNFINISHED))
    return index, plan, read


def _make_shards(
    settings: PrepareSettings, listing: Listing, staging: str, out: str, held: Lock
) -> tuple[Plan, list[Shard], int]:
    """The plan, the shards, in its order, and how many examples were read."""
    read = _read(listing, staging, max_pixels=settings.max_megapixels * 1_000_000)
    _check_seen_by_all(read, listing)
    shares = [int(share) for share in settings.split.split("/")]
    policy = Policy(
        shares=(shares[0], shares[1], shares[2]),
        group=settings.group,
        drop_exact=settings.duplicates == "drop",
        drop_near=settings.near_duplicates == "drop",
        near_distance=settings.near_distance,
        shard_bytes=settings.shard_mb * 1_000_000,
        seed=settings.seed,
    )
    metadata = read.select(examples.READ_SCHEMA.names)
    plan = _decide(metadata, policy, listing, out)
    for note in (*plan.notes, *tell.notes_of_pixels(read)):
        say(note)
    held.check()
    storage.delete(storage.join(out, shards.INDEX_NAME))
    for name in storage.list_names(out):
        if _OURS.fullmatch(name) and name != _UNFINISHED:
            storage.delete(storage.join(out, name))
    written = _write(read, plan, staging, out, row_group=settings.row_group)
    return plan, written, read.num_rows


def _decide(read: pa.Table, policy: Policy, listing: Listing, out: str) -> Plan:
    """The plan; where there can be none, the reasons are written all the same."""
    if listing.layout != "tars" and read.num_rows != listing.examples:
        raise RuntimeError(
            f"{listing.examples:,} photographs were listed and {read.num_rows:,} read"
        )
    try:
        return decide(read, policy, has_splits=listing.has_splits, source=listing.source)
    except UserError as error:
        rejected = rejected_of(read)
        # Beside a data set that is to be replaced, they would be taken for its own.
        if not rejected.num_rows or storage.exists(storage.join(out, shards.INDEX_NAME)):
            raise
        url = storage.join(out, REJECTED)
        _write_table(url, rejected)
        raise UserError(error.reason, f"{error}; all reasons are in {url}") from None


# Before the work


def _refuse_nested(source: str, out: str) -> None:
    inner, outer = (_real(url) + "/" for url in (out, source))
    if inner.startswith(outer) or outer.startswith(inner):
        raise UserError(
            "out-in-source",
            f"--out {out} and --source {source} lie in each other; give --out a folder of its own",
        )


def _real(url: str) -> str:
    return str(Path(url).resolve()) if storage.is_local(url) else url


def _decisive(settings: PrepareSettings) -> dict[str, Any]:
    """The settings that change the data set."""
    values = settings.model_dump(mode="json", exclude=set(_PLACEMENT))
    return values | {"source": storage.absolute(settings.source)}


def _already_prepared(settings: PrepareSettings, listing: Listing, out: str) -> bool:
    """True when the data set at `out` is the one that is asked for."""
    url = storage.join(out, shards.INDEX_NAME)
    try:
        document = storage.read_json(url)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not isinstance(document, dict) or not isinstance(document.get("prepared"), dict):
        raise UserError("out-not-empty", f"{url} is not of a data set; give --out a new folder")
    if settings.overwrite:
        return False
    remedy = "give another --out, or --overwrite to replace it"
    prepared = document["prepared"]
    wanted, found = _decisive(settings), prepared.get("settings", {})
    differing = [name for name, value in wanted.items() if found.get(name) != value]
    if differing:
        name = differing[0]
        raise UserError(
            "out-exists",
            f"{out} holds a data set prepared with --{name} {found.get(name)}, not "
            f"{wanted[name]}; {remedy}",
        )
    if prepared.get("listing_sha256") != listing.fingerprint:
        raise UserError(
            "out-exists",
            f"{out} was prepared before files at {listing.source} were added, removed or "
            f"changed; {remedy}",
        )
    try:
        shards.check_sizes(shards.read_index(out))
    except UserError as error:
        raise UserError(error.reason, f"{error} (--overwrite)") from None
    return True


def _refuse_strangers(out: str) -> None:
    """Refuse a folder with files that leafnet did not write: nothing of others is deleted."""
    names = [name for name in storage.list_names(out) if not name.startswith(".")]
    if shards.INDEX_NAME in names or _UNFINISHED in names:
        return
    others = [name for name in names if name not in (LOG, lock.FOLDER)]
    if others or (storage.exists(out) and not storage.is_folder(out)):
        raise UserError(
            "out-not-empty",
            f"--out {out} is not empty and no data set ({', '.join(others[:3]) or 'a file'}, …); "
            "give a new folder",
        )


def _mark_unfinished(out: str) -> None:
    """Write the first file to `out`: whether that is possible is better known before the work."""
    try:
        storage.write_json(storage.join(out, _UNFINISHED), {"started_at": _now()})
    # Every filesystem has errors of its own.
    except Exception as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError("cannot-write", f"cannot write to --out {out}: {reason}") from None


@contextmanager
def _staging(out: str) -> Iterator[str]:
    """A new folder below `out` that is gone when the block ends."""
    folder, mark = storage.join(out, _STAGING), storage.join(out, _UNFINISHED)
    storage.delete_folder(folder, mark=mark)  # of a start that was killed
    try:
        yield storage.join(folder, uuid.uuid4().hex[:16])
    except BaseException:
        # That is what has to be told; the next start deletes the folder too.
        with suppress(UserError, OSError):
            storage.delete_folder(folder, mark=mark)
        raise
    storage.delete_folder(folder, mark=mark)


# Reading


def _read(listing: Listing, staging: str, *, max_pixels: int) -> pa.Table:
    """The metadata of every example (_READ_SCHEMA), whose bytes are in `staging` then."""
    total, unit, step = listing.examples, "images", 1
    if total is None:
        total, unit, step = -(-listing.size // 1_000_000), "MB", 1_000_000
    board = heartbeat.Board()
    # Fingerprinting is what takes time, so a task takes a CPU; files are fetched by threads.
    tables = _map(
        _blocks(listing.items),
        read_items,
        layout=listing.layout,
        names=listing.label_names,
        max_pixels=max_pixels,
        staging=staging,
        board=board.handle,
    )
    seen = 0
    with terminal.progress("read", total, unit=unit) as advance:

        def on_event(count: int) -> None:
            nonlocal seen
            # A task whose process died tells of its photographs again.
            before, seen = seen, min(seen + count, total * step)
            advance(-(-seen // step) + (-before // step))

        with board.follow(on_event):
            return pa.concat_tables([_READ_SCHEMA.empty_table(), *tables])


def _map(
    blocks: Sequence[pa.Table], function: Callable[..., Any], **kwargs: Any
) -> Iterator[pa.Table]:
    """What `function` makes of each block, as it comes: a task for each, of a CPU."""
    mapped = ray.data.from_arrow(list(blocks)).map_batches(
        function,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        fn_kwargs=kwargs,
    )
    for block in mapped.iter_batches(batch_size=None, batch_format="pyarrow"):
        interrupts.raise_if_asked()
        table: Any = block
        yield table


def _blocks(items: pa.Table) -> list[pa.Table]:
    """`items` numbered, in runs that one task reads: enough for all CPUs, each worth a task."""
    items = items.append_column("item", pa.array(np.arange(items.num_rows)))
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    sizes = items["size"].to_numpy()
    limit = min(_BLOCK_BYTES, max(1_000_000, int(sizes.sum()) // (4 * cpus)))
    blocks, start, size = [], 0, 0
    for i in range(items.num_rows):
        if i > start and (size + sizes[i] > limit or i - start >= _BLOCK_EXAMPLES):
            blocks.append(items.slice(start, i - start).combine_chunks())
            start, size = i, 0
        size += int(sizes[i])
    return [*blocks, items.slice(start).combine_chunks()]


def read_items(
    items: pa.Table,
    *,
    layout: samples.Layout,
    names: tuple[str, ...],
    max_pixels: int,
    staging: str,
    board: Any,
) -> Iterator[pa.Table]:
    """Tables of _READ_SCHEMA for some rows of a listing: one row an example, readable or not.

    The photographs that can be used go to `staging`. Posts progress to `board`: photographs, and
    of tars, which do not say how many they hold, bytes.
    """
    first, job = items["item"][0].as_py(), staging.rsplit("/", 1)[-1]
    of = f"{items['key'][0]} and what follows it"
    rows: list[dict[str, Any]] = []
    kept: list[bytes] = []
    size = told = waiting = 0
    with isolated.decoder(job, first, of=of) as decoder:
        for number, (item, sample) in enumerate(_samples(items, layout, names), start=1):
            row = _row(sample, max_pixels, decoder.fingerprint)
            row["number"] = item["item"] << 32 | sample.row
            rows.append(row)
            if row["reason"] is None:
                assert sample.image is not None
                row["offset"] = size
                kept.append(sample.image)
                size += len(sample.image)
            waiting += len(sample.image or b"") if layout == "tars" else 1
            if number % _POST_EVERY == 0:
                board.post.remote(waiting)
                told, waiting = told + waiting, 0
            if size >= _BLOCK_BYTES:
                yield _stage(rows, kept, staging)
                rows, kept, size = [], [], 0
        if layout == "tars":
            waiting = sum(items["size"].to_pylist()) - told
        board.post.remote(waiting)
        yield _stage(rows, kept, staging)


def _stage(rows: list[dict[str, Any]], kept: list[bytes], staging: str) -> pa.Table:
    """`rows` with the photographs of those without a reason, `kept`, in one file of `staging`."""
    if kept:
        name = rows[0]["number"]
        storage.write_bytes(_staged_url(staging, name), b"".join(kept))
        rows = [row | {"file": None if row["reason"] else name} for row in rows]
    return pa.Table.from_pylist(rows, _READ_SCHEMA)


def _staged_url(staging: str, file: int) -> str:
    return storage.join(staging, f"{file:016x}")


def _samples(
    items: pa.Table, layout: samples.Layout, names: tuple[str, ...]
) -> Iterator[tuple[dict[str, Any], Sample]]:
    listed = items.to_pylist()
    if layout != "folders":
        for item in listed:
            for sample in sources.read_samples(layout, item, names):
                yield item, sample
        return
    # Threads wait for disks and object stores; the block's size bounds what is held at once.
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda item: next(sources.read_samples(layout, item, names)), listed)
        yield from zip(listed, found, strict=True)


def _row(
    sample: Sample, max_pixels: int, fingerprint: Callable[..., images.Fingerprint]
) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(_READ_SCHEMA.names)
    row.update(key=sample.key, label=sample.label, split=sample.split)
    if sample.image is None:
        return row | {"reason": sample.reason, "message": sample.message}
    if len(sample.image) > _MAX_IMAGE_BYTES:
        message = f"the file has {tell.megabytes(len(sample.image))}, more than a photograph has"
        return row | {"reason": "too-many-bytes", "message": message}
    try:
        found = fingerprint(sample.image, max_pixels=max_pixels)
    except images.ImageError as error:
        return row | {"reason": error.reason, "message": str(error)}
    return row | {
        "bytes": len(sample.image),
        "pixels_sha256": found.pixels_sha256,
        "perceptual_hash": found.perceptual_hash,
        "turned_hashes": list(found.turned_hashes),
        "note": found.note,
        "width": found.width,
        "height": found.height,
        "sha256": storage.sha256(sample.image),
    }


def _check_seen_by_all(read: pa.Table, listing: Listing) -> None:
    """Refuse a local source that other machines of the cluster do not have."""
    missing = read.filter(pc.equal(read["reason"], "not-found"))
    for row in missing.select(["number"]).to_pylist():
        if storage.is_local(listing.source):
            url = listing.items["url"][row["number"] >> 32].as_py()
            if storage.exists(url):
                raise UserError(
                    "source-not-shared",
                    f"{url} is on this machine but not on all machines of the cluster; give "
                    "--source as a URL or on a shared disk",
                )


# Writing


def _write(read: pa.Table, plan: Plan, staging: str, out: str, *, row_group: int) -> list[Shard]:
    """Write the shards of `plan`, a task each; they come back in its order."""
    ordered = _in_order(read, plan)
    ends = np.cumsum(plan.shard_rows).tolist()
    blocks = [
        ordered.slice(end - rows, rows).append_column("shard", pa.array([name] * rows))
        for name, rows, end in zip(plan.shard_names, plan.shard_rows.tolist(), ends, strict=True)
    ]
    written: dict[str, Shard] = {}
    with terminal.progress("write", ends[-1]) as advance:
        for table in _map(blocks, write_shard, staging=staging, out=out, row_group=row_group):
            for text in table["shard"].to_pylist():
                shard = Shard(**json.loads(text))
                shard = Shard(**{**vars(shard), "row_groups": tuple(shard.row_groups)})
                written[shard.name] = shard
                advance(shard.rows)
    if set(written) != set(plan.shard_names):
        raise RuntimeError(f"wrote {len(written)} shards of {len(plan.shard_names)}")
    return [written[name] for name in plan.shard_names]


def _in_order(read: pa.Table, plan: Plan) -> pa.Table:
    """The rows of `read` that are kept, in the order of all shards, with their class indices."""
    number = read["number"].to_numpy()
    by_number = np.argsort(number)
    place = np.argsort(plan.rows["place"])
    at = by_number[np.searchsorted(number, plan.rows["number"][place], sorter=by_number)]
    names = ["key", "bytes", "width", "height", "sha256", "file", "offset"]
    table = read.select(names).take(pa.array(at))
    return table.append_column("label", pa.array(plan.rows["label"][place])).combine_chunks()


def write_shard(rows: pa.Table, *, staging: str, out: str, row_group: int) -> pa.Table:
    """Write the shard whose examples are `rows`, in their order; what was written as JSON."""
    name = rows["shard"][0].as_py()
    table = rows.select(["key", "label", "width", "height", "sha256"])
    table = table.append_column("image", pa.array(_staged(rows, staging), pa.binary()))
    table = table.append_column("split", pa.array([name.split("-")[0]] * rows.num_rows))
    result = shards.write_shard(out, name, table, row_group=row_group)
    return pa.table({"shard": [json.dumps(asdict(result))]})


def _staged(rows: pa.Table, staging: str) -> list[bytes]:
    """The photographs of `rows`.

    Raises:
        UserError: they are not there, or not those that were staged.
    """
    file, start, size = (rows[name].to_numpy() for name in ("file", "offset", "bytes"))
    stop = start + size
    requests: list[list[int]] = []
    for i in np.lexsort((start, file)).tolist():
        if requests:
            first, last = requests[-1][0], requests[-1][-1]
            near = file[i] == file[last] and start[i] - stop[last] < _NEAR_BYTES
            if near and stop[i] - start[first] <= _REQUEST_BYTES:
                requests[-1].append(i)
                continue
        requests.append([i])

    def read(request: list[int]) -> bytes:
        first, last = request[0], request[-1]
        url = _staged_url(staging, int(file[first]))
        try:
            return storage.read_bytes(url, start=int(start[first]), stop=int(stop[last]))
        except FileNotFoundError:
            raise UserError(
                "out-not-shared",
                f"{url} was written on another machine; give --out as a URL or on a shared disk",
            ) from None

    found = [b""] * rows.num_rows
    digests = rows["sha256"].to_pylist()
    for request, data in zip(requests, storage.each(read, requests), strict=True):
        for i in request:
            begin = int(start[i] - start[request[0]])
            found[i] = data[begin : begin + int(size[i])]
            if storage.sha256(found[i]) != digests[i]:
                raise UserError(
                    "store-failed",
                    f"{_staged_url(staging, int(file[i]))} is not what was written there a moment "
                    "ago (its sha256 differs)",
                )
    return found


def _write_table(url: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(url, sink.getvalue().to_pybytes())


def _check_seen_here(out: str, written: list[Shard]) -> None:
    """Refuse a local --out that other machines of the cluster wrote to their own disks."""
    found = {file.url for file in storage.list_files(out)}
    for shard in written:
        if storage.join(out, shard.name) not in found:
            raise UserError(
                "out-not-shared",
                f"{shard.name} was written to {out} on another machine; give --out as a URL or on "
                "a shared disk",
            )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
