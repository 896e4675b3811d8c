"""Signs of life: what each worker does now, and word from the driver to the workers.

A worker tells what it does before it does it, and a thread of it carries that to the desk, an actor
beside the driver, every second. The driver reads there who is silent (stopped, or on a machine that
is gone) and who is alive and gets nowhere (waiting for another in a sum over all workers).
"""

import ctypes
import faulthandler
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_POLL_S = 0.25

_BEAT_S = 1.0
# A start imports TensorFlow, reads features and waits for the other workers.
_START_S = 300.0
# On a GPU the first step may compile kernels that TensorFlow's wheel lacks, for many minutes.
_GPU_START_S = 1800.0
# A worker is said to be silent before one that waits for it is said to get nowhere.
_LATER_S = 5.0
_CALL_S = 30.0
_STACKS = "leafnet-stacks"
_STACKS_S = 5.0
_HEAD = 4  # calls
_OWN_THREAD = "in _follow"  # the one that tells the signs of life


class Sign(NamedTuple):
    """What a worker says of itself."""

    rank: int
    pid: int
    node_id: str
    node_ip: str
    doing: str
    idle_s: float  # since it began that
    watched: bool  # False: that may take any time
    started: bool  # True: the first steps are taken
    longest_start_s: float  # the longest that anything took before and after the first steps
    longest_s: float
    asked: str | None  # why this worker wants to leave

    def __str__(self) -> str:
        return f"worker {self.rank} (process {self.pid} on {self.node_ip})"


class Seen(NamedTuple):
    """A sign, and how long ago it came."""

    sign: Sign
    age_s: float


class Stuck(NamedTuple):
    """A worker that has to be ended."""

    sign: Sign
    why: str


def stuck(seen: Iterable[Seen], *, hang_timeout_s: float, gpu: bool = False) -> list[Stuck]:
    """The workers that give no sign of life or get nowhere; those that only wait for them not.

    The limit is `hang_timeout_s`, and never shorter than what a start took, nor than three times
    the longest that anything took since.
    """
    seen = list(seen)
    limit = max(
        hang_timeout_s,
        max((one.sign.longest_start_s for one in seen), default=0.0),
        3 * max((one.sign.longest_s for one in seen), default=0.0),
    )
    # Steps are taken together: where one worker has taken the first, so has one that fell silent
    # before it could tell.
    if not any(one.sign.started for one in seen):
        limit = max(limit, _GPU_START_S if gpu else _START_S)
    silent, nowhere = [], []
    for sign, age_s in seen:
        if age_s > limit:
            silent.append(
                Stuck(sign, f"{sign} gave no sign of life for {age_s:.0f} s, last: {sign.doing}")
            )
        elif sign.watched and sign.idle_s + age_s > limit + _LATER_S:
            nowhere.append(
                Stuck(sign, f"{sign} got nowhere for {sign.idle_s + age_s:.0f} s: {sign.doing}")
            )
    return silent or nowhere


@ray.remote(num_cpus=0)
class _Desk:
    """Where workers post events and signs, and hear whether to leave."""

    def __init__(self) -> None:
        self._attempt = 0
        self._events: list[Any] = []
        self._signs: dict[int, tuple[Sign, float]] = {}
        self._leave: str | None = None

    def begin(self, attempt: int) -> None:
        """Forget what came before: workers of an earlier attempt are not listened to."""
        self._attempt, self._events, self._signs, self._leave = attempt, [], {}, None

    def post(self, attempt: int, event: Any) -> None:
        if attempt == self._attempt:
            self._events.append(event)

    def beat(self, attempt: int, sign: Sign) -> str | None:
        if attempt != self._attempt:
            return None
        self._signs[sign.rank] = (sign, time.monotonic())
        return self._leave

    def take(self) -> tuple[list[Any], list[Seen]]:
        events, self._events = self._events, []
        now = time.monotonic()
        return events, [Seen(sign, now - came) for sign, came in self._signs.values()]

    def ask(self, why: str) -> None:
        self._leave = why


