import json
import logging
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from leafnet.core import lock, storage
from leafnet.core.errors import EXIT_IN_USE, UserError
from tests.conftest import make_bucket, use_server


@pytest.fixture(params=["local", "memory", "moto"])
def out(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    if request.param == "moto":
        use_server(monkeypatch, request.getfixturevalue("moto").environment())
        name = f"lock-{tmp_path.name}".lower().replace("_", "-")[:40].strip("-")
        yield make_bucket(name) + "/runs/a"
        storage._filesystem.cache_clear()
    else:
        yield str(tmp_path) if request.param == "local" else f"memory://lock-{tmp_path.name}"


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def owner(**changes: Any) -> lock.Owner:
    """A job on another machine."""
    known: dict[str, Any] = {
        "id": "other",
        "host": "far-away",
        "pid": 7,
        "process": None,
        "started_at": ago(7200),
        "alive_at": ago(0),
        "timeout_s": 60.0,
    }
    return lock.Owner(**(known | changes))


def leave_lock(out: str, number: int = 5, **changes: Any) -> None:
    """What the lock of a job on another machine looks like, which has just shown that it lives."""
    held = owner(**changes).model_dump()
    storage.write_json(storage.join(out, lock.FOLDER, f"{number:08d}.json"), held)


def locks(out: str) -> list[str]:
    return storage.list_names(storage.join(out, lock.FOLDER))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> "Clock":
    """Time that passes only while somebody sleeps."""
    found = Clock()
    monkeypatch.setattr(lock, "_now_s", lambda: found.now)
    monkeypatch.setattr(time, "sleep", found.sleep)
    return found


class Clock:
    """Seconds, and what happens at some of them."""

    def __init__(self) -> None:
        self.now, self.events = 1000.0, list[tuple[float, Callable[[], Any]]]()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for at, event in [e for e in self.events if e[0] <= self.now]:
            self.events.remove((at, event))
            event()


def state(out: str) -> dict[str, bool]:
    """The lock files, and whether each says that nobody holds it."""
    folder = storage.join(out, lock.FOLDER)
    return {name: storage.read_json(storage.join(folder, name))["released"] for name in locks(out)}


def test_the_second_is_told_who_holds_it(out: str) -> None:
    with lock.hold(out, timeout_s=60) as held:
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on") as caught:
            lock._acquire(out, owner(id="me"))
        assert caught.value.exit_code == EXIT_IN_USE
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
            lock.refuse_held(out)
        assert held.number == 1
    lock.refuse_held(out)
    assert state(out) == {"00000001.json": True}
    with lock.hold(out, timeout_s=60) as held:
        held.check()
        assert held.number == 2
    assert state(out) == {"00000002.json": True}


def test_another_machine_is_watched_and_then_taken_over(out: str, clock: Clock) -> None:
    """By this machine's clock alone, whatever that of the other says."""
    for skew in (-100_000, 0, 100_000):
        leave_lock(out, 5, alive_at=ago(skew))
        began = clock.now
        lock._acquire(out, owner(id="me"))
        assert 60 < clock.now - began < 65
        assert locks(out) == ["00000006.json"]
        storage.delete(storage.join(out, lock.FOLDER, "00000006.json"))


def test_another_machine_that_shows_a_sign_of_life_is_left_alone(out: str, clock: Clock) -> None:
    for skew in (-100_000, 0, 100_000):
        leave_lock(out, 5, alive_at=ago(skew))
        clock.events = [(clock.now + 50, lambda: leave_lock(out, 5, beat=1))]
        with pytest.raises(
            UserError, match=r"process 7 on far-away, since .*; wait for it"
        ) as told:
            lock._acquire(out, owner(id="me"))
        assert (told.value.reason, told.value.exit_code) == ("output-in-use", EXIT_IN_USE)
        assert locks(out) == ["00000005.json"]


def test_another_machine_that_releases_while_it_is_watched(out: str, clock: Clock) -> None:
    leave_lock(out, 5)
    clock.events = [(clock.now + 10, lambda: leave_lock(out, 5, released=True))]
    assert lock._acquire(out, owner(id="me")).number == 6
    assert clock.now < 1015


def test_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (
        "import os, sys; from leafnet.core import lock; "
        f"held = lock.hold({str(tmp_path)!r}, timeout_s=3600); held.__enter__(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {child.pid} on"):
        lock._acquire(str(tmp_path), owner(id="me"))
    child.kill()
    # Not waited for yet: a dead child that its parent has not asked for is dead as well.
    deadline = time.monotonic() + 10
    while lock._process(child.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    with lock.hold(str(tmp_path), timeout_s=3600):
        pass
    child.wait()


def _try(out: str, number: int, results: Any, over: Any) -> None:
    try:
        lock._acquire(
            out, owner(id=str(number), process=lock._process(os.getpid()), pid=os.getpid())
        )
        results.put(number)
    except UserError as error:
        results.put(error.reason)
    over.wait(120)  # the one that has it is alive


def test_one_of_many_takes_over(tmp_path: Path) -> None:
    leave_lock(str(tmp_path), timeout_s=1.0)
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    over: Any = context.Event()
    arguments = [(str(tmp_path), number, results, over) for number in range(4)]
    children = [context.Process(target=_try, args=of_child) for of_child in arguments]
    for child in children:
        child.start()
    found = [results.get(timeout=60) for _ in children]
    over.set()
    for child in children:
        child.join()
    (winner,) = [number for number in found if number != "output-in-use"]
    assert winner in range(4)
    (name,) = locks(str(tmp_path))
    url = storage.join(str(tmp_path), lock.FOLDER, name)
    assert storage.read_json(url)["id"] == str(winner)


def test_who_lost_the_lock_stops(out: str) -> None:
    with lock.hold(out, timeout_s=60) as held:
        storage.write_json(storage.join(out, lock.FOLDER, "00000002.json"), {"id": "other"})
        held._beat()
        with pytest.raises(UserError, match="took the output over") as caught:
            held.check()
    assert caught.value.exit_code == EXIT_IN_USE
    assert "00000002.json" in storage.list_names(storage.join(out, lock.FOLDER))


def test_signs_of_life(tmp_path: Path) -> None:
    with lock.hold(str(tmp_path), timeout_s=1) as held:
        first = json.loads(Path(held.url).read_text())["alive_at"]
        deadline = time.monotonic() + 20
        while json.loads(Path(held.url).read_text())["alive_at"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_at_rest_the_last_number_is_left_and_says_so(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        with lock.hold(str(tmp_path / "run"), timeout_s=60) as held:
            assert held.number == number
        assert [path.name for path in (tmp_path / "run").iterdir()] == [lock.FOLDER]
        assert state(str(tmp_path / "run")) == {f"{number:08d}.json": True}


def test_an_output_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to --out .*/file/run: ") as caught:
        lock._acquire(str(tmp_path / "file" / "run"), owner(id="me"))
    assert caught.value.reason == "cannot-write"


def test_a_store_that_is_away_at_the_end_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        with lock.hold(str(tmp_path), timeout_s=60) as held:
            monkeypatch.setattr(held, "url", "ftpx://gone/00000001.json")
            raise KeyError("work")

    with pytest.raises(KeyError, match="work"):
        work()


# Without a thread that shows signs of life beside the test.


@pytest.fixture
def place(tmp_path: Path) -> str:
    return f"memory://lock-{tmp_path.name}"


def test_a_lock_says_who_holds_it(place: str) -> None:
    with lock.hold(place, timeout_s=45) as held:
        said = storage.read_json(held.url)
    assert said.keys() == owner().model_dump().keys()
    assert said["host"] == socket.gethostname()
    assert (said["pid"], said["timeout_s"]) == (os.getpid(), 45)
    assert said["process"] == lock._process(os.getpid())
    for name in ("started_at", "alive_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", said[name])
        silent = datetime.now(UTC) - datetime.fromisoformat(said[name])
        assert timedelta(0) <= silent < timedelta(seconds=30)


@pytest.mark.parametrize("timeout_s", [6.0, 600.0])
def test_silence_is_measured_by_the_time_of_who_holds_it(
    timeout_s: float, place: str, clock: Clock
) -> None:
    leave_lock(place, timeout_s=timeout_s)
    lock.refuse_held(place)
    assert timeout_s < clock.now - 1000 < 1.2 * timeout_s


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"{}", b"[]", b'{"id": 3}'])
def test_a_lock_that_was_not_written_whole_is_nobodys(
    data: bytes, place: str, clock: Clock
) -> None:
    """As after a power cut; unless it is being written just now."""
    url = storage.join(place, lock.FOLDER, "00000005.json")
    storage.write_bytes(url, data)
    clock.events = [(clock.now + 5, lambda: leave_lock(place, 5))]
    with pytest.raises(UserError, match="in use by process 7 on far-away"):
        lock._acquire(place, owner(id="me"))
    storage.write_bytes(url, data)
    assert lock._acquire(place, owner(id="me")).number == 6
    assert locks(place) == ["00000006.json"]


def test_a_process_of_this_machine_lives_as_long_as_it_runs(place: str) -> None:
    """However silent it is: it may be stopped, or its disk be slow."""
    leave_lock(place, pid=os.getpid(), process=lock._process(os.getpid()), alive_at=ago(100_000))
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}") as caught:
        lock.refuse_held(place)
    assert "taken over" not in str(caught.value)


@pytest.mark.parametrize("changed", [1, 2])
def test_a_process_of_this_machine_that_is_gone_holds_nothing(changed: int, place: str) -> None:
    """Another one may have its number by now, with another start."""
    process = lock._process(os.getpid())
    assert process is not None
    process[changed] += "1"
    leave_lock(place, pid=os.getpid(), process=process, alive_at=ago(0))
    lock.refuse_held(place)
    lock._acquire(place, owner(id="me"))
    assert locks(place) == ["00000006.json"]


def test_a_process_with_the_same_number_on_another_machine_is_another(
    place: str, clock: Clock
) -> None:
    process = lock._process(os.getpid())
    assert process is not None
    leave_lock(place, pid=os.getpid(), process=["another boot", *process[1:]])
    clock.events = [(clock.now + 50, lambda: leave_lock(place, beat=1))]
    with pytest.raises(UserError, match="in use by"):
        lock.refuse_held(place)


def test_where_processes_cannot_be_told_apart_the_time_tells(
    place: str, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(lock, "_process", lambda pid: None)
    leave_lock(place, process=["boot", "7", "1"])
    clock.events = [(clock.now + 50, lambda: leave_lock(place, beat=1))]
    with pytest.raises(UserError, match="in use by"):
        lock.refuse_held(place)
    lock.refuse_held(place)


def test_the_highest_number_counts(place: str) -> None:
    mine = lock._process(os.getpid())
    for number in (3, 4, 5, 6):
        leave_lock(place, number, released=True)
    leave_lock(place, 7, pid=os.getpid(), process=mine)
    for refused in (lambda: lock.refuse_held(place), lambda: lock._acquire(place, owner())):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
            refused()
    leave_lock(place, 7, released=True)
    leave_lock(place, 4, pid=os.getpid(), process=mine)
    lock.refuse_held(place)
    held = lock._acquire(place, owner(id="me"))
    assert held.url == storage.join(place, lock.FOLDER, "00000008.json")
    assert locks(place) == ["00000008.json"]
    held._beat()
    held.check()


def test_a_number_never_falls_and_so_nobody_returns_from_the_dead(place: str) -> None:
    """One is suspended, two others have come and gone; then it writes the lock it had."""
    first = acquired(place)
    storage.delete(first.url)
    leave_lock(place, 2, released=True)
    held = lock._acquire(place, owner(id="third"))
    first._write()
    assert held.number == 3
    held._beat()
    held.check()
    first._beat()
    with pytest.raises(UserError, match="another job took the output over"):
        first.check()
    held.release()
    assert lock._acquire(place, owner(id="fourth")).number == 4


def test_a_store_that_overwrites_what_it_was_to_create_is_refused(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As S3 servers do that do not know If-None-Match."""

    def create(url: str, data: bytes) -> bool:
        storage.write_bytes(url, data)
        return True

    monkeypatch.setattr(storage, "create_bytes", create)
    with pytest.raises(UserError, match=r"If-None-Match.*use another store") as told:
        lock._acquire(place, owner())
    assert told.value.reason == "no-exclusive-create"
    assert locks(place) == []


def test_other_files_in_its_folder_are_no_locks(place: str) -> None:
    for name in ("notes.json", "00000009.txt", "x0000009.json"):
        storage.write_bytes(storage.join(place, lock.FOLDER, name), b"x")
    lock.refuse_held(place)
    assert lock._acquire(place, owner()).url.endswith("/00000001.json")


def test_a_lock_that_is_gone_while_it_is_looked_at(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_lock(place)
    monkeypatch.setattr(lock, "_look", lambda url: None)
    lock.refuse_held(place)
    assert lock._acquire(place, owner()).url.endswith("/00000006.json")


def test_who_came_second_looks_again(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(url: str, data: bytes) -> bool:
        leave_lock(place, 1, pid=os.getpid(), process=lock._process(os.getpid()))
        return False

    monkeypatch.setattr(storage, "create_bytes", create)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        lock._acquire(place, owner())


@pytest.mark.parametrize(("times", "held"), [(20, True), (21, False)])
def test_a_folder_that_others_take_away_is_made_again(
    times: int, held: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = iter([*[FileNotFoundError("no\nfolder")] * times, None])

    def create(url: str, data: bytes) -> bool:
        if data == b"{}":
            return False
        if error := next(tries):
            raise error
        return True

    monkeypatch.setattr(storage, "create_bytes", create)
    if held:
        assert lock._acquire(place, owner()).url.endswith("/00000001.json")
    else:
        with pytest.raises(UserError, match=f"cannot write to --out {place}: no folder$"):
            lock._acquire(place, owner())


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (PermissionError("may\n  not"), "cannot-write", "cannot write to --out OUT: may not"),
        (TimeoutError(), "cannot-write", "cannot write to --out OUT: TimeoutError"),
        (UserError("no-keys", "there are no keys"), "no-keys", "there are no keys"),
    ],
)
def test_why_an_output_cannot_be_written(
    error: Exception, reason: str, message: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = iter([error])

    def create(url: str, data: bytes) -> bool:
        raise next(tries)

    monkeypatch.setattr(storage, "create_bytes", create)
    with pytest.raises(UserError) as caught:
        lock._acquire(place, owner())
    assert caught.value.reason == reason
    assert str(caught.value) == message.replace("OUT", place)


def acquired(place: str) -> lock.Lock:
    return lock._acquire(place, owner(id="me"))


def test_a_sign_of_life_says_when(place: str) -> None:
    held = acquired(place)
    storage.write_json(held.url, owner(id="me", alive_at=ago(50)).model_dump())
    held._beat()
    said = storage.read_json(held.url)
    silent = datetime.now(UTC) - datetime.fromisoformat(said.pop("alive_at"))
    assert timedelta(0) <= silent < timedelta(seconds=30)
    assert (said["id"], said["host"], said["beat"]) == ("me", "far-away", 1)
    held._beat()
    assert storage.read_json(held.url)["beat"] == 2


def test_the_store_is_asked_only_after_a_long_silence(place: str, clock: Clock) -> None:
    held = acquired(place)
    leave_lock(place, 2)
    clock.now += 30
    held.check()
    clock.now += 1
    with pytest.raises(UserError, match="for more than 60 s; run the same") as caught:
        held.check()
    assert (caught.value.reason, caught.value.exit_code) == ("lock-lost", EXIT_IN_USE)


def test_a_sign_of_life_ends_the_silence(place: str, clock: Clock) -> None:
    held = acquired(place)
    clock.now += 61
    held.check()
    leave_lock(place, 2)
    held.check()  # the last sign of life was just now


def test_who_cannot_show_a_sign_of_life_counts_itself_dead_before_others_do(
    place: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = acquired(place)

    def away(*args: Any) -> Any:
        raise UserError("no-network", "the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_bytes", away)
        clock.now += 39
        held.check()
        clock.now += 2
        with pytest.raises(UserError, match="no sign of life for 41 s, and another may") as told:
            held.check()
        assert (told.value.reason, told.value.exit_code) == ("lock-lost", EXIT_IN_USE)
    held.check()  # the store is back, and nobody has come


def test_a_slow_sign_of_life_counts_from_its_beginning(
    place: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have begun to watch when it was written, and not when the answer came."""
    held = acquired(place)
    write = storage.write_json

    def slowly(url: str, document: Any) -> None:
        write(url, document)
        clock.now += 41

    monkeypatch.setattr(storage, "write_json", slowly)
    clock.now += 31
    with pytest.raises(UserError, match="no sign of life for 41 s"):
        held.check()


@pytest.mark.parametrize("loss", ["deleted", "another's", "a higher number"])
def test_what_is_lost_stays_lost_and_is_left_alone(loss: str, place: str) -> None:
    held = acquired(place)
    mine = storage.read_bytes(held.url)
    if loss == "deleted":
        storage.delete(held.url)
    elif loss == "another's":
        leave_lock(place, 1)
    else:
        leave_lock(place, 2)
    before = [storage.read_bytes(storage.join(place, lock.FOLDER, n)) for n in locks(place)]
    held._beat()
    with pytest.raises(UserError, match="another job took the output over"):
        held.check()
    held.release()
    after = [storage.read_bytes(storage.join(place, lock.FOLDER, n)) for n in locks(place)]
    assert after == before
    # Also when the other is gone.
    for name in locks(place):
        storage.delete(storage.join(place, lock.FOLDER, name))
    storage.write_bytes(held.url, mine)
    held._alive_at = -1000.0
    with pytest.raises(UserError, match="another job took the output over"):
        held.check()
    assert storage.read_bytes(held.url) == mine


def test_a_store_that_is_away_takes_no_lock_away(
    place: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = acquired(place)
    monkeypatch.setattr(held, "url", "ftpx://gone/00000001.json")
    with caplog.at_level(logging.WARNING, logger="leafnet"):
        held._beat()
        held.check()
        assert "cannot renew ftpx://gone/00000001.json: " in caplog.text
        held.release()
        assert "cannot release ftpx://gone/00000001.json: " in caplog.text


class Over(threading.Event):
    """An event that is asked and does not wait."""

    def __init__(self, *answers: bool) -> None:
        super().__init__()
        self.answers, self.waited = iter(answers), list[float | None]()

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.append(timeout)
        return next(self.answers)


def test_signs_of_life_come_five_times_in_the_time_of_silence(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = acquired(place)
    beats = []
    monkeypatch.setattr(held, "_beat", lambda: beats.append(1))
    over = Over(False, False, False, True)
    held.follow(over)
    assert over.waited == [12.0] * 4
    assert len(beats) == 3


def test_who_has_lost_the_lock_shows_no_more_signs_of_life(place: str) -> None:
    held = acquired(place)
    leave_lock(place, 2)
    over = Over(False, False)
    held.follow(over)
    assert len(over.waited) == 2
    assert held._lost is not None


def test_its_thread_ends_with_it_and_keeps_no_process(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def follow(self: lock.Lock, over: threading.Event) -> None:
        over.wait(20)
        time.sleep(0.3)

    monkeypatch.setattr(lock.Lock, "follow", follow)
    before = set(threading.enumerate())
    began = time.monotonic()
    with lock.hold(place, timeout_s=60):
        (thread,) = set(threading.enumerate()) - before
        assert thread.daemon
    assert not thread.is_alive()
    assert time.monotonic() - began < 15
    assert state(place) == {"00000001.json": True}


def started_at(pid: int) -> float:
    """When a process was started [Unix time, s], from what `_process` tells."""
    process = lock._process(pid)
    assert process is not None
    assert process[1] == str(pid)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert process[0] == f"{boot} {os.readlink(f'/proc/{pid}/ns/pid')}"
    (btime,) = re.findall(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
    # proc(5): clock ticks after the boot.
    return int(btime) + int(process[2]) / os.sysconf("SC_CLK_TCK")


def test_what_tells_a_process_from_others(tmp_path: Path) -> None:
    # A name in which its end cannot be told from a state.
    program = tmp_path / "x) R (y"
    program.symlink_to(sys.executable)
    child = subprocess.Popen([program, "-I", "-S", "-c", "import time; time.sleep(60)"])
    try:
        assert "(x) R (y)" in Path(f"/proc/{child.pid}/stat").read_text()
        assert abs(started_at(child.pid) - time.time()) < 30
        assert lock._process(child.pid) == lock._process(child.pid)
        assert lock._process(child.pid) != lock._process(os.getpid())
    finally:
        child.kill()
        child.wait()
    assert lock._process(child.pid) is None
