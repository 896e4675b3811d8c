import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leafnet import lock, storage
from leafnet.errors import EXIT_IN_USE, UserError
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


def leave_lock(out: str, **changes: Any) -> None:
    """What the lock of a job on another machine looks like."""
    held = {
        "id": "other",
        "host": "far-away",
        "pid": 7,
        "process": None,
        "started_at": "2026-11-24T02:15:00.000+00:00",
        "alive_at": lock._now(),
        "timeout_s": 60.0,
    }
    storage.write_json(storage.join(out, lock.FOLDER, "00000005.json"), held | changes)


def test_the_second_is_told_who_holds_it(out: str) -> None:
    with lock.hold(out, timeout_s=60):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on") as caught:
            lock._acquire(out, {"id": "me"}, 60)
        assert caught.value.exit_code == EXIT_IN_USE
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
            lock.refuse_held(out)
    lock.refuse_held(out)
    assert storage.list_names(storage.join(out, lock.FOLDER)) == []
    with lock.hold(out, timeout_s=60) as held:
        held.check()


def test_another_machine_is_waited_for_and_then_taken_over(out: str) -> None:
    leave_lock(out)
    with pytest.raises(UserError, match=r"process 7 on far-away.*taken over after 60 s"):
        lock._acquire(out, {"id": "me"}, 60)
    leave_lock(out, alive_at="2026-11-24T02:16:00.000+00:00")
    with lock.hold(out, timeout_s=60) as held:
        assert storage.list_names(storage.join(out, lock.FOLDER)) == ["00000006.json"]
        held.check()


def test_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (
        "import os, sys; from leafnet import lock; "
        f"held = lock.hold({str(tmp_path)!r}, timeout_s=3600); held.__enter__(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {child.pid} on"):
        lock._acquire(str(tmp_path), {"id": "me"}, 3600)
    child.kill()
    # Not waited for yet: a dead child that its parent has not asked for is dead as well.
    deadline = time.monotonic() + 10
    while lock._process(child.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    with lock.hold(str(tmp_path), timeout_s=3600):
        pass
    child.wait()


def _try(out: str, number: int, results: Any) -> None:
    try:
        lock._acquire(out, {"id": str(number), "pid": 1, "process": None, "host": "h"}, 60)
        results.put(number)
    except (UserError, KeyError):
        results.put(None)


def test_one_of_many_takes_over(tmp_path: Path) -> None:
    leave_lock(str(tmp_path), alive_at="2026-11-24T02:16:00.000+00:00")
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    children = [context.Process(target=_try, args=(str(tmp_path), i, results)) for i in range(4)]
    for child in children:
        child.start()
    found = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert len([number for number in found if number is not None]) == 1


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


def test_at_rest_nothing_is_left(tmp_path: Path) -> None:
    with lock.hold(str(tmp_path / "run"), timeout_s=60):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [lock.FOLDER]
    assert list((tmp_path / "run").iterdir()) == []


def test_an_output_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to --out .*/file/run: ") as caught:
        lock._acquire(str(tmp_path / "file" / "run"), {"id": "me"}, 60)
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
