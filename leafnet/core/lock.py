"""One job at a time for one output folder, on any filesystem that can create a file exclusively.

`_lock/00000007.json` says who holds the output. The highest number counts, and numbers never fall:
at rest the last file stays and says that nobody holds it. Whoever finds its owner dead creates the
next number, which only one of many can; nobody deletes or overwrites the lock of a living owner.

No two machines' clocks are compared. An owner writes its file anew all the time, and whoever waits
watches, by its own clock, whether the file changes. An owner that could not do so for two thirds of
the time after which others take over counts itself dead.
"""

import itertools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, ValidationError

from leafnet.core import storage
from leafnet.core.documents import Document
from leafnet.core.errors import EXIT_IN_USE, UserError
from leafnet.core.terminal import say

FOLDER = "_lock"
_TRIES = 20
_BEATS = 5  # in the time of silence after which others take over
_LOOK_S = 2.0
_UNREADABLE_S = 60.0  # after which a lock that was never written whole is nobody's


class Owner(Document):
    """What a lock's file says."""

    id: str
    host: str
    pid: int
    process: list[str] | None  # see `_process`
    started_at: str  # UTC, ISO 8601; for people, as `alive_at`
    alive_at: str
    timeout_s: Annotated[float, Field(gt=0)]
    beat: int = 0  # signs of life so far
    released: bool = False


class _Seen(NamedTuple):
    data: bytes  # of the file
    owner: Owner | None  # None: it cannot be read, as after a power cut


class Lock:
    """A lock that is held; `check` it before anything that only its holder may do."""

    def __init__(self, url: str, owner: Owner, alive_at: float) -> None:
        self.url, self.number = url, _number(url)
        self._owner, self._timeout_s, self._alive_at = owner, owner.timeout_s, alive_at
        self._lost: str | None = None

    def check(self) -> None:
        """Raise unless the output is this job's still.

        Raises:
            UserError: another job took it over, or may do so soon, because this one gave no sign of
                life for so long (a suspended machine, a network that was away).
        """
        if self._lost is None and self._silent_s() > self._timeout_s / 2:
            self._beat()
        lost = self._lost
        if lost is None and self._silent_s() > self._timeout_s * 2 / 3:
            lost = (
                f"this job could show no sign of life for {self._silent_s():.0f} s, and another "
                "may take the output over; run the same command again"
            )
        if lost is not None:
            raise UserError("lock-lost", lost, exit_code=EXIT_IN_USE)

    def _silent_s(self) -> float:
        return _now_s() - self._alive_at

    def _beat(self) -> None:
        """Show a sign of life, unless the lock is another's."""
        began = _now_s()
        try:
            seen = _look(self.url)
            mine = seen is not None and seen.owner is not None and seen.owner.id == self._owner.id
            if not mine or _highest(self.url) != self.url:
                self._lost = (
                    "another job took the output over, since this one gave no sign of life for "
                    f"more than {self._timeout_s:g} s; run the same command again"
                )
                return
            self._write()
            self._alive_at = began
        # A store that does not answer now may do so at the next beat.
        except Exception as error:
            logging.getLogger("leafnet").warning("cannot renew %s: %s", self.url, error)

    def _write(self, *, released: bool = False) -> None:
        changes = {"beat": self._owner.beat + 1, "alive_at": _now(), "released": released}
        self._owner = self._owner.model_copy(update=changes)
        storage.write_json(self.url, self._owner.model_dump())

    def follow(self, over: threading.Event) -> None:
        """Show signs of life until `over`."""
        while not over.wait(self._timeout_s / _BEATS) and self._lost is None:
            self._beat()

    def release(self) -> None:
        """Give the output to the next job. Where that fails, the next job finds the owner dead."""
        if self._lost is not None:
            return
        try:
            self._write(released=True)
        except Exception as error:
            logging.getLogger("leafnet").warning("cannot release %s: %s", self.url, error)


def refuse_held(out: str) -> None:
    """Look whether a job holds the output folder `out`, without taking it.

    Raises:
        UserError: one does, and who; exit code 3.
    """
    names = _names(storage.join(out, FOLDER))
    if names:
        _refuse_alive(out, storage.join(out, FOLDER, names[-1]))


