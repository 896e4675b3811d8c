"""Listing difference at a million photographs: seconds and peak memory.

    python -m tests.benchmarks.ledger                      # a simulated listing, published nights
    python -m tests.benchmarks.ledger --files 200000       # really listed from the disk as well
    python -m tests.benchmarks.ledger --ray                # Ray Data's checkpoint filter instead

Thirty published nights tell of all photographs but ten thousand, some of which failed. The target
is 60 s and 1 GiB for listing and filtering.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from leafnet.scoring import ledger, listing, reading, staging
from leafnet.scoring import rows as scoring_rows

CLASSES = ("early_blight", "healthy", "late_blight")
MODEL = "0123456789abcdef"
NIGHTS, NEW = 30, 10_000
CHUNK = 65_536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listed", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=0, help="real files to list")
    parser.add_argument("--ray", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="leafnet-bench-") as folder:
        if arguments.files:
            list_files(Path(folder), arguments.files)
        if arguments.ray:
            filter_with_ray(Path(folder), arguments.listed)
        else:
            compare(folder, arguments.listed)


def compare(out: str, listed: int) -> None:
    write_nights(out, listed)
    tell("before", 0.0)
    began = time.perf_counter()
    photographs = pa.Table.from_batches(list(batches(0, listed)))
    tell(f"listing of {listed:,} in memory ({photographs.nbytes / 1e6:,.0f} MB)", began)
    began = time.perf_counter()
    files = ledger.published(out)
    scored = ledger.history(files, model_id=MODEL, schema=scoring_rows.schema(CLASSES))
    difference = ledger.difference(photographs, scored, date="2026-12-01", retries=2)
    tell(f"{len(files)} nights read and filtered", began)
    began = time.perf_counter()
    new = photographs.filter(pa.array(difference.todo))
    tell(f"{len(new):,} to score, {difference.again:,} of them again", began)
    if difference.already_done + len(new) != listed or len(new) - difference.again != NEW:
        raise SystemExit("wrong: the difference is not what was left out")


def list_files(folder: Path, count: int) -> None:
    began = time.perf_counter()
    for i in range(count):
        if i % 1000 == 0:
            below = folder / "incoming" / f"day-{i // 1000:05d}"
            below.mkdir(parents=True)
        (below / f"IMG_{i:08d}.jpg").touch()
    tell(f"{count:,} files made", began)
    began = time.perf_counter()
    found = listing.look(str(folder / "incoming")).photographs
    tell(f"{len(found):,} files listed", began)


def filter_with_ray(folder: Path, listed: int) -> None:
    """The same difference by Ray Data: ids in its checkpoint, its filter in front of a count."""
    import ray
    import ray.data
    from ray.data.checkpoint import CheckpointConfig

    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    for i, batch in enumerate(batches(NEW, listed)):
        pq.write_table(pa.table({"image": batch["image"]}), checkpoint / f"{i:06d}.parquet")
    source = folder / "listing"
    source.mkdir()
    for i, batch in enumerate(batches(0, listed)):
        pq.write_table(pa.table({"image": batch["image"]}), source / f"{i:06d}.parquet")
    ray.init(num_cpus=4, log_to_driver=False)  # with 2 it waits for ever
    context: Any = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig(
        id_column="image", checkpoint_path=str(checkpoint), delete_checkpoint_on_success=False
    )
    began = time.perf_counter()
    found = ray.data.read_parquet(str(source)).map_batches(lambda b: b, batch_format="pyarrow")
    out = folder / "out"
    found.write_parquet(str(out))
    rows = sum(pq.read_metadata(path).num_rows for path in out.glob("*.parquet"))
    tell(f"{rows:,} rows left by Ray Data's filter", began)


def batches(first: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Rows `first` to `stop` of the simulated listing."""
    for start in range(first, stop, CHUNK):
        numbers = np.arange(start, min(start + CHUNK, stop))
        yield pa.RecordBatch.from_pydict(
            {
                "image": [
                    f"s3://field/incoming/station-{i % 40:03d}/2026/11/IMG_{i:08d}.jpg"
                    for i in numbers
                ],
                "version": [f"{i * 2654435761 % 2**32:08x}{i:024x}" for i in numbers],
                "size": numbers,
                "row": pa.nulls(len(numbers), pa.int32()),
            },
            schema=listing.SCHEMA,
        )


def write_nights(out: str, listed: int) -> None:
    """Thirty nights of predictions for all but the first rows; one row in a thousand failed."""
    schema = scoring_rows.schema(CLASSES, model_id=MODEL, run_id="run")
    for night, numbers in enumerate(np.array_split(np.arange(NEW, listed), NIGHTS)):
        path = Path(staging.target(out, f"2026-11-{night + 1:02d}", f"run-{night}"))
        path.parent.mkdir(parents=True)
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in batches(int(numbers[0]), int(numbers[-1]) + 1):
                writer.write_table(made_rows(batch, schema))


def made_rows(batch: pa.RecordBatch, schema: pa.Schema) -> pa.Table:
    photographs = pa.table(
        {
            name: batch[name] if name in ("image", "version") else pa.nulls(len(batch), field)
            for name, field in zip(reading.PHOTOGRAPH.names, reading.PHOTOGRAPH.types, strict=True)
        }
    )
    failed = np.array(["cannot-read: OSError: it was away"] * len(batch), object)
    failed[np.arange(len(batch)) % 1000 != 0] = None
    reasons = pa.array(failed, pa.string())
    photographs = photographs.set_column(3, "reason", reasons)
    logits = np.random.default_rng(0).normal(size=(reasons.null_count, len(CLASSES)))
    return scoring_rows.rows(
        photographs,
        logits.astype(np.float32),
        None,
        output=schema,
        class_names=CLASSES,
        review=None,
        model_id=MODEL,
        run_id="run",
    )


def tell(what: str, began: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.perf_counter() - began if began else 0.0
    print(f"{seconds:7.1f} s   peak {peak:6,.0f} MiB   {what}", flush=True)


if __name__ == "__main__":
    main()
