"""Ray: starting it, what it has, and how work is spread over it."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import ray
import ray.autoscaler.sdk
import ray.data
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from leafnet.core.errors import UserError
from leafnet.core.interrupts import sigterm_interrupts
from leafnet.core.settings import RaySettings, worker_range
from leafnet.core.terminal import say
from leafnet.distributed import resources
from leafnet.distributed.resources import Node

_WAIT_POLL_S = 1.0
_ASK_S = 5.0  # between two looks at what the autoscaler does
_PATIENCE_S = 18.0  # until an autoscaler has begun to start machines
_TELL_S = 60.0
_SEE_S = 120.0  # for a worker to import TensorFlow
_CONNECT_S = 10.0

_WORKER_ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "2"}
# Ray Train's watcher of spot machines is a process, its metrics are for the dashboard, and it looks
# whether workers are done every 2 s.
_LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # As many processes as there are CPUs are kept for the next task, and actors count among them:
    # on two CPUs none is left, and every decoding task would start one anew, after a second of idle
    # time. That took 14 % of scoring at 70 images/s.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}


@contextmanager
def session(settings: RaySettings) -> Iterator[list[Node]]:
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
        try:
            with interrupts_wait():
                ray.init(
                    address=settings.address,
                    num_cpus=settings.cpus if local else None,
                    include_dashboard=False if local else None,
                    logging_level=logging.WARNING,
                    runtime_env=None if local else {"env_vars": _WORKER_ENVIRONMENT},
                )
        except (ConnectionError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "Version mismatch" not in str(error):
                ray.shutdown()
                raise
            reason = " ".join(str(error).split())
            if "Version mismatch" in reason:
                raise UserError(
                    "other-version",
                    f"the Ray cluster at {address or 'this machine'} has other versions than this "
                    f"process ({_versions(reason)}); install the same here and there, or submit "
                    "the job to the cluster",
                ) from None
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
        # Ray's own handler, set by `init`, would end the job without a word.
        with sigterm_interrupts():
            yield _nodes()
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


def _versions(message: str) -> str:
    """Both versions in Ray's message on a mismatch, which is of many lines.

    >>> _versions("The cluster was started with: Ray: 2.9.0 Python: 3.10.1 This process on node "
    ...     "10.0.0.1 was started with: Ray: 2.55.1 Python: 3.11.7")
    'cluster: Ray 2.9.0, Python 3.10.1; here: Ray 2.55.1, Python 3.11.7'
    """
    found = re.findall(r"(Ray|Python): (\S+)", message)
    half = len(found) // 2
    told = [
        ", ".join(f"{name} {version}" for name, version in part)
        for part in (found[:half], found[half:])
    ]
    return f"cluster: {told[0]}; here: {told[1]}"


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C wait until the block is over; another one does not wait.

    Ray starts processes with `fork`, and an interruption meanwhile is raised in hooks of Python,
    which forget it, or leave a lock held: seen here, the job went on, or hung for ever.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[int] = []

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        before(came[0], None)


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


def _nodes() -> list[Node]:
    return [
        Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in _ray_nodes()
        if node["Alive"]
    ]


def with_room(
    nodes: list[Node], gpu: bool | Literal["auto"], workers: int | str, settings: RaySettings
) -> list[Node]:
    """`nodes`, or those of a cluster that was asked for what a job needs, and waited for.

    A job is planned once, when it starts, on the nodes that are there: a cluster that is scaled to
    zero has none. Where GPUs were counted that TensorFlow does not see, none are given.

    Args:
        nodes: of the cluster.
        gpu: True: GPUs are needed. With `auto` nobody knows whether to wait for some.
        workers: how many, or a range, of which the fewest are needed.
        settings: how long to wait; a Ray of this job's own is not waited for.

    Raises:
        UserError: there is no room, and nothing is on its way; TensorFlow sees no GPU, and has to.
    """
    span = worker_range(workers)
    count = span[0] if span else 1 if workers == "auto" else int(workers)

    def suffice(nodes: list[Node]) -> bool:
        return resources.room(nodes, gpu=gpu is True) >= (count if gpu is True else 1)

    if not suffice(nodes) and not _is_local(settings):
        what = f"{count} GPU{'s' * (count > 1)}" if gpu is True else "CPUs"
        say(
            f"waiting   for {what}, at most {settings.wait:g} s (--ray.wait); the cluster has "
            f"{resources.described(nodes)}"
        )
        # Without an autoscaler nobody reads it.
        bundles = [{"CPU": 1, "GPU": 1} if gpu is True else {"CPU": 1}] * count
        ray.autoscaler.sdk.request_resources(bundles=bundles)
        try:
            for found in _coming(settings.wait, before=nodes):
                nodes = found
                if suffice(nodes):
                    break
        finally:
            # What runs keeps its machines; a request that stays would keep them for ever.
            ray.autoscaler.sdk.request_resources(bundles=[])
    if not suffice(nodes):
        raise resources.no_room(nodes, count, gpu=gpu is True)
    return _with_seen_gpus(nodes, gpu) if gpu else nodes


def _coming(wait_s: float, *, before: list[Node]) -> Iterator[list[Node]]:
    """The nodes of the cluster every second, while some are on their way."""
    began = asked = told = time.monotonic()
    coming = False
    while (now := time.monotonic()) < began + wait_s:
        time.sleep(_WAIT_POLL_S)
        nodes = _nodes()
        yield nodes
        if now - began > _PATIENCE_S and not coming:
            return  # no autoscaler, or none that can bring what is needed
        if now - asked > _ASK_S and not coming:
            asked = now
            coming = len(nodes) > len(before) or _are_pending()
        if now - told > _TELL_S:
            told = now
            say(
                f"waiting   since {now - began:.0f} s; the cluster has {resources.described(nodes)}"
            )


def _are_pending() -> bool:
    """True while the cluster's autoscaler, of whatever kind, starts machines."""
    # What `ray status` prints has no other public form that autoscalers of both versions have.
    command = [sys.executable, "-m", "ray.scripts.scripts", "status"]
    command += ["--address", ray.get_runtime_context().gcs_address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CONNECT_S)
    except subprocess.TimeoutExpired:
        return False
    _, _, pending = done.stdout.partition("Pending:")
    lines = pending.partition("Recent failures:")[0].strip()
    return bool(lines) and "no pending nodes" not in lines


