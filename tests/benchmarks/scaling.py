"""(e) Extraction by one against two single-threaded actors."""

import shutil
import time
from dataclasses import replace

import ray

from leafnet.core.settings import RaySettings
from leafnet.data import shards
from leafnet.distributed import session
from leafnet.distributed.resources import Machines
from leafnet.features import cache, extraction
from leafnet.models import rates
from leafnet.models.weights import load_weights
from tests.benchmarks.rows import Bench, Row, write_copy

IMAGE_SIZE, VIEWS, SPLITS = 128, 2, ("valid", "test")


def rows(bench: Bench) -> list[Row]:
    # Small row groups: with eight for two actors, one would wait for the other at the end.
    root = bench.work / "small-groups"
    write_copy(bench.shards, root, row_group=32)
    with session.session(RaySettings(cpus=2)):
        rates = {actors: _rate(replace(bench, shards=root), actors) for actors in (1, 2)}
    peer = "one single-threaded actor"
    return [
        Row("e", peer, rates[1], "views/s", 1.0, peer),
        Row("e", "two, efficiency", rates[2], "views/s", rates[2] / (2 * rates[1]), peer),
    ]


def _rate(bench: Bench, actors: int) -> float:
    """Views per second after the first fifth, when all actors have started, until the last."""
    index = shards.read_index(str(bench.shards))
    weights = load_weights(bench.weights)
    root = bench.work / f"scaling{actors}"
    shutil.rmtree(root, ignore_errors=True)
    wanted = [(shard, VIEWS) for split in SPLITS for shard in index.of_split(split)]
    plan = cache.plan(str(root), wanted, seed=0)
    total = sum(part.rows * (part.stop - part.first) for part in plan.missing)
    done, times = 0, []

    def advance(count: int) -> None:
        nonlocal done
        done += count
        times.append((time.perf_counter(), done))

    extraction.extract(
        index,
        plan,
        ray.put(weights.convolutions),
        image_size=IMAGE_SIZE,
        precision=rates.precision(image_size=IMAGE_SIZE, threads=1),
        batch_size=32,
        machines=Machines(gpus=0, actors=actors, threads_per_actor=1, cpus_per_actor=0.75),
        advance=advance,
    )
    shutil.rmtree(root, ignore_errors=True)
    middle = [(when, count) for when, count in times if 0.2 * total <= count <= 0.8 * total]
    (began, first), (ended, last) = middle[0], middle[-1]
    return (last - first) / (ended - began)
