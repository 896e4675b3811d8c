"""What jobs/prepare.py does: photographs through Ray Data into shards, each read once.

    items -> read and fingerprint -> decide on the driver -> place -> sort by place -> shards

The encoded photographs stay in Ray's object store between the two passes, which spills to disk;
the driver sees only their metadata.
"""

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray

import leafnet
from leafnet import cluster, images, lock, prepare, shards, sources, storage, terminal
from leafnet.config import SPLITS, PrepareSettings
from leafnet.errors import UserError
from leafnet.lock import Lock
from leafnet.prepare import Plan, Policy
from leafnet.shards import Shard, ShardIndex
from leafnet.sources import Listing, Sample
from leafnet.terminal import say

REJECTED = "rejected.parquet"
DUPLICATES = "duplicates.parquet"
# There from the start until the index is written, so that what an interrupted start left can be
# told from what belongs to somebody else.
_UNFINISHED = "unfinished.json"
_LOG = "prepare.log"
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

_READ_SCHEMA = prepare.READ_SCHEMA
for _field in (("image", pa.binary()), ("width", pa.int32()), ("height", pa.int32())):
    _READ_SCHEMA = _READ_SCHEMA.append(pa.field(*_field))


def run(settings: PrepareSettings, listing: Listing) -> None:
    """Write the data set of `listing` to `settings.out`, unless it is there already.

    Raises:
        UserError: something in the settings or the photographs is wrong; another job is at work
            on the output (exit code 3).
    """
    out = storage.absolute(settings.out)
    prepare.check_group(settings.group)
    _refuse_nested(listing.source, out)
    if storage.exists(out) and _already_prepared(settings, listing, out):
        say(f"{out} is already prepared; nothing to do")
        return
    _refuse_strangers(out)
    began = time.monotonic()
    with lock.hold(out, timeout_s=settings.lock_timeout) as held:
        _mark_unfinished(out)
        with terminal.log_to(out, _LOG):
            terminal.keeps("nothing of the data set is kept, it is made in one go")
            _say_listing(listing)
            with cluster.session(settings.ray, runtime_env=cluster.SHUFFLE_ENV):
                index, plan, read = _prepare(settings, listing, out, held)
            _say_results(index, plan, read, time.monotonic() - began)
            terminal.result(
                shards=out, fingerprint=index.fingerprint, read=read, counts=index.counts
            )


def _prepare(
    settings: PrepareSettings, listing: Listing, out: str, held: Lock
) -> tuple[ShardIndex, Plan, int]:
    """The index, the plan, and how many examples were read."""
    board = cluster.Board()
    read = _read(listing, board, max_pixels=settings.max_megapixels * 1_000_000)
    metadata = pa.concat_tables(ray.get(_map(read, without_images).to_arrow_refs()))
    _check_seen_by_all(metadata, listing)
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
    plan = prepare.decide(metadata, policy, has_splits=listing.has_splits, source=listing.source)
    for note in plan.notes:
        say(note)
    held.check()
    storage.delete(storage.join(out, shards.INDEX_NAME))
    for name in storage.list_names(out):
        if _OURS.fullmatch(name) and name != _UNFINISHED:
            storage.delete(storage.join(out, name))
    written = _write(read, plan, out, row_group=settings.row_group)
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
            "read": metadata.num_rows,
            "rejected": dict(Counter(plan.rejected["reason"].to_pylist())),
            "duplicates": dict(Counter(plan.duplicates["kind"].to_pylist())),
            "dropped": plan.dropped,
            "leafnet": leafnet.__version__,
            "finished_at": _now(),
        },
    )
    storage.delete(storage.join(out, _UNFINISHED))
    return index, plan, metadata.num_rows


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
    others = [name for name in names if name not in (_LOG, lock.FOLDER)]
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


def _say_listing(listing: Listing) -> None:
    kind = {"folders": "class folders", "parquet": "Parquet", "tars": "WebDataset tars"}
    count = f"{listing.items.num_rows:,} tars"
    if listing.examples is not None:
        count = f"{listing.examples:,} photographs"
    splits = "with splits of its own" if listing.has_splits else "without splits"
    say(
        f"source      {listing.source}: {count}, {_megabytes(listing.size)}, "
        f"{kind[listing.layout]} {splits}"
    )
    for note in listing.notes:
        say(note)


# Reading


