"""Folders that processes of a machine share: nobody reads what is half made or being deleted."""

import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leafnet.core import scratch
from leafnet.core.errors import UserError
from tests.left_out import leave_out

ROWS = 200_000


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this user on this machine, of the test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"leafnet-{os.getuid()}"


def fill(folder: Path) -> None:
    """Slowly, and into a mapped file, which has its whole length from the start."""
    mapped = scratch.mapped(folder / "a.npy", dtype=np.int32, shape=(ROWS,))
    for at in range(0, ROWS, ROWS // 10):
        mapped[at : at + ROWS // 10] = 7
        time.sleep(0.01)
    mapped.flush()


def look(shared: scratch.Shared) -> set[int]:
    return set(np.load(shared.path / "a.npy", mmap_mode="r").tolist())


def _use(folder: str, number: int, answers: Any) -> None:
    tempfile.tempdir = folder
    for turn in range(8):
        shared = scratch.share("features", fill)
        found = look(shared)
        time.sleep(0.003 * ((number + turn) % 3))
        found |= look(shared)  # still there
        shared.release()
        if found != {7}:
            answers.put(found)
            return
    answers.put({7})


def test_users_that_come_and_go_never_see_half_a_folder(node: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    children = [
        context.Process(target=_use, args=(str(tmp_path), number, answers)) for number in range(4)
    ]
    for child in children:
        child.start()
    found = [answers.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    assert found == [{7}] * 4
    assert list(node.iterdir()) == []  # the last one deleted it


def test_the_last_one_deletes_it(node: Path) -> None:
    first, second = scratch.share("a", fill), scratch.share("a", fill)
    mapped = np.load(first.path / "a.npy", mmap_mode="r")
    first.release()
    assert look(second) == {7}
    second.release()
    assert list(node.iterdir()) == []
    assert set(mapped.tolist()) == {7}  # what is mapped stays readable


def _die(folder: str, how: str) -> None:
    tempfile.tempdir = folder

    def deadly(place: Path) -> None:
        fill(place)
        if how == "filling":
            os.kill(os.getpid(), signal.SIGKILL)

    shared = scratch.share("a", deadly)
    assert look(shared) == {7}
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how", ["filling", "using"])
def test_a_process_that_was_killed(node: Path, tmp_path: Path, how: str) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_die, args=(str(tmp_path), how))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    filled: list[Path] = []

    def counted(place: Path) -> None:
        filled.append(place)
        fill(place)

    shared = scratch.share("a", counted)
    assert bool(filled) == (how == "filling")  # a whole one is used again
    assert look(shared) == {7}
    shared.release()
    assert list(node.iterdir()) == []


def test_a_copy_that_changed_is_filled_again(node: Path) -> None:
    shared = scratch.share("a", fill)
    with open(shared.path / "a.npy", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\1")
    shared._lock.close()  # its process is gone
    assert look(scratch.share("a", fill)) == {7}


def test_an_error_leaves_nothing(node: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").write_bytes(b"1")
        raise KeyError("store")

    with pytest.raises(KeyError, match="store"):
        scratch.share("a", broken)
    assert [path.name for path in node.iterdir()] == ["a.lock"]
    assert look(scratch.share("a", fill)) == {7}


@pytest.mark.parametrize("there", ["link", "file", "writable"])
def test_the_folder_of_somebody_else_is_refused(node: Path, tmp_path: Path, there: str) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    if there == "link":
        node.symlink_to(theirs)
    elif there == "file":
        node.write_bytes(b"")
    else:
        node.mkdir()
        node.chmod(0o777)
    with pytest.raises(UserError, match="this user alone can write to; delete it, or set") as told:
        scratch.share("a", fill)
    assert told.value.reason == "not-ours"
    assert list(theirs.iterdir()) == []


def test_the_folder_is_closed_to_others(node: Path) -> None:
    shared = scratch.share("a", fill)
    assert node.stat().st_mode & 0o777 == 0o700
    shared.release()


def test_a_full_disk_is_told_and_does_not_kill(tmp_path: Path) -> None:
    """A write to a mapped file for which there is no room would end the process by SIGBUS."""
    code = (
        "import tempfile; import numpy as np; from leafnet.core import scratch; "
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "fill = lambda folder: scratch.mapped(folder / 'a', dtype=np.int8, shape=(1 << 22,))\n"
        "try: scratch.share('a', fill)\n"
        "except scratch.UserError as error: print(error.reason, error)"
    )
    mounted = f"mount -t tmpfs -o size=1m tmpfs {tmp_path} || exit 77; exec {sys.executable} -c"
    # A namespace of its own: the disk is gone with the process.
    command = ["unshare", "-m", "sh", "-c", f"{mounted} {shlex.quote(code)}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode in (1, 77) and not done.stdout:
        leave_out("no right to mount a disk of a megabyte: run the tests as root")
    assert done.stdout.startswith("disk-full"), done.stderr
    assert "No space left on device; make room there, or set TMPDIR" in done.stdout


def test_those_who_wait_are_not_shut_out(node: Path) -> None:
    """Threads of one process that come while it is filled all get it, filled once."""
    count: list[int] = []

    def counted(folder: Path) -> None:
        count.append(1)
        fill(folder)

    found: list[scratch.Shared] = []
    threads = [
        threading.Thread(target=lambda: found.append(scratch.share("a", counted))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1
    assert all(look(shared) == {7} for shared in found)