def _with_seen_gpus(nodes: list[Node], gpu: bool | Literal["auto"]) -> list[Node]:
    """`nodes` without GPUs where TensorFlow in a worker sees none on some of them.

    Ray counts what a machine has or was told to have, and not what the installation can use; it
    could not be told to pass over such a machine.

    Raises:
        UserError: `gpu` is True.
    """
    task = ray.remote(num_cpus=0, num_gpus=1, max_calls=1, max_retries=0)(_count_gpus)
    asked = {}
    for node in _ray_nodes():
        if node["Alive"] and node["Resources"].get("GPU", 0) >= 1:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[task.options(scheduling_strategy=here).remote()] = node["NodeManagerHostname"]
    # GPUs that another job has do not answer, and were seen by it.
    done, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=_SEE_S)
    for one in waiting:
        ray.cancel(one)
    blind = sorted({asked[one] for one in done if not ray.get(one)})
    if not blind:
        return nodes
    found = f"TensorFlow sees no GPU on {', '.join(blind)}, where Ray has some"
    if gpu is True:
        remedy = "jobs/doctor.py says there what is missing; give --gpu false to do without"
        raise UserError("no-gpu", f"{found}; {remedy}")
    say(f"device    {found}: all runs on CPUs")
    return [node._replace(gpus=0.0) for node in nodes]


def _count_gpus() -> int:
    import tensorflow as tf

    return len(tf.config.list_physical_devices("GPU"))


def _is_local(settings: RaySettings) -> bool:
    """True for a Ray of this job's own, which nothing will join."""
    return settings.address is None and "RAY_ADDRESS" not in os.environ


def on_every_node(
    function: Callable[..., Any], *args: Any, gpu: bool = False, cpus: float = 0.0
) -> dict[str, Any]:
    """What `function` of `args` gives on each node, by its name; of those with so many `cpus`.

    A task without a CPU on each; on this process's node the function is called here, since a task
    would take a process to start.

    Args:
        function: to call.
        args: of it.
        gpu: only on nodes with GPUs.
        cpus: only on nodes with at least as many [CPUs].
    """
    me = ray.get_runtime_context().get_node_id()
    found: dict[str, Any] = {}
    for node in _ray_nodes():
        has = node["Resources"]
        if not node["Alive"] or (gpu and not has.get("GPU")) or has.get("CPU", 0.0) < cpus:
            continue
        name = f"{node['NodeManagerHostname']} {node['NodeID'][:6]}"
        here = node["NodeID"] == me
        found[name] = None if here else on_node(name, function, *args)
    return {
        name: function(*args) if answer is None else ray.get(answer)
        for name, answer in found.items()
    }


def on_node(
    name: str, function: Callable[..., Any], *args: Any, cpus: float = 0.0
) -> "ray.ObjectRef[Any]":
    """`function` of `args` as a task on the node of this name, in a process of its own."""
    (node,) = (node for node in _ray_nodes() if node["NodeID"].startswith(name.split()[-1]))
    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(num_cpus=cpus, max_calls=1)(_call)
    reference: ray.ObjectRef[Any] = task.options(scheduling_strategy=here).remote(function, *args)
    return reference


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)  # Ray takes functions alone for tasks, and not what is like one
