"""A group of Ray Train workers under `tf.distribute`, started again until what it does is done.

Each attempt is one fit of Ray Train. How it ended, from which checkpoint it goes on and on how many
workers is decided here in the driver, and not by Ray Train: its own way knows only the checkpoint
that it wrote last, whether that is whole or not, starts again at once and without a word, and takes
workers away in the middle of a step where it grows or shrinks a group.
"""

import json
import os
import random
import re
import socket
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import ray
import ray.exceptions
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
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

from leafnet import checkpoint, storage, watch
from leafnet.backbone import limit_threads
from leafnet.errors import UserError
from leafnet.features import DamagedParts
from leafnet.terminal import duration, raise_if_asked, say
from leafnet.training import Hooks, Leaving, Place
from leafnet.watch import Desk, Seen, Sign, Teller

# Called from a worker with (kind, value); the driver gets each in the order in which they come.
Post = Callable[[tuple[str, Any]], Any]
# What each worker does, with the job, its place among the workers, and the folder of checkpoints.
Loop = Callable[[Any, Place, Post, str], None]

RESTARTS = "restarts.json"

_POLL_S = 0.25
_LOOK_S = 2.0  # between two looks at the cluster
_GROW_AFTER_S = 20.0  # a group is not asked to make room for more workers before
_SETTLE_S = 3.0  # until Ray has noticed that a machine is gone, or its CPUs are free
# Between the ports of Ray's workers and those that systems give to connections.
_PORTS = range(20_000, 32_000)
_PORT_TAKEN = ("Could not start gRPC server", "Address already in use")
_PORT_TRIES = 5
_SILENT_S = 3.0  # three signs that did not come
_LEAVE_S = 20.0  # for the workers to save and leave; Kubernetes kills after 30
_PLACE_S = 60.0  # Ray Train waits so long for room
_STORE_S = 300.0  # one that is away or full is tried again for so long
_LONGEST_WAIT_S = 60.0
_SNIPPET = 300  # characters of an error in a line


@dataclass(frozen=True)
class Survival:
    """What is done about failures."""

    max_failures: int = 3  # in a row, without a new checkpoint in between
    hang_timeout_s: float = 300.0
    keep: int = 2  # checkpoints


@dataclass
class Restart:
    """Why and how a group of workers was started again."""

    at: str  # UTC
    why: str
    counted: bool  # False: planned, such as on a notice that a machine is taken away
    workers: int  # of the group that ended
    goes_on_from: str  # name of the checkpoint, or "the beginning"
    seconds: float | None = None  # until steps were taken again
    start_seconds: float | None = None  # of these, Ray Train's and TensorFlow's start


@dataclass
class _End:
    """How an attempt ended; all of it empty: as it should."""

    error: BaseException | None = None
    asked: str | None = None  # why the workers were asked to leave, if they were
    left: bool = False  # they saved and left
    killed: list[watch.Stuck] = field(default_factory=list)
    raised: list[Exception] = field(default_factory=list)  # by workers, for a person
    signs: list[Sign] = field(default_factory=list)
    silent: list[Seen] = field(default_factory=list)  # gave no sign of life when others failed


