"""What the driver does with very many examples, simulated: seconds, peak memory, sizes.

    python -m tests.benchmarks.planning                     # a million, about a minute
    python -m tests.benchmarks.planning --training 100000000 --only index,order
    python -m tests.benchmarks.planning --photographs 10000000 --only night     # 4 GB, minutes

Nothing is read but small tables: shards, features and photographs exist by name only. Each part
runs in a process of its own, so that its peak memory is its own. cluster/SCALING.md has results.
"""

import argparse
import hashlib
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from leafnet.core import storage
from leafnet.data import shards
from leafnet.data.shards import Shard
from leafnet.features import cache
from leafnet.preparation.examples import READ_SCHEMA, Policy
from leafnet.preparation.plan import decide
from leafnet.training import loop
from leafnet.training.head import fit

CLASSES = ("early_blight", "healthy", "late_blight")
IMAGE_BYTES, SHARD_BYTES, ROW_GROUP = 100_000, 64_000_000, 256
NEW_SHARE, NIGHT_ROWS = 0.1, 250_000


class Result(NamedTuple):
    """A line of the table."""

    what: str
    number: int
    seconds: float
    size: int  # bytes, of what `what` says


def index(examples: int) -> list[Result]:
    """`index.json` of a data set: written, read, and planned against an empty feature cache."""
    simulated = list(simulated_shards(examples))
    counts = {"train": dict.fromkeys(CLASSES, examples // len(CLASSES))}
    results = []
    with tempfile.TemporaryDirectory(prefix="leafnet-planning-") as root:
        began = time.perf_counter()
        shards.write_index(root, class_names=CLASSES, shards=simulated, counts=counts, prepared={})
        seconds = time.perf_counter() - began
        size = len(storage.read_bytes(storage.join(root, shards.INDEX_NAME)))
        began = time.perf_counter()
        found = shards.read_index(root)
        read = time.perf_counter() - began
        results.append(Result("index.json written, shards", len(simulated), seconds - read, size))
        results.append(Result("index.json read, shards", len(found.shards), read, size))
        began = time.perf_counter()
        plan = cache.plan(
            storage.join(root, "cache"), [(shard, 8) for shard in found.shards], seed=0
        )
        seconds = time.perf_counter() - began
    stored = 8 * examples * 2048 * 2
    results.append(Result("features planned, parts", len(plan.missing), seconds, stored))
    return results


def simulated_shards(examples: int) -> Iterator[Shard]:
    """Shards as jobs/prepare.py would cut them."""
    rows = SHARD_BYTES // IMAGE_BYTES
    for number, start in enumerate(range(0, examples, rows)):
        count = min(rows, examples - start)
        groups = [min(ROW_GROUP, count - at) for at in range(0, count, ROW_GROUP)]
        yield Shard(
            name=f"train-{number:05d}.parquet",
            split="train",
            rows=count,
            row_groups=tuple(groups),
            bytes=count * IMAGE_BYTES,
            sha256=hashlib.sha256(str(number).encode()).hexdigest(),
        )


def order(examples: int) -> list[Result]:
    """What every worker of Ray Train draws for itself: order once an epoch, views once a chunk."""
    began = time.perf_counter()
    drawn = loop.epoch_order(examples, seed=0, epoch=0)
    results = [Result("order of an epoch", drawn.size, time.perf_counter() - began, drawn.nbytes)]
    del drawn
    began = time.perf_counter()
    drawn = fit.epoch_views(examples, 8, seed=0, epoch=0)
    results.append(
        Result("views of an epoch", drawn.size, time.perf_counter() - began, drawn.nbytes)
    )
    return results


def decisions(examples: int) -> list[Result]:
    """What jobs/prepare.py decides on the metadata of all photographs."""
    generator = np.random.default_rng(0)
    numbers = np.arange(examples)
    table = pa.table(
        {
            "number": numbers,
            "key": [f"field/{i % 1000:03d}/IMG_{i:09d}.jpg" for i in range(examples)],
            "label": pa.array(np.array(CLASSES)[numbers % len(CLASSES)]),
            "split": pa.nulls(examples, pa.string()),
            "bytes": np.full(examples, IMAGE_BYTES),
            "pixels_sha256": [f"{i:064x}" for i in range(examples)],
            "turned_hashes": pa.FixedSizeListArray.from_arrays(
                generator.integers(0, 2**63, 7 * examples, dtype=np.uint64), 7
            ).cast(READ_SCHEMA.field("turned_hashes").type),
            "perceptual_hash": generator.integers(0, 2**63, examples, dtype=np.uint64),
            "reason": pa.nulls(examples, pa.string()),
            "message": pa.nulls(examples, pa.string()),
        },
        schema=READ_SCHEMA,
    )
    began = time.perf_counter()
    plan = decide(table, Policy(shares=(80, 10, 10)), has_splits=False, source="simulated")
    seconds = time.perf_counter() - began
    kept = int(plan.shard_rows.sum())
    if kept != examples:
        raise SystemExit(f"wrong: {kept:,} of {examples:,} photographs were placed")
    return [Result("splits and order decided", kept, seconds, table.nbytes)]


def night(photographs: int) -> list[Result]:
    """A listing as a table, and what of it earlier nights have not scored.

    `python -m tests.benchmarks.ledger` measures the ledger with its files.
    """
    began = time.perf_counter()
    listing = pa.Table.from_batches(list(listed(0, photographs)))
    results = [
        Result("photographs in a table", photographs, time.perf_counter() - began, listing.nbytes)
    ]
    began = time.perf_counter()
    keys = pc.binary_join_element_wise(
        listing["image"].cast(pa.large_string()),
        listing["version"].cast(pa.large_string()),
        pa.scalar("\n", pa.large_string()),
    )
    new = int(photographs * NEW_SHARE)
    todo = np.ones(photographs, np.bool_)
    for start in range(new, photographs, NIGHT_ROWS):
        # The hash table is that of a part of the history, never that of the listing.
        scored = keys.slice(start, NIGHT_ROWS).combine_chunks()
        todo &= pc.is_null(pc.index_in(keys, value_set=scored)).to_numpy()
    seconds = time.perf_counter() - began
    if todo.sum() != new or not todo[:new].all():
        raise SystemExit("wrong: the difference is not what was left out")
    results.append(Result("left to score", new, seconds, keys.nbytes))
    return results


def listed(first: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Rows of a simulated listing: URL, version and size of a photograph."""
    for start in range(first, stop, 65_536):
        numbers = np.arange(start, min(start + 65_536, stop))
        yield pa.RecordBatch.from_pydict(
            {
                "image": [
                    f"s3://field/incoming/station-{i % 40:03d}/2026/11/IMG_{i:08d}.jpg"
                    for i in numbers
                ],
                "version": [f"{i * 2654435761 % 2**32:08x}{i:024x}" for i in numbers],
                "size": numbers,
            }
        )


PARTS: dict[str, Callable[[int], list[Result]]] = {
    "index": index,
    "order": order,
    "decisions": decisions,
    "night": night,
}


def measured(part: str, count: int) -> tuple[list[Result], float]:
    """(results, peak memory [MiB]) of a part, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, part, count).result()


def _measure(part: str, count: int) -> tuple[list[Result], float]:
    before = _memory("VmRSS")
    results = PARTS[part](count)
    return results, _memory("VmHWM") - before


def _memory(name: str) -> float:
    """A line of this process's memory in /proc [MiB]; getrusage would give the parent's peak."""
    (line,) = re.findall(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return int(line) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.planning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--training", type=int, default=1_000_000, help="training images")
    parser.add_argument("--photographs", type=int, default=1_000_000, help="of a night's listing")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, such as index,night")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(PARTS):
        parser.error(f"--only {options.only}: no part {', '.join(sorted(unknown))}")
    print(f"{'':<28}{'count':>13}{'seconds':>10}{'size [MB]':>13}{'peak [MiB]':>12}")
    for part in options.only.split(","):
        count = options.photographs if part == "night" else options.training
        results, peak = measured(part, count)
        for result in results:
            print(
                f"{result.what:<28}{result.number:>13,}{result.seconds:>10.1f}"
                f"{result.size / 1e6:>13,.1f}{peak:>12,.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
