"""The private parts of Ray that leafnet replaces; each says why.

A new release of Ray is expected to break this file and no other.
"""

import json
import os
import random
import socket
import time
from contextlib import suppress
from typing import Any, cast

import ray
import ray.train
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._private.worker import get_dashboard_url
from ray.core.generated import gcs_pb2
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    CHECKPOINT_MANAGER_SNAPSHOT_FILENAME,
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    VALIDATE_STORAGE_MARKER_FILENAME,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState,
    _TrainingResultState,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

from leafnet.core import storage
from leafnet.distributed import heartbeat


def draining() -> dict[str, float]:
    """Nodes that Ray takes away soon: id -> seconds left, 0 where that is not known."""
    # Ray tells a worker of its own node alone, in `ray.train.get_context`.
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return {
        node: max(0.0, deadline / 1000 - time.time()) if deadline else 0.0
        for node, deadline in found.items()
    }


# Ray Train writes it into the folder of checkpoints before the workers start.
STORAGE_MARKER = VALIDATE_STORAGE_MARKER_FILENAME
# Why a group of workers did not start; Ray Train raises them, and does not export them.
NoRoom = WorkerGroupStartupTimeoutError
DiedAtStart = WorkerGroupStartupFailedError

# Between the ports of Ray's workers and those that systems give to connections.
_PORTS = range(20_000, 32_000)


def dashboard_url() -> str | None:
    """Where Ray's dashboard is; none: this Ray has none, and nothing that it would do is done."""
    # The public way to it is what `ray.init` returned, which a process that joined does not have.
    url: str | None = get_dashboard_url() or None
    return url


def metrics_interval_s() -> float:
    """How often a node reports its metrics [s]; a gauge not set for two of these is gone."""
    # A setting of the cluster: its value is in no public place.
    interval_s: float = ray._config.metrics_report_interval_ms() / 1000
    return interval_s


def free_resources() -> dict[str, dict[str, float]]:
    """What each node has left, by its id: `ray.available_resources` has only the sum of them."""
    free: dict[str, dict[str, float]] = ray._private.state.state.available_resources_per_node()
    return free


def free_place(controller: Any) -> None:
    """Free the CPUs and GPUs that a controller had set aside for its workers.

    Ray does so only at the end of the whole job where the controller was killed, and the next
    workers would wait for ever.
    """
    state, table = ray._private.state.state, cast(Any, gcs_pb2).PlacementGroupTableData
    for data in state._connect_and_get_accessor().get_placement_group_table():
        place = table.FromString(data)
        if place.creator_actor_id == controller._actor_id.binary() and place.state != table.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(place.placement_group_id)))


def tell_ray_train(folder: str, name: str | None) -> None:
    """Make the checkpoint `name` the only one that Ray Train knows of; none: there is none.

    It refuses to start at all where its own account was half written, or names a checkpoint that
    is gone.
    """
    url = storage.join(folder, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)
    if name is None:
        storage.delete(url)
        return
    known = _TrainingResultState(checkpoint_dir_name=name, metrics={})
    account = _CheckpointManagerState(
        checkpoint_results=[known],
        checkpoint_report_indices=[0],
        latest_checkpoint_result=known,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=1,
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    storage.write_bytes(url, account.model_dump_json().encode())


class Trainer(DataParallelTrainer):
    """Ray Train's, whose controller can be ended, without processes that do nothing here.

    One would hand out datasets, of which there are none. Two are left out where Ray has no
    dashboard, which is a Ray of our own. One asks for machines, which will not come. One removes
    the workers of a dead controller: it asks the dashboard whether the controller lives, and seen
    here in Ray 2.60 it takes no answer for a no, and the workers are killed in the middle of the
    fit; on a Ray of our own all ends with the job anyway.
    """

    controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        useless: tuple[type, ...] = (DatasetsCallback,)
        if not dashboard_url():
            useless += (PlacementGroupCleanerCallback,)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, useless)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if not dashboard_url():
            arguments["scaling_policy"] = _OnWhatIsThere(cast(Any, self.scaling_config))
        # As Ray Train's, which keeps the controller to itself, and makes of an interruption an
        # end with code 0.
        env_vars = get_env_vars_to_propagate()
        env_vars.setdefault(
            RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR,
            DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
        )
        here = ray.get_runtime_context().get_node_id()
        controller = ray.remote(
            num_cpus=0,
            label_selector={"ray.io/node-id": here},
            runtime_env={"env_vars": env_vars},
        )(TrainController)
        self.controller = controller.remote(**arguments)
        ray.get(self.controller.run.remote())
        return ray.get(self.controller.get_result.remote())


class _OnWhatIsThere(FixedScalingPolicy):
    """Asks for no machines; the start of a fit waited for the process that would be asked."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class TensorflowConfig(BackendConfig):
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
                worker_group.execute_single_async(rank, _set_up, addresses, rank)
                for rank in range(len(worker_group))
            ]
        )


def _free_address() -> str:
    """An address of this machine that TensorFlow can listen on when it is imported, seconds later.

    Not a port that the system gives: it gives the same ones to every connection out of here.
    """
    ip = node_ip()
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    port = 0
    for port in random.Random(os.urandom(8)).sample(_PORTS, 100):
        with socket.socket(family) as listener, suppress(OSError):
            listener.bind(("", port))
            break
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def node_ip() -> str:
    return str(ray.util.get_node_ip_address())


def _set_up(addresses: list[str], rank: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
    )
    heartbeat.leave_on_sigterm()
    heartbeat.write_stacks_on_signal()