def run(
    loop: Loop,
    job: Any,
    *,
    name: str,
    workers: int | tuple[int, int],
    cpus_per_worker: float,
    gpu: bool,
    storage_path: str,
    on_event: Callable[[tuple[str, Any]], None],
    on_restart: Callable[[], None] = lambda: None,
    survival: Survival | None = None,
) -> list[Restart]:
    """Let worker processes run `loop` together until it is done, from the newest whole checkpoint.

    In the loop, `ray.train.get_checkpoint` is that one, `hooks` says how to be followed and when to
    leave, and `keep` saves a checkpoint.

    Args:
        loop: must be importable by name; runs under `ray.train`, with TF_CONFIG set.
        job: what it is called with; small, it is sent to each worker.
        name: of the folder of checkpoints below `storage_path`.
        workers: how many, or the fewest and the most.
        cpus_per_worker: CPUs that Ray sets aside for each; also its threads.
        gpu: a GPU for each.
        storage_path: folder or URL of the run.
        on_event: called in the driver with each event that a worker posts.
        on_restart: called before the workers start again: what they posted counts no more.
        survival: what is done about failures.

    Returns:
        Why and how the group was started again, with what earlier starts of the job left.

    Raises:
        UserError: a worker met something that the person can mend.
        features.DamagedParts: the cache has to be repaired first.
        RuntimeError: the workers failed too often.
    """
    group = _Group(
        loop,
        job,
        name=name,
        workers=(workers, workers) if isinstance(workers, int) else workers,
        cpus=cpus_per_worker,
        gpu=gpu,
        storage_path=storage_path,
        on_event=on_event,
        survival=survival or Survival(),
    )
    try:
        group.until_done(on_restart)
    except KeyboardInterrupt:
        group.say_kept()
        raise
    return group.restarts


