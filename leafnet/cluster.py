"""Ray: starting it, what it has, and the workers of Ray Train that fit the head."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import ray
import ray.data
import ray.exceptions
import ray.train
from numpy.typing import NDArray
from ray._private.worker import get_dashboard_url
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from leafnet import backbone, checkpoint, features, novelty, review, shards, storage, training
from leafnet.backbone import limit_threads
from leafnet.classifier import Head, fold_standardisation, head_logits
from leafnet.config import SPLITS, HeadSettings, RaySettings
from leafnet.errors import UserError
from leafnet.features import Part, SplitFeatures
from leafnet.images import decode
from leafnet.metrics import Tally, empty_tally, tally
from leafnet.novelty import Novelty
from leafnet.review import Outcomes
from leafnet.shards import Shard

# A CPU actor computes in at most so many threads: ResNet50 gains little from more, and a node
# with many cores is better used by several actors.
_MAX_THREADS = 4
_CPU_BATCH, _GPU_BATCH = 32, 256
_POLL_S = 0.25
_CONNECT_S = 10.0

# Ray Data's shuffles ask for worker processes of their own by the last two variables, and to start
# those takes seconds for each of a shuffle's two stages. With both given to all tasks, the same
# processes serve every stage. The session has to be given this, and each task beside a shuffle too:
# Ray spells that of a job differently, and takes another spelling for another environment.
SHUFFLE_ENV = {
    "env_vars": {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "RAY_DATA_SHUFFLE_MAP_WORKER": "1",
        "RAY_DATA_SHUFFLE_REDUCE_WORKER": "1",
    }
}

_HEAD = "head"  # Ray Train's folder in that of the run

_WORKER_ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "2"}
# Ray Train's watcher of spot machines is a process, its metrics are for the dashboard, and it looks
# whether workers are done every 2 s.
_LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
}


class Node(NamedTuple):
    """A machine of the cluster."""

    cpus: float
    gpus: float


@contextmanager
def session(
    settings: RaySettings, *, runtime_env: dict[str, Any] | None = None
) -> Iterator[list[Node]]:
    """The nodes of the cluster that the settings name, or of a local one, until the block ends.

    Where this process is connected already, it only looks, and stays connected.

    Raises:
        UserError: no cluster answers at the address, or a task of the block raised it.
    """
    connected = ray.is_initialized()
    if not connected:
        address = settings.address or os.environ.get("RAY_ADDRESS")
        local = address is None
        if address is not None:
            _check_listening(address)
        if local:
            # What Ray starts here inherits the environment. A runtime environment would make it
            # throw away the processes that it starts in advance, and the dashboard starts seven:
            # both cost seconds of a job of less than a minute.
            for name, value in {**_WORKER_ENVIRONMENT, **_LOCAL_ENVIRONMENT}.items():
                os.environ.setdefault(name, value)
        elif runtime_env is None:
            runtime_env = {"env_vars": _WORKER_ENVIRONMENT}
        try:
            ray.init(
                address=settings.address,
                num_cpus=settings.cpus if local else None,
                include_dashboard=False if local else None,
                logging_level=logging.WARNING,
                runtime_env=runtime_env,
            )
        except (ConnectionError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                "no-cluster",
                f"cannot use a Ray cluster at {address or 'this machine'}: {reason}",
            ) from None
        except BaseException:
            # Interrupted. A Ray that is half there crashes the process when Python ends.
            ray.shutdown()
            raise
    # Ray Data draws bars of its own; leafnet shows one for each stage.
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield [
            Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
            for node in _ray_nodes()
            if node["Alive"]
        ]
    except ray.exceptions.RayTaskError as error:
        # Ray's own text is the stack trace of the task; what the person can mend is its cause, to
        # whose one line Ray Data adds lines on its settings.
        cause = error.cause
        if isinstance(cause, UserError):
            line = str(cause).splitlines()[0]
            raise UserError(cause.reason, line, exit_code=cause.exit_code) from None
        raise
    finally:
        if not connected:
            ray.shutdown()


def _check_listening(address: str) -> None:
    """Refuse a host:port where nothing listens: `ray.init` tries for 75 s, then ends the process.

    Raises:
        UserError: nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # `auto` and `local` are for Ray to find
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise UserError(
            "no-cluster",
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or "
            "leave --ray.address and RAY_ADDRESS out for a local one",
        ) from None


