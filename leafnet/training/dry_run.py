"""`jobs/train.py --dry-run`: all that a run needs is tried, its plan is told, and nothing stays."""

import itertools
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray

from leafnet.core import hardware, storage, terminal
from leafnet.core.errors import UserError
from leafnet.core.hardware import Machine
from leafnet.core.terminal import say
from leafnet.data import shards
from leafnet.data.shards import SPLITS, Shard, ShardIndex
from leafnet.distributed import resources, session
from leafnet.features import cache as features_cache
from leafnet.features.cache import Part, Plan, cache_key
from leafnet.models import resnet, runtime
from leafnet.models.classifier import Head, initial_head
from leafnet.models.weights import FEATURES, Weights
from leafnet.training.finetune import fit, state
from leafnet.training.loop import steps_per_epoch
from leafnet.training.settings import FineTuneSettings, TrainSettings, describe_stages

# Of each view in a part: the features in float16, and row, view and label.
_VIEW_BYTES = FEATURES * 2 + 3 * 4
# Of a part beside its views: Parquet's pages and footer.
_PART_BYTES = 3_000
# Round figures: a process that fits a head, the one that drives the job, Ray's own together.
_TENSORFLOW_BYTES, _DRIVER_BYTES, _RAY_BYTES = 900_000_000, 500_000_000, 600_000_000
# Row groups of decoded photographs that are between the stages for each actor.
_GROUPS_BETWEEN = 4


@dataclass(frozen=True)
class Work:
    """What is to be done."""

    views: int  # of all splits
    cached: int  # of them, how many are computed already
    batches: int  # passes of the backbone for the others
    steps_per_epoch: int
    steps: int
    batch_size: int  # global batch of the head


@dataclass(frozen=True)
class Room:
    """What it takes [bytes]."""

    cache: int  # of the features, all of them
    cache_new: int  # of the features that are computed
    local: int  # of the copy of the features on each node that fits the head
    photographs: int  # decoded, on each node that fine-tunes; 0: none are kept
    checkpoints: int  # of fine-tuning, all that are kept
    memory: int  # of a node, at most