class _Group:
    """The workers of one job, through all their attempts."""

    def __init__(
        self,
        loop: Loop,
        job: Any,
        *,
        name: str,
        workers: tuple[int, int],
        cpus: float,
        gpu: bool,
        storage_path: str,
        on_event: Callable[[tuple[str, Any]], None],
        survival: Survival,
    ) -> None:
        self._loop, self._job, self._name = loop, job, name
        self._workers, self._cpus, self._gpu = workers, cpus, gpu
        self._storage_path, self._folder = storage_path, storage.join(storage_path, name)
        self._on_event, self._survival = on_event, survival
        self._desk = Desk()
        self._attempt = 0
        self._count = 0
        self._failed_at: float | None = None
        self._ports = 0  # times that another process took a port first
        self._had = False  # a whole checkpoint was there
        self.restarts = read_restarts(self._folder)

    def until_done(self, on_restart: Callable[[], None]) -> None:
        """Start the workers until they are done, or have failed too often."""
        failures, before = 0, ""
        ended: _End | None = None
        while True:
            found = self._choose_checkpoint() or "the beginning"
            if ended is not None:
                planned = ended.asked is not None or _is_no_failure(ended.error)
                if _port_was_taken(ended.error) and self._ports < _PORT_TRIES:
                    self._ports, planned = self._ports + 1, True
                # Only failures without progress count: a night on machines that come and go has
                # many of them.
                failures = (0 if found != before else failures) + (not planned)
                if failures > self._survival.max_failures:
                    self._give_up(ended, failures)
                wait = 0.0 if planned else min(_LONGEST_WAIT_S, 2.0 ** (failures - 1))
                self._note(_why(ended), found, counted=not planned, wait=wait)
                time.sleep(wait)
                on_restart()
            before = found
            self._count = self._wait_for_room()
            ended = self._try()
            self._failed_at = time.monotonic()
            if ended.error is None and not ended.left:
                return

    def say_kept(self) -> None:
        """Tell what an interrupted job leaves behind."""
        with suppress(UserError):
            found = checkpoint.newest(self._folder, say)
            kept = storage.join(self._folder, found) if found else "nothing of this stage yet"
            say(f"kept      {kept}")

    def _give_up(self, end: _End, failures: int) -> None:
        cause = end.raised[-1] if end.raised else _controller_failure(end.error) or end.error
        if isinstance(cause, UserError):
            raise cause from None
        raise RuntimeError(
            f"the workers of {self._name} failed {failures} times without a new checkpoint in "
            f"between, at last: {_why(end)}"
        ) from end.error

    def _note(self, why: str, goes_on_from: str, *, counted: bool, wait: float) -> None:
        """Tell and keep why the workers start again."""
        say(f"restart   {why}")
        say(f"          goes on from {goes_on_from}" + (f" in {wait:g} s" if wait else ""))
        if self.restarts and not counted and self.restarts[-1].why == why:
            return  # still no room
        self.restarts.append(
            Restart(
                at=datetime.now(UTC).isoformat(timespec="seconds"),
                why=why,
                counted=counted,
                workers=self._count,
                goes_on_from=goes_on_from,
            )
        )
        self._store_restarts()

    def _store_restarts(self) -> None:
        # Told already; a store that is full or away must not end the run for it.
        with suppress(UserError, OSError):
            _check_shared(storage.join(self._folder, RESTARTS))
            storage.write_json(
                storage.join(self._folder, RESTARTS), [vars(one) for one in self.restarts]
            )

    def _choose_checkpoint(self) -> str | None:
        """Find the newest whole checkpoint, and make it Ray Train's last one."""
        deadline, wait = time.monotonic() + _STORE_S, 1.0
        while True:
            try:
                found = checkpoint.newest(self._folder, say)
                if found is None and self._had:
                    # A disk that is not mounted looks like a run that has not begun.
                    raise UserError(
                        "store-failed",
                        f"{self._folder} has no whole checkpoint any more: it is away, or they "
                        "were deleted",
                    )
                self._had = found is not None
                _tell_ray_train(self._folder, found)
                if found:
                    names = checkpoint.names(self._folder)
                    for old in names[names.index(found) + self._survival.keep :]:
                        storage.delete(storage.join(self._folder, old))
                return found
            except UserError as error:
                # Where nothing has run yet, what is wrong with the store is told at once.
                if self._attempt == 0 or not _passes(error) or time.monotonic() > deadline:
                    raise
                say(f"storage   {error}; tried again in {wait:g} s")
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_S / 2)

    def _wait_for_room(self) -> int:
        """The number of workers to start: the most that there is room for now."""
        fewest, most = self._workers
        if fewest == most:
            return most  # Ray Train waits for room
        began = told = time.monotonic()
        while True:
            room = min(most, _room(self._cpus, self._gpu))
            waited = time.monotonic() - began
            if room == most or (room >= fewest and waited > _SETTLE_S):
                return room
            if time.monotonic() - told > _PLACE_S:
                told = time.monotonic()
                say(f"waiting   for room for {fewest} workers; there is room for {room}")
            time.sleep(_POLL_S)

    def _try(self) -> _End:
        self._attempt += 1
        try:
            self._desk.begin(self._attempt)
        except ray.exceptions.RayError:
            self._desk = Desk()
            self._desk.begin(self._attempt)
        filesystem, path = storage.arrow_filesystem(self._storage_path)
        end = _End()
        trainer: list[_Trainer] = []

        def fit() -> None:
            try:
                trainer.append(
                    _Trainer(
                        _work,
                        train_loop_config={
                            "loop": self._loop,
                            "job": self._job,
                            "desk": self._desk.handle,
                            "attempt": self._attempt,
                            "gpu": self._gpu,
                            "folder": self._folder,
                        },
                        backend_config=_TensorflowConfig(),
                        scaling_config=ray.train.ScalingConfig(
                            num_workers=self._count,
                            use_gpu=self._gpu,
                            resources_per_worker={"CPU": self._cpus},
                        ),
                        run_config=ray.train.RunConfig(
                            name=self._name,
                            storage_path=path,
                            storage_filesystem=filesystem,
                            failure_config=FailureConfig(
                                max_failures=0,
                                controller_failure_limit=0,
                                max_preemption_failures=0,
                            ),
                            checkpoint_config=ray.train.CheckpointConfig(
                                num_to_keep=self._survival.keep
                            ),
                        ),
                    )
                )
                trainer[0].fit()
            except BaseException as error:
                end.error = error
            finally:
                over.set()

        # Not `Thread.join`: interrupted, it takes the thread for one that has ended (Python 3.11).
        over = threading.Event()
        threading.Thread(target=fit, name="Ray Train", daemon=True).start()

        def abort() -> None:
            if trainer and trainer[0].controller is not None:
                ray.kill(trainer[0].controller)  # its workers end with it

        def clear() -> None:
            # The error holds on to it, and so its process would live on.
            abort()
            if trainer and trainer[0].controller is not None:
                _free_place(trainer[0].controller)

        try:
            self._follow(over, end, abort)
        except KeyboardInterrupt:
            self._wind_down(over, end)
            raise
        finally:
            clear()
        seen = self._hear(end)
        if end.error is not None:
            end.silent = [one for one in seen if one.sign.started and one.age_s > _SILENT_S]
            for one in end.silent:
                # Stopped perhaps, and TensorFlow in another worker lost patience first.
                threading.Thread(target=_kill, args=(one.sign,), daemon=True).start()
        fatal = next((error for error in end.raised if not _passes(error)), None)
        if fatal is not None:
            raise fatal
        return end

    def _follow(self, over: threading.Event, end: _End, abort: Callable[[], None]) -> None:
        """Hear the workers, and end what does not end by itself, until Ray Train is done."""
        began = looked = time.monotonic()
        raised_at: float | None = None
        more_room = 0
        while not over.wait(_POLL_S):
            raise_if_asked()
            now = time.monotonic()
            seen = self._hear(end)
            if seen and self._failed_at is not None and any(one.sign.started for one in seen):
                self._started_again(now - self._failed_at, now - began)
            for sign in end.signs:
                if sign.asked:
                    self._ask(end, f"{sign} was asked to end by {sign.asked}")
            if now - looked > _LOOK_S:
                looked = now
                for node, left in watch.draining().items():
                    if any(sign.node_id == node for sign in end.signs):
                        soon = f" in {left:.0f} s" if left else ""
                        self._ask(end, f"Ray takes machine {node[:8]} away{soon}")
                more = self._room_for_more() if now - began > _GROW_AFTER_S else 0
                more_room = more_room + 1 if more else 0
                if more_room > 1:
                    self._ask(end, f"there is room for {self._count + more} workers")
            for one in watch.stuck(seen, hang_timeout_s=self._survival.hang_timeout_s):
                if one.sign.rank not in [killed.sign.rank for killed in end.killed]:
                    self._end_hard(one, end, abort)
            # What is the matter with one worker only, others may wait for it.
            raised_at = raised_at or (now if end.raised else None)
            if raised_at and now - raised_at > _LEAVE_S:
                abort()
            # Ray Train gives up on room by itself; then workers have to show themselves.
            limit = _PLACE_S + max(self._survival.hang_timeout_s, 5 * _PLACE_S)
            if not end.signs and now - began > limit:
                say(f"watchdog  no worker has started within {duration(now - began)}")
                abort()

    def _hear(self, end: _End) -> list[Seen]:
        try:
            events, seen = self._desk.take()
        except ray.exceptions.RayError:
            return []  # the workers fail as well, when they post
        for kind, value in events:
            if kind == "error":
                end.raised.append(value)
            elif kind == "left":
                end.left = True
            elif kind == "store":
                say(f"storage   {value}")
            else:
                self._on_event((kind, value))
        if seen:
            end.signs = [one.sign for one in seen]
        return seen

    def _started_again(self, seconds: float, start_seconds: float) -> None:
        self._failed_at = None
        say(f"          training again after {seconds:.1f} s, a start takes {start_seconds:.1f} s")
        if self.restarts and self.restarts[-1].seconds is None:
            self.restarts[-1].seconds = round(seconds, 1)
            self.restarts[-1].start_seconds = round(start_seconds, 1)
            self._store_restarts()

    def _ask(self, end: _End, why: str) -> None:
        if end.asked is None:
            end.asked = why
            say(f"leaving   {why}; the state is saved first")
            with suppress(ray.exceptions.RayError):
                self._desk.ask(why)

    def _end_hard(self, one: watch.Stuck, end: _End, abort: Callable[[], None]) -> None:
        say(f"watchdog  {one.why}; ended")
        end.killed.append(one)
        try:
            watch.kill(one.sign)
        except ray.exceptions.RayError:
            abort()

    def _room_for_more(self) -> int:
        most = self._workers[1]
        if self._count >= most:
            return 0
        return min(most - self._count, _room(self._cpus, self._gpu))

    def _wind_down(self, over: threading.Event, end: _End) -> None:
        """Let the workers of a job that is told to end save their state."""
        if not end.signs:
            return
        self._ask(end, "the job was told to end")
        over.wait(_LEAVE_S)


