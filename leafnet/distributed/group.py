"""A group of Ray Train workers under `tf.distribute`, started again until what it does is done.

Each attempt is one fit of Ray Train. How it ended, from which checkpoint it goes on and on how many
workers is decided here in the driver, and not by Ray Train: its own way knows only the checkpoint
that it wrote last, whether that is whole or not, starts again at once and without a word, and takes
workers away in the middle of a step where it grows or shrinks a group.
"""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train.v2.api.config import FailureConfig

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.core.interrupts import raise_if_asked
from leafnet.core.terminal import duration, say
from leafnet.distributed import checkpoint, heartbeat, ray_train, resources, worker
from leafnet.distributed.failures import (
    RESTARTS,
    End,
    Restart,
    controller_failure,
    is_no_failure,
    port_was_taken,
    read_restarts,
    reason_of,
)
from leafnet.distributed.heartbeat import Desk, Seen, Sign
from leafnet.distributed.ray_train import TensorflowConfig, Trainer, free_place, tell_ray_train
from leafnet.distributed.resources import Node
from leafnet.distributed.worker import LONGEST_WAIT_S, Loop, passes, work

_POLL_S = 0.25
_LOOK_S = 2.0  # between two looks at the cluster
_GROW_AFTER_S = 20.0  # a group is not asked to make room for more workers before
_SETTLE_S = 3.0  # until Ray has noticed that a machine is gone, or its CPUs are free
_PORT_TRIES = 5
_SILENT_S = 3.0  # three signs that did not come
_LEAVE_S = 20.0  # for the workers to save and leave; Kubernetes kills after 30
_PLACE_S = 60.0  # Ray Train waits so long for room


