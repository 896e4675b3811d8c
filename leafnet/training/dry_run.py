"""`jobs/train.py --dry-run`: tries all that a run needs, prints its plan, and leaves nothing."""

import itertools
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from leafnet.distributed import session
from leafnet.features import cache as features_cache
from leafnet.models import resnet, runtime
from leafnet.models.classifier import Head, initial_head
from leafnet.models.weights import FEATURES
from leafnet.training.estimate import (
    Room,
    cache_bytes,
    extraction_seconds,
    feature_work,
    local_bytes,
    node_memory,
    photograph_bytes,
)
from leafnet.training.finetune import fit, state
from leafnet.training.plan import Plan, Resources, allocate, say_data, say_work
from leafnet.training.settings import FineTuneSettings

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


def run(plan: Plan) -> None:
    """Check what the driver has not yet checked, on every node, and print the plan.

    Args:
        plan: of the run, whose folder need not exist.

    Raises:
        UserError: a store refuses, a node has other versions or does not see the data, or a disk
            is too small.
    """
    began = time.monotonic()
    terminal.keeps("it was a dry run, there is nothing to keep")
    with _quiet(), session.session(plan.settings.ray) as nodes:
        say(f"dry run   {plan.url}: nothing is trained, and nothing stays")
        settings = plan.settings
        nodes = session.with_room(nodes, settings.gpu, settings.workers, settings.ray)
        machines = _check_nodes(plan)
        chosen = allocate(plan, nodes)
        say_work(plan, chosen)
        cached = plan.features_of(plan.weights, precision=chosen.precision, views=plan.views)
        work = feature_work(cached, batch_size=chosen.batch_size, steps=plan.head_steps)
        say(
            f"features  {work.views:,} views, {work.cached:,} of them computed already; "
            f"{work.batches:,} batches of {chosen.batch_size} to go"
        )
        say(f"          cache {cached.root}")
        measured = _measure_extraction(plan, chosen) if cached.missing else None
        tuning = _plan_tuning(plan, chosen) if plan.settings.fine_tune.blocks else None
    room = _room(plan, chosen, cached, measured, tuning)
    _say_room(room, plan.url, plan.cache, machines)
    seconds = None
    if measured:
        missing, actors = work.views - work.cached, chosen.machines.actors
        seconds = extraction_seconds(missing, measured.per_second, actors)
    _say_time(plan, chosen, seconds, measured, tuning)
    _refuse_small_disks(room, plan.url, plan.cache, machines)
    terminal.result(
        run=plan.url,
        plan={
            **vars(work),
            **vars(room),
            "views_per_second": measured and round(measured.per_second, 2),
            "features_seconds": seconds and round(seconds, 1),
            "fine_tune_steps": tuning and tuning.steps,
            "fine_tune_seconds": tuning and round(tuning.seconds, 1),
            "precision": chosen.precision,
            "workers": chosen.most_workers,
            "gpus": chosen.machines.gpus,
            "fingerprint": plan.index.fingerprint,
            "weights_fingerprint": plan.weights.fingerprint,
        },
    )
    say(f"all is well; checked in {terminal.duration(time.monotonic() - began)}")


def _check_nodes(plan: Plan) -> dict[str, Machine]:
    """Each node by its name, once all have read the data and written where the results go."""
    index, weights = plan.index, plan.weights
    say_data(plan)
    say(f"          fingerprint {index.fingerprint[:16]}; every shard has the size of the index")
    say(f"weights   {weights.source}, fingerprint {weights.fingerprint[:16]}")
    stores = tuple(dict.fromkeys((plan.settings.out, plan.cache)))
    machines = session.on_every_node(_look, index.root, _sample(index), stores)
    _say_nodes(machines)
    say(f"storage   written, read, listed and deleted: {', '.join(stores)}")
    return machines


def _measure_extraction(plan: Plan, chosen: Resources) -> _Rate:
    """What one process that computes features does, tried on the cluster."""
    task = ray.remote(
        num_cpus=chosen.machines.cpus_per_actor, num_gpus=1 if chosen.gpu else 0, max_calls=1
    )(_measure)
    rate: _Rate = ray.get(
        task.remote(
            plan.weights.convolutions,
            plan.settings.image_size,
            chosen.precision,
            chosen.batch_size,
            chosen.machines.threads_per_actor,
            chosen.gpu,
        )
    )
    return rate