def each_once(on_epoch: Callable[[dict[str, float]], None]) -> Callable[[dict[str, float]], None]:
    """`on_epoch` for rows of a history of which some come twice, after a restart."""
    told = 0.0

    def on_row(row: dict[str, float]) -> None:
        nonlocal told
        if row["epoch"] > told:
            told = row["epoch"]
            on_epoch(row)

    return on_row


def read_restarts(folder: str) -> list[Restart]:
    """The restarts of a stage of a run, whose checkpoints are in `folder`."""
    try:
        return [Restart(**one) for one in storage.read_json(storage.join(folder, RESTARTS))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (UserError, TypeError):  # half written, by a machine that died
        return []


def _room(cpus: float, gpu: bool) -> int:
    """How many more workers the cluster has room for now."""
    gone = watch.draining()
    free: Mapping[str, Mapping[str, float]] = (
        ray._private.state.state.available_resources_per_node()
    )
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    count = 0
    for node, has in free.items():
        if node in alive and node not in gone:
            fits = int(has.get("CPU", 0.0) / cpus + 1e-6)
            count += min(fits, int(has.get("GPU", 0.0))) if gpu else fits
    return count


def _free_place(controller: Any) -> None:
    """Free the CPUs and GPUs that a controller had set aside for its workers.

    Ray does so only at the end of the whole job where the controller was killed, and the next
    workers would wait for ever.
    """
    state, table = ray._private.state.state, cast(Any, gcs_pb2).PlacementGroupTableData
    for data in state._connect_and_get_accessor().get_placement_group_table():
        place = table.FromString(data)
        if place.creator_actor_id == controller._actor_id.binary() and place.state != table.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(place.placement_group_id)))