@dataclass(frozen=True)
class RestartPolicy:
    """When workers that failed are started again, and from what."""

    max_failures: int = 3  # in a row, without a new checkpoint in between
    hang_timeout_s: float = 300.0
    keep: int = 2  # checkpoints


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
    policy: RestartPolicy | None = None,
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
        policy: when workers that failed are started again.

    Returns:
        Why and how the group was started again, with what earlier starts of the job left.

    Raises:
        UserError: a worker met something that the person can mend.
        DamagedParts: the cache has to be repaired first.
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
        policy=policy or RestartPolicy(),
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
        policy: RestartPolicy,
    ) -> None:
        self._loop, self._job, self._name = loop, job, name
        self._workers, self._cpus, self._gpu = workers, cpus, gpu
        self._storage_path, self._folder = storage_path, storage.join(storage_path, name)
        self._on_event, self._policy = on_event, policy
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
        ended: End | None = None
        while True:
            found = self._choose_checkpoint() or "the beginning"
            if ended is not None:
                planned = ended.asked is not None or is_no_failure(ended.error)
                if port_was_taken(ended.error) and self._ports < _PORT_TRIES:
                    self._ports, planned = self._ports + 1, True
                # Only failures without progress count: a night on machines that come and go has
                # many of them.
                failures = (0 if found != before else failures) + (not planned)
                if failures > self._policy.max_failures:
                    self._give_up(ended, failures)
                wait = 0.0 if planned else min(LONGEST_WAIT_S, 2.0 ** (failures - 1))
                self._note(reason_of(ended), found, counted=not planned, wait=wait)
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

    def _give_up(self, end: End, failures: int) -> None:
        cause = end.raised[-1] if end.raised else controller_failure(end.error) or end.error
        if isinstance(cause, UserError):
            raise cause from None
        raise RuntimeError(
            f"the workers of {self._name} failed {failures} times without a new checkpoint in "
            f"between, at last: {reason_of(end)}"
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
            worker.check_shared(storage.join(self._folder, RESTARTS))
            storage.write_json(
                storage.join(self._folder, RESTARTS), [vars(one) for one in self.restarts]
            )

    def _choose_checkpoint(self) -> str | None:
        """Find the newest whole checkpoint, and make it Ray Train's last one."""
        deadline, wait = time.monotonic() + worker.STORE_S, 1.0
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
                tell_ray_train(self._folder, found)
                if found:
                    names = checkpoint.names(self._folder)
                    for old in names[names.index(found) + self._policy.keep :]:
                        checkpoint.delete(storage.join(self._folder, old))
                return found
            except UserError as error:
                # Where nothing has run yet, what is wrong with the store is told at once.
                if self._attempt == 0 or not passes(error) or time.monotonic() > deadline:
                    raise
                say(f"storage   {error}; tried again in {wait:g} s")
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S / 2)

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

    def _try(self) -> End:
        self._attempt += 1
        try:
            self._desk.begin(self._attempt)
        except ray.exceptions.RayError:
            self._desk = Desk()
            self._desk.begin(self._attempt)
        end = End()
        trainer: list[Trainer] = []

        def fit() -> None:
            try:
                trainer.append(self._trainer())
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
                free_place(trainer[0].controller)

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
        fatal = next((error for error in end.raised if not passes(error)), None)
        if fatal is not None:
            raise fatal
        return end

    def _trainer(self) -> Trainer:
        """Ray Train for this attempt. It restarts nothing by itself: `run` does."""
        filesystem, path = storage.arrow_filesystem(self._storage_path)
        return Trainer(
            work,
            train_loop_config={
                "loop": self._loop,
                "job": self._job,
                "desk": self._desk.handle,
                "attempt": self._attempt,
                "gpu": self._gpu,
                "folder": self._folder,
            },
            backend_config=TensorflowConfig(),
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
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=self._policy.keep),
            ),
        )

    def _follow(self, over: threading.Event, end: End, abort: Callable[[], None]) -> None:
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
                for node, left in ray_train.draining().items():
                    if any(sign.node_id == node for sign in end.signs):
                        soon = f" in {left:.0f} s" if left else ""
                        self._ask(end, f"Ray takes machine {node[:8]} away{soon}")
                more = self._room_for_more() if now - began > _GROW_AFTER_S else 0
                more_room = more_room + 1 if more else 0
                if more_room > 1:
                    self._ask(end, f"there is room for {self._count + more} workers")
            for one in heartbeat.stuck(
                seen, hang_timeout_s=self._policy.hang_timeout_s, gpu=self._gpu
            ):
                if one.sign.rank not in [killed.sign.rank for killed in end.killed]:
                    self._end_hard(one, end, abort)
            # What is the matter with one worker only, others may wait for it.
            raised_at = raised_at or (now if end.raised else None)
            if raised_at and now - raised_at > _LEAVE_S:
                abort()
            # Ray Train gives up on room by itself; then workers have to show themselves.
            limit = _PLACE_S + max(self._policy.hang_timeout_s, 5 * _PLACE_S)
            if not end.signs and now - began > limit:
                say(f"watchdog  no worker has started within {duration(now - began)}")
                abort()

    def _hear(self, end: End) -> list[Seen]:
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

    def _ask(self, end: End, why: str) -> None:
        if end.asked is None:
            end.asked = why
            say(f"leaving   {why}; the state is saved first")
            with suppress(ray.exceptions.RayError):
                self._desk.ask(why)

    def _end_hard(self, one: heartbeat.Stuck, end: End, abort: Callable[[], None]) -> None:
        say(f"watchdog  {one.why}; ended")
        try:
            stacks = heartbeat.kill(one.sign)
        except ray.exceptions.RayError:
            stacks = ""
            abort()
        if head := heartbeat.head_of(stacks):
            print(stacks, file=sys.stderr)  # into the log
            say(f"          it was in {head}")
            one = one._replace(why=f"{one.why}, in {head}")
        end.killed.append(one)

    def _room_for_more(self) -> int:
        most = self._workers[1]
        if self._count >= most:
            return 0
        return min(most - self._count, _room(self._cpus, self._gpu))

    def _wind_down(self, over: threading.Event, end: End) -> None:
        """Let the workers of a job that is told to end save their state."""
        if not end.signs:
            return
        self._ask(end, "the job was told to end")
        over.wait(_LEAVE_S)


def _room(cpus: float, gpu: bool) -> int:
    """How many more workers the cluster has room for now."""
    gone = ray_train.draining()
    free = ray_train.free_resources()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    nodes = [
        Node(has.get("CPU", 0.0), has.get("GPU", 0.0))
        for node, has in free.items()
        if node in alive and node not in gone
    ]
    return resources.room(nodes, cpus, gpu=gpu)


def _kill(sign: Sign) -> None:
    with suppress(ray.exceptions.RayError):
        heartbeat.kill(sign)
