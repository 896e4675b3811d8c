"""Reading and scoring from an S3 server on this machine against the same from its disk.

    python -m tests.benchmarks.s3                       # about three minutes on two cores
    python -m tests.benchmarks.s3 --score 0             # reading alone, half a minute

Drawn photographs of 256 pixels in shards, read, checked and decoded as jobs/train.py does; and as
small objects through jobs/score.py with a ResNet50 for 256 pixels, which is what a night is. Server
and job share the cores, so what a request costs either of them counts.
Targets: shards within 1.25 times the time from disk, a night within 1.3 times.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from leafnet.core import storage
from leafnet.data import images, shards
from leafnet.data.shards import ShardIndex
from leafnet.scoring import listing
from leafnet.scoring.reading import _read_all
from tests.benchmarks.score import write_model, write_photographs
from tests.support import s3_server

JOB = Path(__file__).parents[2] / "jobs" / "score.py"
BUCKET = "s3://benchmark"
ROUNDS = 5
SHARD = 256  # photographs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--read", type=int, default=1500, help="photographs in shards")
    parser.add_argument("--score", type=int, default=2000, help="photographs of a night; 0: none")
    parser.add_argument("--image-size", type=int, default=256, help="of the network [pixels]")
    given = parser.parse_args()
    if not s3_server.has_radosgw():
        raise SystemExit(s3_server.LEFT_OUT)
    with tempfile.TemporaryDirectory(prefix="leafnet-bench-") as name:
        folder = Path(name)
        with s3_server.radosgw(folder) as server:
            os.environ |= server.environment()
            # Two processes read, as Ray's tasks do; forked before this one has threads.
            with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
                list(pool.map(time.sleep, [0.5] * 2))
                storage.filesystem(BUCKET)[0].call_s3("create_bucket", Bucket=BUCKET[5:])
                reading(pool, folder, given.read, given.image_size)
            if given.score:
                night(folder, given.score, given.image_size)


def reading(pool: Executor, folder: Path, count: int, image_size: int) -> None:
    photographs = write_photographs(folder / "to_read", count)
    indices = {"disk": write_shards(photographs, str(folder / "shards"))}
    indices["S3"] = write_shards(photographs, f"{BUCKET}/shards")
    size = sum(shard.bytes for shard in indices["disk"].shards)
    print(f"{count:,} photographs in {len(indices['disk'].shards)} shards, {size / 1e6:.0f} MB")

    def read(place: str, size: int | None) -> None:
        index = indices[place]
        list(pool.map(read_shard, [(index.root, shard, size) for shard in index.shards]))

    told("  bytes, sha256 checked", lambda place: read(place, None))
    told("  and decoded", lambda place: read(place, image_size), target=1.25)


def write_shards(photographs: Path, root: str) -> ShardIndex:
    paths = sorted(photographs.iterdir())
    written = []
    for start in range(0, len(paths), SHARD):
        rows = [
            {"key": path.name, "image": path.read_bytes(), "label": i % 3, "split": "train"}
            | {"width": 256, "height": 256, "sha256": ""}
            for i, path in enumerate(paths[start : start + SHARD])
        ]
        table = pa.Table.from_pylist(rows, shards.SCHEMA)
        name = f"train-{start // SHARD:05d}.parquet"
        written.append(shards.write_shard(root, name, table, row_group=256))
    return shards.write_index(
        root, class_names="abc", shards=written, counts={"train": {}}, prepared={}
    )


def read_shard(task: tuple[str, shards.Shard, int | None]) -> None:
    root, shard, image_size = task
    for table in shards.row_groups(root, shard):
        for image in table["image"].to_pylist():
            if image_size:
                images.decode(image, image_size)


def night(folder: Path, count: int, image_size: int) -> None:
    photographs = write_photographs(folder / "incoming", count)
    incoming = {"disk": str(photographs), "S3": f"{BUCKET}/incoming"}

    def put(path: Path) -> None:
        storage.write_bytes(f"{incoming['S3']}/{path.name}", path.read_bytes())

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(put, photographs.iterdir()))
    size = sum(path.stat().st_size for path in photographs.iterdir())
    print(f"{count:,} photographs as objects, {size / 1e6:.0f} MB")
    listed = {place: listing.look(url).photographs for place, url in incoming.items()}
    told("  bytes alone", lambda place: list(_read_all(listed[place])))
    model = write_model(folder / "model", image_size=image_size)
    outs = {"disk": str(folder / "out"), "S3": f"{BUCKET}/out"}
    rates = {}

    def score(place: str) -> None:
        arguments = ["--model", model, "--images", incoming[place], "--out", outs[place]]
        subprocess.run(
            [sys.executable, str(JOB), *arguments], check=True, stdout=subprocess.DEVNULL
        )
        (run,) = (f for f in storage.list_files(f"{outs[place]}/_runs") if "json" in f.url)
        rates[place] = json.loads(storage.read_bytes(run.url))["images_per_second"]

    told("  jobs/score.py, launch to exit", score, target=1.3, rounds=1)
    for place, rate in rates.items():
        print(f"  {place:4} {rate}")


def told(
    what: str, work: Callable[[str], object], *, target: float | None = None, rounds: int = ROUNDS
) -> None:
    """Print the seconds of `work` from disk and from S3, the best of rounds that alternate."""
    best = {"disk": float("inf"), "S3": float("inf")}
    for _ in range(rounds):
        for place in best:
            began = time.perf_counter()
            work(place)
            best[place] = min(best[place], time.perf_counter() - began)
    ratio = best["S3"] / best["disk"]
    judged = "" if target is None else f"   target {target}: {'met' if ratio <= target else 'NOT'}"
    print(
        f"{what:32} disk {best['disk']:7.2f} s   S3 {best['S3']:7.2f} s   {ratio:5.2f}{judged}",
        flush=True,
    )


if __name__ == "__main__":
    main()