def _ray_nodes() -> list[dict[str, Any]]:
    return list(ray.nodes())


class Machines(NamedTuple):
    """How the network is spread over a cluster by Ray Data."""

    gpus: int  # 0: on CPUs
    actors: int
    threads_per_actor: int
    cpus_per_actor: float


def machines(nodes: list[Node], gpu: bool | Literal["auto"]) -> Machines:
    """One actor for each GPU; without, one for every few cores, a quarter of them kept to decode.

    Actors that took all CPUs would leave none to the tasks that feed them, and the job would wait
    for ever without a word.

    Raises:
        UserError: GPUs are asked for and there are none.

    >>> machines([Node(2, 0)], "auto")
    Machines(gpus=0, actors=1, threads_per_actor=2, cpus_per_actor=1.5)
    """
    gpus = int(sum(node.gpus for node in nodes)) if gpu else 0
    cpus = sum(node.cpus for node in nodes)
    if gpu is True and not gpus:
        raise UserError("no-gpu", "--gpu true, but the cluster has no GPU; give --gpu auto")
    if gpus:
        return Machines(gpus, gpus, max(1, int(cpus / gpus) - 1), 1.0)
    threads = max(1, min(_MAX_THREADS, int(max(node.cpus for node in nodes))))
    actors = max(1, sum(int(node.cpus) // threads for node in nodes))
    return Machines(0, actors, threads, 0.75 * threads)


def device(gpus: int) -> str:
    """What the network runs on, for people."""
    return f"{gpus} GPU" if gpus else "CPU"


def batch_size(wanted: int | Literal["auto"], *, gpus: int) -> int:
    """Images in one pass of the network.

    >>> batch_size("auto", gpus=0), batch_size("auto", gpus=1), batch_size(7, gpus=1)
    (32, 256, 7)
    """
    if wanted != "auto":
        return wanted
    return _GPU_BATCH if gpus else _CPU_BATCH


def choose_precision(wanted: str, *, gpu: bool) -> tuple[str, str]:
    """(precision, why), for `wanted` one of auto, float32, bfloat16: the best all nodes have."""
    if wanted != "auto":
        return wanted, "as set"
    look = ray.remote(num_cpus=0)(_local_precision)
    found: set[tuple[str, str]] = set()
    me = ray.get_runtime_context().get_node_id()
    for node in _ray_nodes():
        if node["Alive"] and (not gpu or node["Resources"].get("GPU")):
            if node["NodeID"] == me:  # a task would take a process to start
                found.add(_local_precision(gpu))
                continue
            here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                node["NodeID"], soft=False
            )
            found.add(ray.get(look.options(scheduling_strategy=here).remote(gpu)))
    return max(found)  # "float32" sorts last: one node without bfloat16 decides for all


def _local_precision(gpu: bool) -> tuple[str, str]:
    capability = None
    if gpu:
        # Not TensorFlow: it would take the GPU's memory to answer.
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        major, minor = min(line.strip() for line in text.splitlines()).split(".")
        capability = (int(major), int(minor))
    return backbone.choose_precision("auto", compute_capability=capability)


@ray.remote(num_cpus=0)
class _Events:
    """Events from workers to the driver, in the order in which they come."""

    def __init__(self) -> None:
        self._events: list[Any] = []

    def post(self, event: Any) -> None:
        self._events.append(event)

    def take(self) -> list[Any]:
        taken, self._events = self._events, []
        return taken


class Board:
    """Where workers post events for the driver: progress, rows of the history, results."""

    def __init__(self) -> None:
        self.handle = _Events.remote()  # type: ignore[attr-defined]  # made by the decorator

    @contextmanager
    def follow(self, on_event: Callable[[Any], None]) -> Iterator[None]:
        """Call `on_event` with each event, in a thread, as it comes, until the block ends."""
        over = threading.Event()

        def take() -> None:
            for event in ray.get(self.handle.take.remote()):
                on_event(event)

        def poll() -> None:
            while not over.wait(_POLL_S):
                take()

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        take()


@dataclass(frozen=True)
class HeadJob:
    """All that a worker has to know to fit the head."""

    head: HeadSettings
    class_names: tuple[str, ...]
    seed: int
    save_every_s: float
    identity: dict[str, Any]  # what a checkpoint must agree with
    cache_root: str  # CACHE/KEY
    parts: dict[str, tuple[Part, ...]]  # of each split
    views: int  # of the training split in the cache
    online: "Online | None" = None


@dataclass(frozen=True)
class Online:
    """What `features: online` needs beside the cached plain views."""

    root: str  # of the shards
    shards: tuple[Shard, ...]  # of the training split
    weights: Any  # reference to `backbone.Weights.convolutions`
    image_size: int
    precision: str
    augment: bool
    batch_size: int


@dataclass
class HeadResult:
    """What the workers made."""

    state: checkpoint.TrainState
    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]
    tallies: dict[str, Tally]  # every example of every split once, by the best head
    novelty: Novelty
    outcomes: dict[str, Outcomes]  # of each example of valid and test, in order, by the best head