def feature_work(
    cached: Plan,
    *,
    batch_size: int,
    train_examples: int,
    global_batch: int,
    epochs: int,
) -> Work:
    """The steps of a run.

    Args:
        cached: what the features' cache has and lacks.
        batch_size: views in a pass of the backbone.
        train_examples: in the training split.
        global_batch: examples of a step of the head.
        epochs: of the head.
    """
    batch = min(global_batch, train_examples)
    steps = steps_per_epoch(train_examples, batch)
    return Work(
        views=views(cached.parts),
        cached=views(cached.present),
        # A part is computed by itself, and its last batch is often not full.
        batches=sum(-(-views([part]) // batch_size) for part in cached.missing),
        steps_per_epoch=steps,
        steps=steps * epochs,
        batch_size=batch,
    )


def views(parts: Sequence[Part]) -> int:
    """Views in `parts`."""
    return sum(part.rows * (part.stop - part.first) for part in parts)


def cache_bytes(parts: Sequence[Part]) -> int:
    """Bytes of the files of `parts`."""
    return views(parts) * _VIEW_BYTES + len(parts) * _PART_BYTES


def local_bytes(examples: Mapping[str, int], views: int) -> int:
    """Bytes of the arrays that a node maps: features and labels of every split.

    >>> local_bytes({"train": 1000, "valid": 10, "test": 0}, views=8)
    32813000
    """
    total = sum(examples.values())
    vectors = examples["train"] * views + total - examples["train"]
    return vectors * FEATURES * 2 + total * 4


def photograph_bytes(examples: Mapping[str, int], image_size: int, *, most: float) -> int:
    """Bytes of the decoded photographs of train and valid that each node keeps, `most` of a split.

    >>> photograph_bytes({"train": 900, "valid": 300}, 160, most=1e9)
    92160000
    """
    of_each = (examples[split] * image_size**2 * 3 for split in ("train", "valid"))
    return sum(size for size in of_each if size <= most)


def node_memory(
    *,
    actors: int,
    actor_bytes: int,
    workers: int,
    row_group: int,
    image_size: int,
    tuner_bytes: int = 0,
) -> int:
    """Bytes that a node needs: while features are computed, the head is fitted, or it fine-tunes.

    Args:
        actors: processes with the network on the node; 0: all features are there.
        actor_bytes: of each.
        workers: processes that fit the head on the node.
        row_group: rows of the largest.
        image_size: pixels.
        tuner_bytes: of each process that fine-tunes; 0: none does.
    """
    between = actors * _GROUPS_BETWEEN * row_group * image_size**2 * 3
    stages = (actors * actor_bytes + between, workers * max(_TENSORFLOW_BYTES, tuner_bytes))
    return _RAY_BYTES + _DRIVER_BYTES + max(stages)


def extraction_seconds(missing: int, rate: float, actors: int) -> float:
    """Seconds for `missing` views where each of `actors` computes `rate` of them a second.

    >>> extraction_seconds(7800, 39.0, 2)
    100.0
    """
    return missing / (rate * actors)


# A process computes at most so many views on CPUs at a time, and so many batches or seconds, to
# tell how fast it is, and takes so many steps of fine-tuning.
_VIEWS, _BATCHES, _STEPS, _SECONDS = 16, 4, 4, 2.0
# Arrays of a checkpoint of fine-tuning for each variable: it, two moments, two averages.
_GROUPS = 5


class _Rate(NamedTuple):
    """What a process with the network does, as measured."""

    per_second: float  # views, or examples that are learnt from
    memory: int  # bytes, its peak


class _Tuning(NamedTuple):
    """What fine-tuning takes."""

    steps: int
    seconds: float  # for the steps alone
    rate: _Rate
    photographs: int  # bytes that are decoded and kept on each node
    checkpoints: int  # bytes


def run(
    settings: TrainSettings,
    run: str,
    index: ShardIndex,
    weights: Weights,
    *,
    views: int,
) -> None:
    """Check what the driver has not yet checked, on every node, and print the plan.

    Args:
        settings: of the run.
        run: its folder or URL, which need not exist.
        index: of the data set, its shards' sizes checked.
        weights: loaded.
        views: of each training image.

    Raises:
        UserError: a store refuses, a node has other versions or does not see the data, or a disk
            is too small.
    """
    began = time.monotonic()
    terminal.keeps("it was a dry run, there is nothing to keep")
    cache = storage.absolute(settings.cache.url or storage.join(settings.out, "features"))
    stores = tuple(dict.fromkeys((settings.out, cache)))
    with _quiet(), session.session(settings.ray) as nodes:
        say(f"dry run   {run}: nothing is trained, and nothing stays")
        _say_data(index)
        say(f"weights   {weights.source}, fingerprint {weights.fingerprint[:16]}")
        found = session.on_every_node(_look, index.root, _sample(index), stores)
        _say_nodes(found)
        say(f"storage   written, read, listed and deleted: {', '.join(stores)}")
        machines = resources.machines(nodes, settings.gpu)
        count, cpus = resources.workers_for(nodes, settings.workers, machines.gpus)
        workers = count if isinstance(count, int) else count[1]  # of a range the most
        precision, why = session.choose_precision(settings.precision, gpu=machines.gpus > 0)
        batch_size = resources.batch_size(settings.batch_size, gpus=machines.gpus)
        say(f"device    {resources.device(machines.gpus)}, {precision} ({why})")
        key = cache_key(
            weights_fingerprint=weights.fingerprint,
            image_size=settings.image_size,
            precision=precision,
        )
        root = storage.join(cache, key)
        wanted = [(shard, views if shard.split == "train" else 1) for shard in index.shards]
        cached = features_cache.plan(root, wanted, seed=settings.seed)
        work = feature_work(
            cached,
            batch_size=batch_size,
            train_examples=index.examples("train"),
            global_batch=settings.head.batch_size,
            epochs=settings.head.epochs,
        )
        say(
            f"features  {work.views:,} views, {work.cached:,} of them computed already; "
            f"{work.batches:,} batches of {batch_size} to go"
        )
        say(f"          cache {root}")
        say(
            f"head      {settings.head.epochs} epochs of {work.steps_per_epoch:,} steps = "
            f"{work.steps:,}; {shared_out(work.batch_size, workers)}"
        )
        measured = None
        if cached.missing:
            task = ray.remote(
                num_cpus=machines.cpus_per_actor, num_gpus=1 if machines.gpus else 0, max_calls=1
            )(_measure)
            measured = ray.get(
                task.remote(
                    weights.convolutions,
                    settings.image_size,
                    precision,
                    batch_size,
                    machines.threads_per_actor,
                    machines.gpus > 0,
                )
            )
        tuning = None
        if settings.fine_tune.blocks:
            tuning = _plan_tuning(
                settings, index, weights, precision, workers, cpus, gpu=machines.gpus > 0
            )
    counts = {split: index.examples(split) for split in SPLITS}
    room = Room(
        cache=cache_bytes(cached.parts),
        cache_new=cache_bytes(cached.missing),
        local=local_bytes(counts, views),
        photographs=tuning.photographs if tuning else 0,
        checkpoints=tuning.checkpoints if tuning else 0,
        memory=node_memory(
            actors=-(-machines.actors // len(nodes)) if measured else 0,
            actor_bytes=measured.memory if measured else 0,
            workers=-(-workers // len(nodes)),
            row_group=max(max(shard.row_groups) for shard in index.shards),
            image_size=settings.image_size,
            tuner_bytes=tuning.rate.memory if tuning else 0,
        ),
    )
    _say_room(room, run, cache, found)
    seconds = None
    if measured:
        seconds = extraction_seconds(work.views - work.cached, measured.per_second, machines.actors)
        say(
            f"time      {terminal.duration(seconds)} for the features: {machines.actors} "
            f"process{'es' * (machines.actors > 1)}, {measured.per_second:,.1f} views/s each, as "
            "just measured"
        )
    if tuning:
        say(
            f"{'' if measured else 'time':10}{terminal.duration(tuning.seconds)} for the steps of "
            f"fine-tuning: {workers} worker{'s' * (workers > 1)}, {tuning.rate.per_second:,.1f} "
            "images/s each, as just measured"
        )
    if measured or tuning:
        left = "start, head, and fine-tuning's validation" if tuning else "start and head"
        say(f"          {left} come on top")
    else:
        say("time      that of the start and the head; all features are there")
    if settings.features == "online":
        passes = settings.head.epochs * index.examples("train")
        say(f"          and the network over {passes:,} more views, as --features online wants")
    _refuse_small_disks(room, run, cache, found)
    terminal.result(
        run=run,
        plan={
            **vars(work),
            **vars(room),
            "views_per_second": measured and round(measured.per_second, 2),
            "features_seconds": seconds and round(seconds, 1),
            "fine_tune_steps": tuning and tuning.steps,
            "fine_tune_seconds": tuning and round(tuning.seconds, 1),
            "precision": precision,
            "workers": workers,
            "gpus": machines.gpus,
            "fingerprint": index.fingerprint,
            "weights_fingerprint": weights.fingerprint,
        },
    )
    say(f"all is well; checked in {terminal.duration(time.monotonic() - began)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """What libraries print goes to a log that stays only where something of ours is wrong."""
    folder = Path(tempfile.mkdtemp(prefix="leafnet-"))
    keep = False
    try:
        with terminal.chatter_to(folder / "dry-run.log"):
            yield
    except Exception as error:
        keep = not isinstance(error, UserError)
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _sample(index: ShardIndex) -> tuple[Shard, ...]:
    """The first shard of each split."""
    return tuple(index.of_split(split)[0] for split in SPLITS if index.of_split(split))


def _look(root: str, sample: tuple[Shard, ...], stores: tuple[str, ...]) -> Machine:
    """What the node is, once it has shown that it can read the data and write the results."""
    found = hardware.look()
    for shard in sample:
        try:
            rows = shards.read_columns(root, shard, ["label"]).num_rows
        except FileNotFoundError:
            raise UserError(
                "shards-not-shared",
                f"{storage.join(root, shard.name)} is not on the machine {found.host}; give "
                "--shards as a URL or on a shared disk",
            ) from None
        except pa.ArrowException as error:
            raise UserError(
                "shard-changed",
                f"{storage.join(root, shard.name)} is not the file that was prepared ({error}); "
                "prepare the data set again",
            ) from None
        if rows != shard.rows:
            raise UserError(
                "shard-changed",
                f"{storage.join(root, shard.name)} has {rows:,} rows, the index says "
                f"{shard.rows:,}; prepare the data set again",
            )
    for store in stores:
        storage.try_rights(store)
    return found


def _measure(
    weights: Any, image_size: int, precision: str, batch_size: int, threads: int, gpu: bool
) -> _Rate:
    """How fast a process computes features, once it has started."""
    hardware.limit_threads(threads, gpu=gpu)
    network = resnet.build(weights, image_size=image_size, precision=precision)
    views = batch_size if gpu else min(batch_size, _VIEWS)
    stack = np.zeros((views, image_size, image_size, 3), np.uint8)
    network.predict_on_batch(stack)  # the first time it is compiled
    began, batches = time.monotonic(), 0
    for _ in runtime.run(network, itertools.repeat(stack, _BATCHES)):
        batches += 1
        if time.monotonic() - began > _SECONDS:
            break
    rate = batches * views / (time.monotonic() - began)
    return _Rate(rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _measure_steps(
    weights: Any,
    head: Head,
    settings: FineTuneSettings,
    image_size: int,
    precision: str,
    threads: int,
    gpu: bool,
) -> _Rate:
    """How fast a worker takes steps of fine-tuning, once it has started."""
    hardware.limit_threads(threads, gpu=gpu)
    rate = fit.measured_rate(
        weights=weights,
        head=head,
        settings=settings,
        precision=precision,
        image_size=image_size,
        steps=_STEPS,
        seconds=_SECONDS,
    )
    return _Rate(rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _plan_tuning(
    settings: TrainSettings,
    index: ShardIndex,
    weights: Weights,
    precision: str,
    workers: int,
    cpus: float,
    *,
    gpu: bool,
) -> _Tuning:
    """What fine-tuning takes on `workers` of `cpus` each, some steps of one of them tried."""
    tuned, examples = settings.fine_tune, index.examples("train")
    fit.check_batch(tuned, examples=examples, workers=workers)
    batch = min(tuned.batch_size, examples)
    per_epoch = steps_per_epoch(examples, batch)
    steps = tuned.epochs * per_epoch
    say(
        f"fine-tune {describe_stages(tuned.blocks)}, {tuned.epochs} epochs of {per_epoch:,} steps "
        f"= {steps:,}; {shared_out(batch, workers)}"
    )
    head = initial_head(settings.head.units, len(index.class_names), inputs=FEATURES, seed=0)
    share = max(2, batch // workers // 2 * 2)  # examples may be mixed in pairs
    task = ray.remote(num_cpus=cpus, num_gpus=1 if gpu else 0, max_calls=1)(_measure_steps)
    rate = ray.get(
        task.remote(
            weights.convolutions,
            head,
            tuned.model_copy(update={"batch_size": share}),
            settings.image_size,
            precision,
            max(1, round(cpus)),
            gpu,
        )
    )
    trained = state.initial_arrays(weights.convolutions, head, tuned.blocks)
    of_one = _GROUPS * sum(array.nbytes for array in trained.values())
    return _Tuning(
        steps=steps,
        seconds=steps * batch / (rate.per_second * workers),
        rate=rate,
        photographs=photograph_bytes(
            {split: index.examples(split) for split in SPLITS},
            settings.image_size,
            most=tuned.local_gb * 1e9,
        ),
        # The one that is being written is beside those that are kept.
        checkpoints=(settings.checkpoint.keep + 1) * of_one,
    )


def shared_out(batch: int, workers: int | tuple[int, int]) -> str:
    """How a global batch is shared by some workers, or by a range of them.

    >>> shared_out(32, 2), shared_out(32, (1, 4))
    ('global batch 32, 16 on each of 2 workers', 'global batch 32, on 1 to 4 workers')
    """
    if isinstance(workers, tuple):
        return f"global batch {batch}, on {workers[0]} to {workers[1]} workers"
    each = f"{batch / workers:g} on each of {workers} worker{'s' * (workers > 1)}"
    return f"global batch {batch}, {each}"


def _say_data(index: ShardIndex) -> None:
    counts = "/".join(f"{index.examples(split):,}" for split in SPLITS)
    size = sum(shard.bytes for shard in index.shards)
    say(
        f"data      {counts} images for train/valid/test, {len(index.class_names)} classes, "
        f"{len(index.shards):,} shards of {size / 1e6:,.1f} MB in all"
    )
    say(f"          fingerprint {index.fingerprint[:16]}; every shard has the size of the index")


def _say_nodes(found: dict[str, Machine]) -> None:
    for name, node in found.items():
        gpus = f"{len(node.gpus)} GPUs, " if node.gpus else ""
        say(
            f"node      {name}: {node.cores} cores, {gpus}{_gb(node.memory_free)} of "
            f"{_gb(node.memory)} memory and {_gb(node.disk_free)} of disk free"
        )
    lines = hardware.differing({name: _comparable(node.versions) for name, node in found.items()})
    if lines:
        raise UserError(
            "versions-differ", f"{lines[0]}; install the same on all, see constraints.txt"
        )
    versions = next(iter(found.values())).versions
    shown = {name: versions[name] for name in ("python", "tensorflow", "keras", "ray", "leafnet")}
    say("versions  " + ", ".join(f"{name} {version}" for name, version in shown.items()))


def _comparable(versions: dict[str, str]) -> dict[str, str]:
    """Of Python the minor version, since pickles of one read on all of its patches."""
    return versions | {"python": ".".join(versions["python"].split(".")[:2])}


def _say_room(room: Room, run: str, cache: str, found: dict[str, Machine]) -> None:
    folder = next(iter(found.values())).folder
    say(
        f"disk      {_mb(room.cache_new)} of features to come, {_mb(room.cache)} with those there, "
        f"in {cache}"
    )
    say(f"          {_mb(room.local)} in {folder} of each node that fits the head, while it does")
    if room.checkpoints:
        say(
            f"          {_mb(room.photographs)} of decoded photographs there while it fine-tunes"
            if room.photographs
            else "          no decoded photographs there: they are more than --fine_tune.local_gb, "
            "and decoded in each epoch"
        )
        say(f"          {_mb(room.checkpoints)} of checkpoints of fine-tuning in {run}")
    least = min(node.memory_free for node in found.values())
    say(f"memory    about {_gb(room.memory)} on a node; {_gb(least)} are free on the fullest")
    if room.memory > least:
        say(
            "          that is too little: end what else runs there, or give a smaller --batch_size"
        )


def _refuse_small_disks(room: Room, run: str, cache: str, found: dict[str, Machine]) -> None:
    for name, node in found.items():
        for size, what, instead in (
            (room.local, "features", "give fewer --views"),
            (room.photographs, "decoded photographs", "give less --fine_tune.local_gb"),
        ):
            if size > node.disk_free:
                raise UserError(
                    "disk-full",
                    f"{node.folder} of {name} has {_mb(node.disk_free)} free, and the {what} take "
                    f"{_mb(size)}; make room, set TMPDIR to a larger disk, or {instead}",
                )
    for folder, size, what, instead in (
        (cache, room.cache_new, "features", "give another --cache.url, or fewer --views"),
        (run, room.checkpoints, "checkpoints of fine-tuning", "give another --out"),
    ):
        if storage.is_local(folder):
            there = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
            free = shutil.disk_usage(there).free
            if size > free:
                raise UserError(
                    "disk-full",
                    f"{folder} has {_mb(free)} free, and the {what} take {_mb(size)}; make room, "
                    f"or {instead}",
                )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