def _read(listing: Listing, board: cluster.Board, *, max_pixels: int) -> ray.data.Dataset:
    """Every example with its bytes and metadata (_READ_SCHEMA), in Ray's object store."""
    total, unit, step = listing.examples, "images", 1
    if total is None:
        total, unit, step = -(-listing.size // 1_000_000), "MB", 1_000_000
    items = ray.data.from_arrow(_blocks(listing.items))
    # Fingerprinting is what takes time, so a task takes a CPU; files are fetched by threads.
    read = _map(
        items,
        read_items,
        layout=listing.layout,
        names=listing.label_names,
        max_pixels=max_pixels,
        board=board.handle,
    )
    seen = 0
    with terminal.progress("read", total, unit=unit) as advance:

        def on_event(count: int) -> None:
            nonlocal seen
            before, seen = seen, seen + count
            advance(-(-seen // step) + (-before // step))

        with board.follow(on_event):
            done: ray.data.Dataset = read.materialize()
    return done


def _map(
    dataset: ray.data.Dataset, function: Callable[..., Any], **kwargs: Any
) -> ray.data.Dataset:
    """`function` over each block as an Arrow table."""
    mapped: ray.data.Dataset = dataset.map_batches(
        function,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        fn_kwargs=kwargs,
        runtime_env=cluster.SHUFFLE_ENV,
    )
    return mapped


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
    items: pa.Table, *, layout: sources.Layout, names: tuple[str, ...], max_pixels: int, board: Any
) -> Iterator[pa.Table]:
    """Tables of _READ_SCHEMA for some rows of a listing: one row an example, readable or not.

    Posts progress to `board`: photographs, and of tars, which do not say how many they hold, bytes.
    """
    rows: list[dict[str, Any]] = []
    size = told = waiting = 0
    for number, (item, sample) in enumerate(_samples(items, layout, names), start=1):
        row = _row(sample, max_pixels)
        row["number"] = item["item"] << 32 | sample.row
        rows.append(row)
        size += row["bytes"] or 0
        waiting += len(sample.image or b"") if layout == "tars" else 1
        if number % _POST_EVERY == 0:
            board.post.remote(waiting)
            told, waiting = told + waiting, 0
        if size >= _BLOCK_BYTES:
            yield pa.Table.from_pylist(rows, _READ_SCHEMA)
            rows, size = [], 0
    if layout == "tars":
        waiting = sum(items["size"].to_pylist()) - told
    board.post.remote(waiting)
    yield pa.Table.from_pylist(rows, _READ_SCHEMA)


def _samples(
    items: pa.Table, layout: sources.Layout, names: tuple[str, ...]
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


def _row(sample: Sample, max_pixels: int) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(_READ_SCHEMA.names)
    row.update(key=sample.key, label=sample.label, split=sample.split)
    if sample.image is None:
        return row | {"reason": sample.reason, "message": sample.message}
    if len(sample.image) > _MAX_IMAGE_BYTES:
        message = f"the file has {_megabytes(len(sample.image))}, more than a photograph has"
        return row | {"reason": "too-many-bytes", "message": message}
    try:
        fingerprint = images.fingerprint(sample.image, max_pixels=max_pixels)
    except images.ImageError as error:
        return row | {"reason": error.reason, "message": str(error)}
    return row | {
        "image": sample.image,
        "bytes": len(sample.image),
        "pixels_sha256": fingerprint.pixels_sha256,
        "perceptual_hash": fingerprint.perceptual_hash,
        "width": fingerprint.width,
        "height": fingerprint.height,
    }


def without_images(read: pa.Table) -> pa.Table:
    """The columns of `read` that are decided on."""
    return read.select(prepare.READ_SCHEMA.names)


def _check_seen_by_all(metadata: pa.Table, listing: Listing) -> None:
    """Refuse a local source that other machines of the cluster do not have."""
    for row in metadata.select(["number", "reason"]).to_pylist():
        if row["reason"] == "not-found" and storage.is_local(listing.source):
            url = listing.items["url"][row["number"] >> 32].as_py()
            if storage.exists(url):
                raise UserError(
                    "source-not-shared",
                    f"{url} is on this machine but not on all machines of the cluster; give "
                    "--source as a URL or on a shared disk",
                )


# Writing


def _write(read: ray.data.Dataset, plan: Plan, out: str, *, row_group: int) -> list[Shard]:
    """Write the shards of `plan`; they come back in its order.

    A sort with the ends of the shards as boundaries gives one block for each shard, in order, by
    tasks alone. It needs no actors, which hash shuffles may start and which hold CPUs while they
    wait for tasks that need one: this works with a single CPU.
    """
    ends = np.cumsum(plan.shard_rows)
    reference = ray.put((plan.rows, ends))
    placed = _map(read, place_rows, plan=reference)
    results = _map(
        placed.sort("place", boundaries=ends[:-1].tolist()),
        write_shards,
        plan=reference,
        names=plan.shard_names,
        out=out,
        row_group=row_group,
    )
    written: dict[str, Shard] = {}
    with terminal.progress("write", int(ends[-1])) as advance:
        for row in results.iter_rows():
            shard = Shard(**json.loads(row["shard"]))
            written[shard.name] = Shard(**{**vars(shard), "row_groups": tuple(shard.row_groups)})
            advance(shard.rows)
    if set(written) != set(plan.shard_names):
        raise RuntimeError(f"wrote {len(written)} shards of {len(plan.shard_names)}")
    return [written[name] for name in plan.shard_names]


def place_rows(read: pa.Table, *, plan: "ray.ObjectRef[Any]") -> pa.Table:
    """The rows of `read` that are kept, as shards have them, with their place in all shards."""
    rows: dict[str, NDArray[Any]]
    rows, _ = ray.get(plan)
    number = read["number"].to_numpy()
    at = np.minimum(np.searchsorted(rows["number"], number), rows["number"].size - 1)
    kept = rows["number"][at] == number
    table, at = read.filter(pa.array(kept)), at[kept]
    digests = [hashlib.sha256(image.as_buffer()).hexdigest() for image in table["image"]]
    return pa.table(
        {
            "place": rows["place"][at],
            "key": table["key"],
            "image": table["image"],
            "label": rows["label"][at],
            "width": table["width"],
            "height": table["height"],
            "sha256": pa.array(digests, pa.string()),
        }
    )


def write_shards(
    rows: pa.Table, *, plan: "ray.ObjectRef[Any]", names: tuple[str, ...], out: str, row_group: int
) -> pa.Table:
    """Write the shards that `rows`, sorted by place, hold completely; what was written as JSON."""
    _, ends = ray.get(plan)
    place = rows["place"].to_numpy()
    written = []
    start = 0
    while start < place.size:
        shard = int(np.searchsorted(ends, place[start], side="right"))
        first = int(ends[shard - 1]) if shard else 0
        stop = start + int(ends[shard]) - first
        if not np.array_equal(place[start:stop], np.arange(first, ends[shard])):
            raise RuntimeError(f"the rows of {names[shard]} did not come together")
        table = rows.slice(start, stop - start)
        split = pa.array([names[shard].split("-")[0]] * table.num_rows)
        table = table.append_column("split", split)
        result = shards.write_shard(out, names[shard], table, row_group=row_group)
        written.append(json.dumps(asdict(result)))
        start = stop
    return pa.table({"shard": pa.array(written, pa.string())})


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


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _say_results(index: ShardIndex, plan: Plan, read: int, seconds: float) -> None:
    splits = [split for split in SPLITS if index.examples(split)]
    rows = [
        [name, *(f"{index.counts[split][name]:,}" for split in splits)]
        for name in index.class_names
    ]
    totals = ["all", *(f"{index.examples(split):,}" for split in splits)]
    say()
    terminal.table("examples", ["class", *splits], [*rows, totals])
    say()
    rejected = Counter(plan.rejected["reason"].to_pylist())
    told = f"{rejected.total():,} of {read:,}"
    if rejected:
        told += f" ({', '.join(f'{n:,} {reason}' for reason, n in rejected.most_common())}): "
        told += storage.join(index.root, REJECTED)
    say(f"rejected    {told}")
    kinds = Counter(plan.duplicates["kind"].to_pylist())
    told = ", ".join(f"{kinds[kind]:,} {kind}" for kind in ("exact", "near"))
    if kinds:
        told += f": {storage.join(index.root, DUPLICATES)}"
    say(f"duplicates  {told}")
    why = {"other-split": "kept in another split", "other-label": "also under another label"}
    told = ", ".join(f"{n:,} {why[reason]}" for reason, n in plan.dropped.items() if n)
    if told:
        say(f"dropped     {told}")
    size = sum(shard.bytes for shard in index.shards)
    say(f"shards      {len(index.shards):,}, {_megabytes(size)}: {index.root}")
    say(f"fingerprint {index.fingerprint[:16]}")
    say(f"took        {terminal.duration(seconds)}, log: {storage.join(index.root, _LOG)}")
    say(f"next        python jobs/train.py --shards {index.root} --name NAME")