def workers_for(nodes: list[Node], workers: int | Literal["auto"], gpus: int) -> tuple[int, float]:
    """(number of workers, CPUs of each) for Ray Train.

    Raises:
        UserError: more workers than GPUs.

    >>> workers_for([Node(2, 0)], "auto", 0), workers_for([Node(2, 0)], 2, 0)
    ((1, 2.0), (2, 1.0))
    >>> workers_for([Node(3, 0), Node(3, 0)], 3, 0)  # not 2.0: one node can hold only one such
    (3, 1.5)
    """
    count = (gpus or 1) if workers == "auto" else workers
    if gpus and count > gpus:
        raise UserError(
            "too-few-gpus",
            f"--workers {count}, but the cluster has {gpus} GPUs; give fewer, or --gpu false",
        )
    total = sum(node.cpus for node in nodes)
    share = min(total / count, max(node.cpus for node in nodes))
    share = float(int(share)) if share >= 1 else share
    # Workers cannot be cut over nodes: shrink until enough fit.
    while sum(int(node.cpus / share) for node in nodes) < count:
        share *= 0.75
    return count, share


def fit_head(
    job: HeadJob,
    *,
    workers: int,
    cpus_per_worker: float,
    gpu: bool,
    storage_path: str,
    on_epoch: Callable[[dict[str, float]], None],
) -> HeadResult:
    """Fit the head with Ray Train, from the last checkpoint below `storage_path` if there is one.

    Raises:
        UserError: the loss is not finite, or a checkpoint belongs to other settings.
        features.DamagedParts: the cache has to be repaired first.
    """
    board = Board()
    posted: dict[str, Any] = {"tallies": []}

    def on_event(event: tuple[str, Any]) -> None:
        kind, value = event
        if kind == "epoch":
            on_epoch(value)
        elif kind == "tallies":
            posted["tallies"].append(value)
        else:
            posted[kind] = value

    filesystem, path = storage.arrow_filesystem(storage_path)
    # A shard that was read by the driver is the same for every worker; the job is small.
    trainer = _Trainer(
        _work,
        train_loop_config={
            "job": job,
            "board": board.handle,
            "gpu": gpu,
            "folder": storage.join(storage_path, _HEAD),
        },
        backend_config=_TensorflowConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": cpus_per_worker}
        ),
        run_config=ray.train.RunConfig(
            name=_HEAD,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        with board.follow(on_event):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        # Ray's own text is a stack trace; what the person can mend is what a worker said, or what
        # Ray's controller met when it wrote beside the checkpoints.
        cause = posted.get("error", getattr(error, "controller_failure", None))
        if isinstance(cause, UserError):
            raise cause from None
        raise
    if "error" in posted and "result" not in posted:
        raise posted["error"]
    result: HeadResult = posted["result"]
    for split in SPLITS:
        result.tallies[split] = sum(
            (tallies[split] for tallies in posted["tallies"]), empty_tally(len(job.class_names))
        )
    return result


class _Trainer(DataParallelTrainer):
    """Without the process that removes the workers of a dead controller where Ray has no dashboard.

    It asks the dashboard whether the controller lives, and seen here in Ray 2.60 it takes no answer
    for a no: the workers are killed in the middle of the fit. On a Ray of our own all ends with
    the job anyway.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        if get_dashboard_url():
            return list(callbacks)
        return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]


class _TensorflowConfig(BackendConfig):
    """Tells each worker of the others in TF_CONFIG, as `ray.train.tensorflow.TensorflowTrainer`.

    To import that imports TensorFlow, 4 s each in the driver and in the controller before a worker
    is started; of all processes only the workers need it.
    """

    @property
    def backend_cls(self) -> type["_TensorflowBackend"]:
        return _TensorflowBackend


class _TensorflowBackend(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        addresses = worker_group.execute(_free_address)
        ray.get(
            [
                worker_group.execute_single_async(rank, _set_tf_config, addresses, rank)
                for rank in range(len(worker_group))
            ]
        )


def _free_address() -> str:
    with socket.socket(socket.AF_INET6 if ":" in _node_ip() else socket.AF_INET) as listener:
        listener.bind(("", 0))
        host = f"[{_node_ip()}]" if ":" in _node_ip() else _node_ip()
        return f"{host}:{listener.getsockname()[1]}"


def _node_ip() -> str:
    return str(ray.util.get_node_ip_address())


def _set_tf_config(addresses: list[str], rank: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
    )


def _work(config: dict[str, Any]) -> None:
    """The training loop of one Ray Train worker."""
    job: HeadJob = config["job"]
    post = config["board"].post.remote
    context = ray.train.get_context()
    place = training.Place(context.get_world_rank(), context.get_world_size())
    try:
        limit_threads(_threads(), gpu=config["gpu"])
        local = local_features(job)
        _fit_and_evaluate(job, place, local, post, config["folder"])
        # What is mapped stays readable for the workers of this node that still have it open.
        shutil.rmtree(local.folder, ignore_errors=True)
    except (UserError, features.DamagedParts) as error:
        ray.get(post(("error", error)))
        # Only what a store is to blame for is raised. Other workers may not have met it and wait
        # for this one; Ray Train ends them and tries again. All else fails every time.
        if isinstance(error, UserError) and error.reason in storage.OF_STORES:
            raise


def _threads() -> int:
    resources: dict[str, float] = ray.get_runtime_context().get_assigned_resources()
    return max(1, round(resources.get("CPU", 1)))


def _fit_and_evaluate(
    job: HeadJob,
    place: training.Place,
    local: "LocalFeatures",
    post: Callable[[Any], Any],
    folder_url: str,
) -> None:
    splits, mean, deviation = local.splits, local.mean, local.deviation
    train = splits["train"]
    gather = (
        _online_views(job, job.online, place)
        if job.online
        else training.cached_views(train.features, seed=job.seed)
    )

    def report(row: dict[str, float], state: checkpoint.TrainState | None, save: bool) -> None:
        if place.rank == 0:
            post(("epoch", row))
        if not save:
            return
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if state is not None:
                checkpoint.save(folder, state, identity=job.identity)
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(
                {"epoch": row["epoch"]},
                checkpoint=saved,
                checkpoint_upload_fn=None if storage.is_local(folder_url) else upload,
            )

    def upload(saved: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        # Ray's own way is `pyarrow.fs.copy_files`, which to an fsspec filesystem loses the errors
        # of writing (pyarrow 26): a checkpoint would count that is not there.
        storage.upload_folder(saved.path, storage.join(folder_url, name))
        # Ray Train compares filesystems, and two of the same settings are not equal.
        managed = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(
            f"{managed.experiment_fs_path}/{name}", managed.storage_filesystem
        )

    state = None
    found = ray.train.get_checkpoint()
    if found is not None:
        with found.as_directory() as folder:
            state = checkpoint.load(folder, identity=job.identity)
    state = training.fit_head(
        training.TrainingData(gather, train.labels, splits["valid"], mean, deviation),
        settings=job.head,
        num_classes=len(job.class_names),
        seed=job.seed,
        place=place,
        save_every_s=job.save_every_s,
        report=report,
        state=state,
    )
    head = fold_standardisation(state.best_head, mean=mean, deviation=deviation)
    tallies = {}
    for split, (of_split, labels) in splits.items():
        tallies[split] = empty_tally(len(job.class_names))
        start, stop = training.even_split(labels.size, place)
        for at in range(start, stop, 8192):
            rows = slice(at, min(at + 8192, stop))
            tallies[split] += tally(head_logits(head, of_split[rows, 0]), labels[rows])
    ray.get(post(("tallies", tallies)))
    if place.rank == 0:
        distance = novelty.fit(train.features[:, 0])
        outcomes = {
            split: _outcomes(splits[split], head, distance)
            for split in ("valid", "test")
            if splits[split].labels.size
        }
        ray.get(post(("result", HeadResult(state, mean, deviation, {}, distance, outcomes))))


def _outcomes(split: SplitFeatures, head: Head, distance: Novelty) -> Outcomes:
    parts = []
    for at in range(0, split.labels.size, 8192):
        of_part = np.asarray(split.features[at : at + 8192, 0], np.float32)
        parts.append(
            review.outcomes(
                head_logits(head, of_part), split.labels[at : at + 8192], distance.distance(of_part)
            )
        )
    return Outcomes(*map(np.concatenate, zip(*parts, strict=True)))


class LocalFeatures(NamedTuple):
    """Every split's features, memory-mapped from `folder` on this node's disk."""

    folder: Path
    splits: dict[str, SplitFeatures]
    mean: NDArray[np.float32]  # [D] of the training features
    deviation: NDArray[np.float32]  # [D]


def local_features(job: HeadJob) -> LocalFeatures:
    """The features that `job` names; all processes of a node share one copy, which stays there.

    Raises:
        features.DamagedParts: the cache has to be repaired first.
    """
    names = "\n".join(part.name for split in SPLITS for part in job.parts[split])
    digest = hashlib.sha256(f"{job.cache_root}\n{job.views}\n{names}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"leafnet-{os.getuid()}" / digest
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for split in SPLITS:
            mapped, labels = folder / f"{split}.npy", folder / f"{split}.labels.npy"
            if labels.exists():
                splits[split] = SplitFeatures(np.load(mapped, mmap_mode="r"), np.load(labels))
                continue
            views = job.views if split == "train" else 1
            parts = job.parts[split]
            splits[split] = features.assemble(job.cache_root, parts, views, path=str(mapped))
            if splits[split].labels.size:
                _save(labels, splits[split].labels)
        statistics = folder / "statistics.npy"
        if not statistics.exists():
            _save(
                statistics,
                np.stack(features.statistics(features.moments(splits["train"].features))),
            )
    mean, deviation = np.load(statistics)
    return LocalFeatures(folder, splits, mean, deviation)


def _save(path: Path, array: NDArray[Any]) -> None:
    aside = path.with_name("partial.npy")
    np.save(aside, array)
    os.replace(aside, path)


def _online_views(job: HeadJob, online: Online, place: training.Place) -> training.Gather:
    """Gather that draws a fresh view of each photograph in each epoch and runs the backbone.

    Every worker keeps the encoded photographs of the training split in memory.
    """
    tables = [
        table.select(["key", "image"])
        for shard in online.shards
        for table in shards.row_groups(online.root, shard)
    ]
    keys = [key for table in tables for key in table.column("key").to_pylist()]
    images = [image for table in tables for image in table.column("image").to_pylist()]
    weights = ray.get(online.weights)
    network = backbone.build(weights, image_size=online.image_size, precision=online.precision)

    def gather(indices: NDArray[np.int64], epoch: int) -> NDArray[np.floating]:
        out = np.empty((indices.size, backbone.FEATURES), np.float32)
        for start in range(0, indices.size, online.batch_size):
            rows = indices[start : start + online.batch_size]
            stack = np.zeros((online.batch_size, online.image_size, online.image_size, 3), np.uint8)
            for i, row in enumerate(rows):
                stack[i] = features.draw_view(
                    decode(images[row], online.image_size).pixels,
                    key=keys[row],
                    number=epoch + 1 if online.augment else 0,
                    seed=job.seed,
                )
            out[start : start + rows.size] = network.predict_on_batch(stack)[: rows.size]
        return out

    return gather
