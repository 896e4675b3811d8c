"""A group of Ray Train workers under `tf.distribute`: starting it and hearing what it says."""

import json
import os
import socket
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray._private.worker import get_dashboard_url
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from leafnet import storage
from leafnet.backbone import limit_threads
from leafnet.cluster import Board
from leafnet.errors import UserError
from leafnet.features import DamagedParts
from leafnet.training import Place

# Called from a worker with (kind, value); the driver gets each in the order in which they come.
Post = Callable[[tuple[str, Any]], Any]
# What each worker does, with the job, its place among the workers, and the folder of checkpoints.
Loop = Callable[[Any, Place, Post, str], None]


def run(
    loop: Loop,
    job: Any,
    *,
    name: str,
    workers: int,
    cpus_per_worker: float,
    gpu: bool,
    storage_path: str,
    on_event: Callable[[tuple[str, Any]], None],
) -> None:
    """Let `workers` processes run `loop` together, from their last checkpoint if there is one.

    Args:
        loop: must be importable by name; runs under `ray.train`, with TF_CONFIG set.
        job: what it is called with; small, it is sent to each worker.
        name: of the folder of checkpoints below `storage_path`.
        workers: how many.
        cpus_per_worker: CPUs that Ray sets aside for each; also its threads.
        gpu: a GPU for each.
        storage_path: folder or URL of the run.
        on_event: called in the driver with each event that a worker posts.

    Raises:
        UserError: a worker met something that the person can mend.
        features.DamagedParts: the cache has to be repaired first.
    """
    board = Board()
    errors: list[Exception] = []

    def hear(event: tuple[str, Any]) -> None:
        if event[0] == "error":
            errors.append(event[1])
        else:
            on_event(event)

    filesystem, path = storage.arrow_filesystem(storage_path)
    # A shard that was read by the driver is the same for every worker; the job is small.
    trainer = _Trainer(
        _work,
        train_loop_config={
            "loop": loop,
            "job": job,
            "board": board.handle,
            "gpu": gpu,
            "folder": storage.join(storage_path, name),
        },
        backend_config=_TensorflowConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": cpus_per_worker}
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        with board.follow(hear):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        # Ray's own text is a stack trace; what the person can mend is what a worker said, or what
        # Ray's controller met when it wrote beside the checkpoints.
        cause = errors[-1] if errors else getattr(error, "controller_failure", None)
        if isinstance(cause, UserError):
            raise cause from None
        raise
    for said in errors:
        if not _passes(said):
            raise said


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

    def _register_sigint_handler(self, controller: Any) -> None:
        """Not: Ray's answers Ctrl-C by ending the process with code 0, also long after the fit."""


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
    """What Ray Train calls in each worker."""
    post = config["board"].post.remote
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size())
    try:
        limit_threads(_threads(), gpu=config["gpu"])
        config["loop"](config["job"], place, post, config["folder"])
    except (UserError, DamagedParts) as error:
        ray.get(post(("error", error)))
        # Only what may pass is raised. Other workers may not have met it and wait for this one;
        # Ray Train ends them and tries again. All else fails every time.
        if _passes(error):
            raise


def _passes(error: Exception) -> bool:
    """True for what a store is to blame for."""
    return isinstance(error, UserError) and error.reason in storage.OF_STORES


def _threads() -> int:
    resources: dict[str, float] = ray.get_runtime_context().get_assigned_resources()
    return max(1, round(resources.get("CPU", 1)))