def _tell_ray_train(folder: str, name: str | None) -> None:
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


def _why(end: _End) -> str:
    """Why an attempt ended, in one line."""
    if end.left or end.asked:
        return f"{end.asked}" + ("" if end.left else ", and the state could not be saved in time")
    if end.killed:
        return "; ".join(one.why for one in end.killed)
    if end.raised:
        return f"a worker met: {end.raised[-1]}"
    doing = {sign.rank: f"{sign}, {sign.doing}" for sign in end.signs}
    failures: Mapping[int, Exception] = getattr(end.error, "worker_failures", {})
    if not failures:
        died = "Ray Train's controller: " * isinstance(end.error, ray.exceptions.RayActorError)
        return died + _short(_controller_failure(end.error) or end.error)
    # Those that died before those that only lost them.
    told = {rank: error for rank, error in failures.items() if _died(error)}
    if not told and end.silent:
        return "; ".join(
            f"{sign} gave no sign of life for {age_s:.0f} s, last: {sign.doing}"
            for sign, age_s in end.silent
        )
    told = told or dict(failures)
    return "; ".join(
        f"{doing.get(rank, f'worker {rank}')}: {_short(error)}" for rank, error in told.items()
    )


def _kill(sign: Sign) -> None:
    with suppress(ray.exceptions.RayError):
        watch.kill(sign)


def _died(error: Exception) -> bool:
    inner = getattr(error, "health_check_failure", error)
    return isinstance(inner, ray.exceptions.RayActorError)