def _room(
    plan: Plan,
    chosen: Resources,
    cached: features_cache.Plan,
    measured: _Rate | None,
    tuning: _Tuning | None,
) -> Room:
    index, nodes = plan.index, len(chosen.nodes)
    return Room(
        cache=cache_bytes(cached.parts),
        cache_new=cache_bytes(cached.missing),
        local=local_bytes({split: index.examples(split) for split in SPLITS}, plan.views),
        photographs=tuning.photographs if tuning else 0,
        checkpoints=tuning.checkpoints if tuning else 0,
        memory=node_memory(
            actors=-(-chosen.machines.actors // nodes) if measured else 0,
            actor_bytes=measured.memory if measured else 0,
            workers=-(-chosen.most_workers // nodes),
            row_group=max(max(shard.row_groups) for shard in index.shards),
            image_size=plan.settings.image_size,
            tuner_bytes=tuning.rate.memory if tuning else 0,
        ),
    )


def _say_time(
    plan: Plan,
    chosen: Resources,
    seconds: float | None,
    measured: _Rate | None,
    tuning: _Tuning | None,
) -> None:
    if measured and seconds is not None:
        actors = chosen.machines.actors
        say(
            f"time      {terminal.duration(seconds)} for the features: {actors} "
            f"process{'es' * (actors > 1)}, {measured.per_second:,.1f} views/s each, as "
            "just measured"
        )
    if tuning:
        workers = chosen.most_workers
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
    machine = hardware.look()
    for shard in sample:
        try:
            rows = shards.read_columns(root, shard, ["label"]).num_rows
        except FileNotFoundError:
            raise UserError(
                "shards-not-shared",
                f"{storage.join(root, shard.name)} is not on the machine {machine.host}; give "
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
    return machine


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


def _plan_tuning(plan: Plan, chosen: Resources) -> _Tuning:
    """What fine-tuning takes, after some of its steps were tried on one worker."""
    settings, index, steps = plan.settings, plan.index, plan.tuning_steps
    tuning, workers = settings.fine_tune, chosen.most_workers
    head = initial_head(settings.head.units, len(index.class_names), inputs=FEATURES, seed=0)
    share = max(2, steps.batch // workers // 2 * 2)  # examples may be mixed in pairs
    task = ray.remote(
        num_cpus=chosen.cpus_per_worker, num_gpus=1 if chosen.gpu else 0, max_calls=1
    )(_measure_steps)
    rate: _Rate = ray.get(
        task.remote(
            plan.weights.convolutions,
            head,
            tuning.model_copy(update={"batch_size": share}),
            settings.image_size,
            chosen.precision,
            chosen.threads_per_worker,
            chosen.gpu,
        )
    )
    trained = state.initial_arrays(plan.weights.convolutions, head, tuning.blocks)
    of_one = _GROUPS * sum(array.nbytes for array in trained.values())
    return _Tuning(
        steps=steps.total,
        seconds=steps.total * steps.batch / (rate.per_second * workers),
        rate=rate,
        photographs=photograph_bytes(
            {split: index.examples(split) for split in SPLITS},
            settings.image_size,
            most=tuning.local_gb * 1e9,
        ),
        # The one that is being written is beside those that are kept.
        checkpoints=(settings.checkpoint.keep + 1) * of_one,
    )


def _say_nodes(machines: dict[str, Machine]) -> None:
    for name, node in machines.items():
        gpus = f"{len(node.gpus)} GPUs, " if node.gpus else ""
        say(
            f"node      {name}: {node.cores} cores, {gpus}{_gb(node.memory_free)} of "
            f"{_gb(node.memory)} memory and {_gb(node.disk_free)} of disk free"
        )
    lines = hardware.differing(
        {name: _comparable(node.versions) for name, node in machines.items()}
    )
    if lines:
        raise UserError(
            "versions-differ", f"{lines[0]}; install the same on all, see constraints.txt"
        )
    versions = next(iter(machines.values())).versions
    shown = {name: versions[name] for name in ("python", "tensorflow", "keras", "ray", "leafnet")}
    say("versions  " + ", ".join(f"{name} {version}" for name, version in shown.items()))


def _comparable(versions: dict[str, str]) -> dict[str, str]:
    """Of Python the minor version, since pickles of one read on all of its patches."""
    return versions | {"python": ".".join(versions["python"].split(".")[:2])}


def _say_room(room: Room, run: str, cache: str, machines: dict[str, Machine]) -> None:
    folder = next(iter(machines.values())).folder
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
    least = min(node.memory_free for node in machines.values())
    say(f"memory    about {_gb(room.memory)} on a node; {_gb(least)} are free on the fullest")
    if room.memory > least:
        say(
            "          that is too little: end what else runs there, or give a smaller --batch_size"
        )


def _refuse_small_disks(room: Room, run: str, cache: str, machines: dict[str, Machine]) -> None:
    for name, node in machines.items():
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
