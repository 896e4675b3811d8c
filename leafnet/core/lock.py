"""One job at a time for one output folder, on any filesystem that can create a file exclusively.

`_lock/00000007.json` says who holds the output and when it last showed a sign of life. The highest
number counts. Whoever finds its owner dead creates the next number, which only one of many can;
nobody ever deletes or overwrites the lock of a living owner. At rest there is no lock file.
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
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from leafnet.core import storage
from leafnet.core.errors import EXIT_IN_USE, UserError

FOLDER = "_lock"
_TRIES = 20


class Lock:
    """A lock that is held; `check` it before anything that only its holder may do."""

    def __init__(self, url: str, owner: dict[str, Any], timeout_s: float) -> None:
        self.url = url
        self._owner, self._timeout_s = owner, timeout_s
        self._alive_at = time.monotonic()
        self._lost: str | None = None

    def check(self) -> None:
        """Raise unless the output is this job's still.

        Raises:
            UserError: another job took it over, because this one gave no sign of life for so long
                (a suspended machine, a network that was away).
        """
        if self._lost is None and time.monotonic() - self._alive_at > self._timeout_s:
            self._beat()
        if self._lost is not None:
            raise UserError("lock-lost", self._lost, exit_code=EXIT_IN_USE)

    def _beat(self) -> None:
        """Show a sign of life, unless the lock is another's."""
        try:
            held = _read(self.url)
            if held is None or held["id"] != self._owner["id"] or _highest(self.url) != self.url:
                self._lost = (
                    "another job took the output over, since this one gave no sign of life for "
                    f"more than {self._timeout_s:g} s; run the same command again"
                )
                return
            storage.write_json(self.url, self._owner | {"alive_at": _now()})
            self._alive_at = time.monotonic()
        # A store that does not answer now may do so at the next beat.
        except Exception as error:
            logging.getLogger("leafnet").warning("cannot renew %s: %s", self.url, error)

    def follow(self, over: threading.Event) -> None:
        """Show signs of life until `over`."""
        while not over.wait(self._timeout_s / 5) and self._lost is None:
            self._beat()

    def release(self) -> None:
        """Give the output to the next job. Where that fails, the next job finds the owner dead."""
        if self._lost is not None:
            return
        try:
            storage.delete(self.url)
        except Exception as error:
            logging.getLogger("leafnet").warning("cannot delete %s: %s", self.url, error)
        if storage.is_local(self.url):
            with suppress(OSError):  # the next job is there already
                Path(storage.absolute(self.url)).parent.rmdir()


def refuse_held(out: str) -> None:
    """Look whether a job holds the output folder `out`, without taking it.

    Raises:
        UserError: one does, and who; exit code 3.
    """
    folder = storage.join(out, FOLDER)
    names = _names(folder)
    held = _read(storage.join(folder, names[-1])) if names else None
    if held is not None:
        _refuse_alive(out, held)


@contextmanager
def hold(out: str, *, timeout_s: float) -> Iterator[Lock]:
    """Hold the output folder `out` until the block ends.

    Raises:
        UserError: another job holds it, and who; exit code 3. It cannot be written to.
    """
    owner = {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": _process(os.getpid()),
        "started_at": _now(),
        "timeout_s": timeout_s,
    }
    lock = _acquire(out, owner, timeout_s)
    over = threading.Event()
    thread = threading.Thread(target=lock.follow, args=(over,), daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        over.set()
        thread.join()
        lock.release()


def _acquire(out: str, owner: dict[str, Any], timeout_s: float) -> Lock:
    folder = storage.join(out, FOLDER)
    for attempt in itertools.count():
        names = _names(folder)
        number = int(names[-1].split(".")[0]) + 1 if names else 1
        if names:
            held = _read(storage.join(folder, names[-1]))
            if held is not None:
                _refuse_alive(out, held)
        url = storage.join(folder, f"{number:08d}.json")
        try:
            created = storage.create_bytes(url, json.dumps(owner | {"alive_at": _now()}).encode())
        # Every filesystem has errors of its own.
        except Exception as error:
            if isinstance(error, UserError):
                raise
            # Who released the lock may have taken the empty folder away.
            if isinstance(error, FileNotFoundError) and attempt < _TRIES:
                continue
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError("cannot-write", f"cannot write to --out {out}: {reason}") from None
        if created:
            for name in names:  # of dead owners
                storage.delete(storage.join(folder, name))
            return Lock(url, owner, timeout_s)
    raise AssertionError("it counts for ever")


def _refuse_alive(out: str, held: dict[str, Any]) -> None:
    silent = (datetime.now(UTC) - datetime.fromisoformat(held["alive_at"])).total_seconds()
    here = _process(int(held["pid"]))
    mine, theirs = _process(os.getpid()), held["process"]
    # On this machine the process can be asked for; on others only the time tells.
    same_machine = mine is not None and theirs is not None and mine[0] == theirs[0]
    dead = here != theirs if same_machine else silent > held["timeout_s"]
    if not dead:
        waiting = "" if same_machine else f"; it is taken over after {held['timeout_s']:g} s"
        raise UserError(
            "output-in-use",
            f"{out} is in use by process {held['pid']} on {held['host']}, since "
            f"{held['started_at']}, last sign of life {silent:.0f} s ago{waiting}; wait for it or "
            "stop it",
            exit_code=EXIT_IN_USE,
        )


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


def _highest(url: str) -> str:
    folder = url.rsplit("/", 1)[0]
    names = _names(folder)
    return storage.join(folder, names[-1]) if names else ""


def _read(url: str) -> dict[str, Any] | None:
    try:
        held: dict[str, Any] = storage.read_json(url)
        return held
    except FileNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