def _short(error: BaseException | None) -> str:
    """One line of an error; of Ray's long ones, the part that differs."""
    error = getattr(error, "health_check_failure", error)
    text = " ".join(str(error).split())
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        return _short(error.cause)
    if isinstance(error, WorkerGroupStartupTimeoutError):
        return f"there is no room for {error.num_workers} workers yet"
    if isinstance(error, WorkerGroupStartupFailedError):
        return "a worker died while it started"
    if isinstance(error, ray.exceptions.RayActorError):
        detail = re.search(r"Worker exit detail: (.*?)(?: There are some| Some common|$)", text)
        if detail:
            return f"its process died ({detail[1].rstrip('. ')[:_SNIPPET]})"
        gone = re.search(r"(?:because )?((?:its|the) node [^.]*)", text, re.IGNORECASE)
        return gone[1] if gone else text[:_SNIPPET]
    if type(error) is RuntimeError:  # as `_work` puts it
        return text[:_SNIPPET]
    return f"{type(error).__name__}: {text[:_SNIPPET]}"


def _controller_failure(error: BaseException | None) -> BaseException | None:
    found: BaseException | None = getattr(error, "controller_failure", None)
    return found


def _is_no_failure(error: BaseException | None) -> bool:
    """True where the group only waits for room, or its machine was taken away."""
    waits = isinstance(_controller_failure(error), WorkerGroupStartupTimeoutError)
    return waits or isinstance(error, ray.train.PreemptionError)


def _port_was_taken(error: BaseException | None) -> bool:
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    return any(text in str(one) for one in failures.values() for text in _PORT_TAKEN)


class _Trainer(DataParallelTrainer):
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
        if not get_dashboard_url():
            useless += (PlacementGroupCleanerCallback,)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, useless)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if not get_dashboard_url():
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
                worker_group.execute_single_async(rank, _set_up, addresses, rank)
                for rank in range(len(worker_group))
            ]
        )


def _free_address() -> str:
    """An address of this machine that TensorFlow can listen on when it is imported, seconds later.

    Not a port that the system gives: it gives the same ones to every connection out of here.
    """
    ip = _node_ip()
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    port = 0
    for port in random.Random(os.urandom(8)).sample(_PORTS, 100):
        with socket.socket(family) as listener, suppress(OSError):
            listener.bind(("", port))
            break
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def _node_ip() -> str:
    return str(ray.util.get_node_ip_address())


def _set_up(addresses: list[str], rank: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
    )
    watch.leave_on_sigterm()


class _Here:
    """What belongs to this worker's process."""

    def __init__(self, teller: Teller, folder: str) -> None:
        self.teller, self.folder = teller, folder
        self.on_their_way = 0  # checkpoints, saved here and not yet in the store


_here: _Here | None = None


def hooks() -> Hooks:
    """How the loop of this worker is followed, and when it has to leave by raising `Leaving`.

    A loop that never calls them is only watched for signs of life.
    """
    assert _here is not None, "only in a worker of `run`"
    teller = _here.teller
    return Hooks(teller.doing, teller.long, teller.started, teller.leave)


def newest_checkpoint(folder_url: str) -> str | None:
    """The URL of the checkpoint to go on from, in the folder that the loop was called with."""
    found = ray.train.get_checkpoint()
    if found is None:
        return None
    return storage.join(folder_url, found.path.rstrip("/").rsplit("/", 1)[-1])


def uploaded() -> bool:
    """True when all that was given to `keep` is in the store."""
    assert _here is not None, "only in a worker of `run`"
    return not _here.on_their_way