@contextmanager
def hold(out: str, *, timeout_s: float) -> Iterator[Lock]:
    """Hold the output folder `out` until the block ends.

    Args:
        out: folder or URL.
        timeout_s: of silence after which others take over.

    Raises:
        UserError: another job holds it, and who; exit code 3. It cannot be written to, or its store
            does not know how to create a file exclusively.
    """
    now = _now()
    owner = Owner(
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        process=_process(os.getpid()),
        started_at=now,
        alive_at=now,
        timeout_s=timeout_s,
    )
    lock = _acquire(out, owner)
    over = threading.Event()
    thread = threading.Thread(target=lock.follow, args=(over,), daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        over.set()
        thread.join()
        lock.release()


def _acquire(out: str, owner: Owner) -> Lock:
    folder = storage.join(out, FOLDER)
    for attempt in itertools.count():
        names = _names(folder)
        if names:
            _refuse_alive(out, storage.join(folder, names[-1]))
        url = storage.join(folder, f"{_number(names[-1]) + 1 if names else 1:08d}.json")
        began = _now_s()
        try:
            created = storage.create_bytes(url, json.dumps(owner.model_dump()).encode())
            if created and storage.create_bytes(url, b"{}"):
                storage.delete(url)
                raise UserError(
                    "no-exclusive-create",
                    f"the store of {out} overwrites a file that was to be created only if there is "
                    "none (If-None-Match); two jobs could not be told apart: use another store",
                )
        # Every filesystem has errors of its own.
        except Exception as error:
            if isinstance(error, UserError):
                raise
            # Others may have taken an empty folder away.
            if isinstance(error, FileNotFoundError) and attempt < _TRIES:
                continue
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError("cannot-write", f"cannot write to --out {out}: {reason}") from None
        if created:
            for name in names:  # of those before
                storage.delete(storage.join(folder, name))
            return Lock(url, owner, began)
    raise AssertionError("it counts for ever")


def _refuse_alive(out: str, url: str) -> None:
    """Return if nobody holds the lock at `url`, or not any more.

    Raises:
        UserError: its owner is alive.
    """
    seen = _look(url)
    began = _now_s()
    first, told = seen, False
    while seen is not None and not (seen.owner and seen.owner.released):
        alive = _runs_here(seen.owner) if seen.owner else None
        if alive is False:
            return
        if alive or seen.data != first.data:  # type: ignore[union-attr]
            _refuse(out, seen.owner)
        wait_s = seen.owner.timeout_s if seen.owner else _UNREADABLE_S
        if _now_s() - began > wait_s:
            return
        if not told:
            host = seen.owner.host if seen.owner else "an unknown machine"
            say(f"lock      held by a job on {host}; looks up to {wait_s:g} s for a sign of life")
            told = True
        time.sleep(min(_LOOK_S, wait_s / 10))
        seen = _look(url)


def _runs_here(owner: Owner) -> bool | None:
    """Whether the process of `owner` runs on this machine; None: it is of another."""
    mine = _process(os.getpid())
    if mine is None or owner.process is None or mine[0] != owner.process[0]:
        return None
    return _process(owner.pid) == owner.process


def _refuse(out: str, owner: Owner | None) -> None:
    who = f"{out} is in use by another job"
    if owner is not None:
        who = f"{out} is in use by process {owner.pid} on {owner.host}, since {owner.started_at}"
    raise UserError("output-in-use", f"{who}; wait for it or stop it", exit_code=EXIT_IN_USE)


def _process(pid: int) -> list[str] | None:
    """What tells a process from all others: its machine's boot, its namespace, pid and start."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # not Linux, or no such process
        return None
    state, *fields = text.rsplit(")", 1)[1].split()
    if state in "ZX":  # dead, and not yet waited for by its parent
        return None
    return [f"{boot} {namespace}", str(pid), fields[18]]  # proc(5): field 22, start time


def _names(folder: str) -> list[str]:
    return [n for n in storage.list_names(folder) if n.endswith(".json") and n[:8].isdigit()]


def _number(name: str) -> int:
    return int(name.rpartition("/")[2].split(".")[0])


def _highest(url: str) -> str:
    folder = url.rsplit("/", 1)[0]
    names = _names(folder)
    return storage.join(folder, names[-1]) if names else ""


def _look(url: str) -> _Seen | None:
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        return None
    try:
        return _Seen(data, Owner.model_validate_json(data))
    except ValidationError:
        return _Seen(data, None)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _now_s() -> float:
    """Seconds of this machine, of which those in which it is suspended count too."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