class Desk:
    """The driver's side of the desk. On its own node: it lives as long as the driver does."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.handle = _Desk.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]

    def begin(self, attempt: int) -> None:
        ray.get(self.handle.begin.remote(attempt), timeout=_CALL_S)

    def take(self) -> tuple[list[Any], list[Seen]]:
        """The events since the last call, and the last sign of each worker."""
        taken: tuple[list[Any], list[Seen]] = ray.get(self.handle.take.remote(), timeout=_CALL_S)
        return taken

    def ask(self, why: str) -> None:
        """Ask the workers to save their state and leave."""
        ray.get(self.handle.ask.remote(why), timeout=_CALL_S)


class Teller:
    """The worker's side."""

    def __init__(self, desk: Any, attempt: int, rank: int) -> None:
        self._desk, self._attempt, self._rank = desk, attempt, rank
        self._doing, self._watched, self._since = "starting", True, time.monotonic()
        self._longest = {False: 0.0, True: 0.0}  # before and after the first steps
        self._started = False
        self._leave: str | None = None
        threading.Thread(target=self._follow, name="signs of life", daemon=True).start()

    def post(self, event: Any) -> Any:
        return self._desk.post.remote(self._attempt, event)

    def doing(self, what: str) -> None:
        """Tell what comes next, a matter of a moment."""
        self._tell(what, watched=True)

    def long(self, what: str) -> None:
        """Tell what comes next and may take any time."""
        self._tell(what, watched=False)

    def started(self) -> None:
        """Tell that the first steps are taken: nothing will take longer from now on."""
        if not self._started:
            self._note()
            self._started, self._since = True, time.monotonic()

    def leave(self) -> bool:
        """True when the driver or this worker's machine wants it to save and stop."""
        return self._leave is not None or _asked is not None

    def _tell(self, what: str, *, watched: bool) -> None:
        self._note()
        self._doing, self._watched, self._since = what, watched, time.monotonic()

    def _note(self) -> None:
        if self._watched:
            taken = time.monotonic() - self._since
            self._longest[self._started] = max(self._longest[self._started], taken)

    def _follow(self) -> None:
        context = ray.get_runtime_context()
        node_id, node_ip = context.get_node_id(), ray.util.get_node_ip_address()
        while True:
            _hold_sigterm()
            sign = Sign(
                rank=self._rank,
                pid=os.getpid(),
                node_id=node_id,
                node_ip=node_ip,
                doing=self._doing,
                idle_s=time.monotonic() - self._since,
                watched=self._watched,
                started=self._started,
                longest_start_s=self._longest[False],
                longest_s=self._longest[True],
                asked=_asked,
            )
            # A desk that does not answer has no driver: Ray ends this process, too.
            with suppress(ray.exceptions.RayError):
                answer = self._desk.beat.remote(self._attempt, sign)
                self._leave = ray.get(answer, timeout=_CALL_S) or self._leave
            time.sleep(_BEAT_S)


# Why this process was asked to end, by a signal.
_asked: str | None = None
# Python's own handler in C, which makes the main thread call what was given to `signal.signal`.
_c_handler: int | None = None


def leave_on_sigterm() -> None:
    """Save and leave on SIGTERM, in this process; in its main thread."""
    global _c_handler

    def handle(number: int, frame: Any) -> None:
        global _asked
        _asked = "SIGTERM"

    signal.signal(signal.SIGTERM, handle)
    get = ctypes.pythonapi.PyOS_getsig
    get.argtypes, get.restype = [ctypes.c_int], ctypes.c_void_p
    _c_handler = get(signal.SIGTERM)


def _hold_sigterm() -> None:
    """Take SIGTERM back from TensorFlow, which takes it for itself when workers meet and tells no
    one (seen in 2.21). From any thread, unlike `signal.signal`.
    """
    if _c_handler is not None:
        put = ctypes.pythonapi.PyOS_setsig
        put.argtypes, put.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        put(signal.SIGTERM, _c_handler)


def write_stacks_on_signal() -> None:
    """Write what all threads of this process do into a file in its memory, on SIGUSR1.

    The handler is in C: it also answers where Python is stuck in a call that never returns.
    """
    faulthandler.register(signal.SIGUSR1, file=os.memfd_create(_STACKS), all_threads=True)


def kill(sign: Sign) -> str:
    """End a worker's process at once; the stacks of its threads, if it could still tell them.

    One that is stopped takes no other signal, and has none.

    Raises:
        ray.exceptions.RayError: its machine does not answer.
    """
    if sign.node_id == ray.get_runtime_context().get_node_id():
        return _kill_here(sign.pid)
    there = NodeAffinitySchedulingStrategy(sign.node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(_kill_here)
    stacks: str = ray.get(task.options(scheduling_strategy=there).remote(sign.pid), timeout=_CALL_S)
    return stacks


def _kill_here(pid: int) -> str:
    stacks = ""
    with suppress(ProcessLookupError, FileNotFoundError):
        # The number of a process that has ended may be another's by now.
        if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
            stacks = _stacks(pid)
            os.kill(pid, signal.SIGKILL)
    return stacks


def _stacks(pid: int) -> str:
    """What `write_stacks_on_signal` wrote in another process of this machine and user."""
    files = [
        file
        for file in Path(f"/proc/{pid}/fd").iterdir()
        if os.readlink(file).startswith(f"/memfd:{_STACKS} ")
    ]
    if not files:
        return ""  # the signal would end it
    os.kill(pid, signal.SIGUSR1)
    text, until = "", time.monotonic() + _STACKS_S
    while time.monotonic() < until:
        time.sleep(_POLL_S)
        before, text = text, files[0].read_text(errors="replace")
        if text and text == before:
            break
    return text


def head_of(stacks: str) -> str:
    """Where the thread that runs leafnet's code is, innermost call first.

    >>> head_of('''Thread 0x1 (most recent call first):
    ...   File "/a/ray/worker.py", line 9 in run
    ...
    ... Thread 0x2 (most recent call first):
    ...   File "/a/tensorflow/ops.py", line 7 in wait
    ...   File "/a/leafnet/training/loop.py", line 5 in fit''')
    'wait (ops.py:7), fit (loop.py:5)'
    """
    frame = re.compile(r'File "(?:.*/)?(.+?)", line (\d+) in (.+)')
    threads = [thread for thread in stacks.split("\n\n") if _OWN_THREAD not in thread]
    ours = [thread for thread in threads if "/leafnet/" in thread] or threads[:1]
    calls = [f"{name} ({file}:{line})" for file, line, name in frame.findall("".join(ours[:1]))]
    return ", ".join(calls[:_HEAD])


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
        # Beside the driver: what was posted is not lost with another machine.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self.handle = _Events.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]

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