def keep(write: Callable[[str], None] | None, *, step: int) -> None:
    """Save a checkpoint after `step` steps; every worker calls it at the same place.

    Args:
        write: writes it into a local folder, with `checkpoint.write`; none on all workers but one.
        step: of the whole stage; of two checkpoints the one with the higher is the newer.
    """
    here, saved = _here, None
    assert here is not None, "only in a worker of `run`"
    if write is not None:
        folder = tempfile.mkdtemp(prefix="leafnet-checkpoint-")
        write(folder)
        saved = ray.train.Checkpoint.from_directory(folder)
        here.on_their_way += 1

    def upload(saved: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        _upload(Path(saved.path), storage.join(here.folder, name), here.teller)
        here.on_their_way -= 1
        # Ray Train compares filesystems, and two of the same settings are not equal.
        managed = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(
            f"{managed.experiment_fs_path}/{name}", managed.storage_filesystem
        )

    ray.train.report(
        {"step": step},
        checkpoint=saved,
        checkpoint_dir_name=checkpoint.name(step, uuid.uuid4().hex[:6]),  # that of rank 0 counts
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
        # Ray's own way is `pyarrow.fs.copy_files`, which to an fsspec filesystem loses the errors
        # of writing (pyarrow 26): a checkpoint would count that is not there.
        checkpoint_upload_fn=upload,
    )


def _upload(folder: Path, url: str, teller: Teller) -> None:
    """Copy a checkpoint to `url`, manifest last; a store that is away or full is waited for.

    Raises:
        UserError: it still was after `_STORE_S`, or refused.
    """
    deadline, wait = time.monotonic() + _STORE_S, 1.0
    while True:
        try:
            _check_shared(url)
            for file in sorted(folder.iterdir(), key=lambda one: one.name == checkpoint.MANIFEST):
                storage.write_bytes(storage.join(url, file.name), file.read_bytes())
            return
        except (UserError, OSError) as caught:
            error = caught
            if not isinstance(caught, UserError):
                error = UserError("store-failed", f"cannot write {url}: {caught}")
            with suppress(UserError, OSError):
                storage.delete(url)  # the room of what is half written
            if not _passes(error) or time.monotonic() + wait > deadline:
                ray.get(teller.post(("error", error)))
                raise error from None
            teller.post(("store", f"{error}; training goes on, tried again in {wait:g} s"))
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT_S / 2)


def _check_shared(url: str) -> None:
    """Refuse a local path of this machine that is not the driver's, which left its mark there."""
    above = url.rsplit("/", 1)[0]
    mark = storage.join(above, VALIDATE_STORAGE_MARKER_FILENAME)
    if storage.is_local(url) and not storage.exists(mark):
        raise UserError(
            "store-failed",
            f"cannot write {url}: {above} is away, or not shared with the machine "
            f"{_node_ip()}; give a disk that all machines share, or a URL such as s3://",
        )


def _work(config: dict[str, Any]) -> None:
    """What Ray Train calls in each worker."""
    global _here
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size())
    teller = Teller(config["desk"], config["attempt"], place.rank)
    _here = _Here(teller, config["folder"])
    lost: str | None = None
    try:
        teller.doing("importing TensorFlow")
        limit_threads(_threads(), gpu=config["gpu"])
        teller.long("at work")
        config["loop"](config["job"], place, teller.post, config["folder"])
        teller.long("done, waiting for the others")
    except Leaving:
        ray.get(teller.post(("left", place.rank)))
    except (UserError, DamagedParts) as error:
        ray.get(teller.post(("error", error)))
        # Only what may pass is raised. Other workers may not have met it and wait for this one;
        # Ray Train ends them and tries again. All else fails every time.
        if _passes(error):
            raise
    except Exception as error:
        traceback.print_exc()
        lost = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if lost is not None:
        # Not the error itself: one of TensorFlow's makes the controller and the driver import it,
        # which takes longer than all the rest of a restart.
        raise RuntimeError(lost)


def _passes(error: Exception) -> bool:
    """True for what a store is to blame for."""
    return isinstance(error, UserError) and error.reason in storage.OF_STORES


def _threads() -> int:
    resources: dict[str, float] = ray.get_runtime_context().get_assigned_resources()
    return max(1, round(resources.get("CPU", 1)))
