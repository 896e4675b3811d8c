"""What a person sees, what goes to the log, and with which code a job ends."""

import json
import logging
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from leafnet.core import interrupts, terminal
from leafnet.core.errors import UserError
from leafnet.core.settings import _OUTPUT
from leafnet.core.terminal import say
from leafnet.distributed import session

Capture = pytest.CaptureFixture[str]

# The child of a test runs a job as jobs/*.py do, with `job` as given.
CHILD = """
import logging, os, subprocess, sys, time
from pathlib import Path
from leafnet.core import terminal
from leafnet.core.errors import UserError
from leafnet.core.terminal import say

def job(argv):
{body}

sys.exit(terminal.run_job(job))
"""


def child(body: str, *arguments: object) -> list[str]:
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return [sys.executable, "-c", CHILD.format(body=lines), *map(str, arguments)]


def run(body: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(child(body, *arguments), capture_output=True, text=True, timeout=60)


def on_terminal(body: str, *arguments: object, columns: int = 100) -> str:
    """What a terminal gets to see of a child."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    process = subprocess.Popen(
        child(body, *arguments), stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # Linux says so when the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(timeout=30) == 0
    return shown.decode()


# How jobs end


def test_a_job_that_is_done(capsys: Capture) -> None:
    given: list[str] = []
    assert terminal.run_job(given.extend, ["--seed", "3"]) == 0
    assert given == ["--seed", "3"]
    assert capsys.readouterr() == ("", "")


def test_a_mistake_of_the_user_is_one_line(capsys: Capture) -> None:
    def job(argv: Sequence[str]) -> None:
        raise UserError("no-such-folder", "--source photos does not exist")

    assert terminal.run_job(job, []) == 2
    assert capsys.readouterr() == ("", "error[no-such-folder]: --source photos does not exist\n")


def test_a_mistake_of_ours_has_its_stack_trace() -> None:
    done = run('raise KeyError("three\\nlines\\nlong")')
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.endswith("\nerror[internal]: KeyError: 'three\\nlines\\nlong'\n")


def test_a_mistake_of_ours_in_a_job_with_a_log(tmp_path: Path) -> None:
    body = """
with terminal.chatter_to(Path(argv[0])):
    raise RuntimeError("broken\\nin two lines")
"""
    done = run(body, tmp_path / "job.log")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"error[internal]: RuntimeError: broken\nthe details are in {tmp_path / 'job.log'}\n"
    )
    log = (tmp_path / "job.log").read_text()
    assert "Traceback (most recent call last):" in log
    assert log.endswith("RuntimeError: broken\nin two lines\n")


def test_a_mistake_of_the_user_leaves_no_stack_trace_in_the_log(tmp_path: Path) -> None:
    body = """
with terminal.chatter_to(Path(argv[0])):
    raise UserError("one-class", "one class only")
"""
    done = run(body, tmp_path / "job.log")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error[one-class]: one class only\n"
    assert (tmp_path / "job.log").read_text() == ""


@pytest.mark.parametrize("logged", [False, True])
def test_interrupted_from_the_keyboard(tmp_path: Path, logged: bool) -> None:
    wait = "say('ready')\ntime.sleep(60)"
    if logged:
        wait = f"terminal.keeps('checkpoints are kept in runs')\n{wait}"
    if logged:
        inner = wait.replace("\n", "\n    ")
        wait = f"with terminal.chatter_to(Path(argv[0])):\n    {inner}"
    process = subprocess.Popen(
        child(wait, tmp_path / "job.log"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    kept = ": checkpoints are kept in runs" if logged else ""
    assert stderr == f"interrupted{kept}; run the same command again to continue\n"


def test_help_is_not_an_error(capsys: Capture) -> None:
    def job(argv: Sequence[str]) -> None:
        raise SystemExit(0)

    with pytest.raises(SystemExit) as caught:
        terminal.run_job(job, ["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().err == ""


# What is seen and what is logged


NOISE = """
say("before")
with terminal.chatter_to(Path(argv[0])):
    print("a library prints")
    print("a library complains", file=sys.stderr)
    os.write(1, b"C++ writes\\n")
    os.write(2, b"C++ complains\\n")
    subprocess.run(["echo", "a process started by a library"], check=True)
    logging.getLogger("ray").warning("a library logs")
    say("for the person [300 of 2/3] :smile:")
    terminal.table("results", ["class", "n"], [["rust [1]", "1"], ["a:leaf:", "20"]])
    with terminal.progress("read", 2) as advance:
        advance(1)
        advance(1)
print("after", file=sys.stderr)
say("after")
"""


def test_chatter_goes_to_the_log_and_the_rest_to_the_person(tmp_path: Path) -> None:
    path = tmp_path / "new" / "job.log"
    done = run(NOISE, path)
    assert done.returncode == 0
    assert done.stderr == "after\n"
    first, said, *table, last, after = done.stdout.splitlines()
    assert (first, after) == ("before", "after")
    assert said == "for the person [300 of 2/3] :smile:"
    assert [line.rstrip() for line in table] == [
        "results",
        "class      n",
        "rust [1]   1",
        "a:leaf:   20",
    ]
    assert last.startswith("read         2 of 2 images ")
    log = path.read_text()
    for noise in (
        *("a library prints", "a library complains", "C++ writes", "C++ complains"),
        *("a process started by a library", "a library logs"),
    ):
        assert noise in log
        assert noise not in done.stdout + done.stderr
    for told in (said, last):
        assert f"INFO leafnet: {told}" in log
    assert "before" not in log
    assert "after" not in log


def test_a_log_is_added_to_and_not_executable(tmp_path: Path) -> None:
    path = tmp_path / "job.log"
    for line in ("first", "second"):
        with terminal.chatter_to(path):
            os.write(1, f"{line}\n".encode())
    assert path.read_text() == "first\nsecond\n"
    assert not stat.S_IMODE(path.stat().st_mode) & 0o111


def test_the_terminal_is_given_back_after_an_error(tmp_path: Path, capfd: Capture) -> None:
    before = list(logging.getLogger("leafnet").handlers)  # pytest has some of its own

    def job(argv: Sequence[str]) -> None:
        with terminal.chatter_to(tmp_path / "job.log"):
            say("inside")
            raise UserError("x", "y")

    assert terminal.run_job(job, []) == 2
    say("outside")
    os.write(2, b"complaint\n")
    assert capfd.readouterr() == ("inside\noutside\n", "error[x]: y\ncomplaint\n")
    assert logging.getLogger("leafnet").handlers == before


# Progress


def test_progress_in_plain_lines(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_PLAIN_INTERVAL_S", 0.05)
    with terminal.progress("read", 3000, unit="MB") as advance:
        advance(10)
        time.sleep(0.06)
        advance(1000)
        advance(1)
        time.sleep(0.06)
        advance(1989)
    first, last = capfd.readouterr().out.splitlines()
    assert first.startswith("read         1,010 of 3,000 MB   ")
    assert first.endswith(" MB/s")
    assert last.startswith("read         3,000 of 3,000 MB   ")
    assert last.endswith(" s")


def test_progress_that_breaks_off_does_not_say_that_it_ended(capfd: Capture) -> None:
    def job(argv: Sequence[str]) -> None:
        with terminal.progress("read", 3) as advance:
            advance(1)
            raise KeyboardInterrupt

    assert terminal.run_job(job, []) == 130
    assert capfd.readouterr().out == ""


def test_an_interruption_that_a_library_forgets_is_raised_again() -> None:
    def job(argv: Sequence[str]) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupts.raise_if_asked()

    assert terminal.run_job(job, []) == 130
    interrupts.raise_if_asked()  # over, with the job
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interruption_waits_until_ray_has_started_and_a_second_one_does_not() -> None:
    done: list[int] = []

    def start(signals: int) -> None:
        with session.interrupts_wait():
            for _ in range(signals):
                signal.raise_signal(signal.SIGINT)
                done.append(signals)

    for signals in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            start(signals)
    assert done == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupted_process_ends_with_its_code_whatever_its_threads_do() -> None:
    script = """
import atexit, sys
from leafnet.core import terminal
def job(argv):
    atexit.register(print, "at the end", flush=True)
    if argv:
        raise KeyboardInterrupt
terminal.leave(terminal.run_job(job))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "at the end\n")
    done = subprocess.run([sys.executable, "-c", script, "now"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; run the same command again to continue\n"


def test_progress_without_anything_to_do(capfd: Capture) -> None:
    with terminal.progress("read", 0):
        pass
    assert capfd.readouterr().out.startswith("read         0 of 0 images ")


def test_progress_on_a_terminal_is_a_bar(tmp_path: Path) -> None:
    body = """
with terminal.chatter_to(Path(argv[0])), terminal.progress("read", 4) as advance:
    for _ in range(4):
        advance(1)
        print("a worker says", file=sys.stderr)
        print("a worker tells")
        time.sleep(0.3)
"""
    text = on_terminal(body, tmp_path / "job.log")
    assert "━" in text
    assert "2 of 4 images" in text
    assert "images/s" in text
    # The bar is wiped away and one line stays.
    assert text.splitlines()[-1].split("\x1b[2K")[-1].startswith("read         4 of 4 images ")
    log = (tmp_path / "job.log").read_text()
    assert "━" not in log
    for chatter in ("a worker says", "a worker tells"):
        assert chatter not in text
        assert log.count(chatter) == 4


# For machines, and for who wants to see it all


def test_json_lines(tmp_path: Path) -> None:
    body = NOISE + "\nterminal.result(model='runs/a/model', accuracy=0.9)"
    done = run(body, tmp_path / "job.log", "--json")
    assert done.returncode == 0
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["event"] for line in lines] == [
        *("message", "message", "table", "progress", "message", "result"),
    ]
    assert lines[2]["rows"] == [["rust [1]", "1"], ["a:leaf:", "20"]]
    progress = lines[3]
    assert (progress["stage"], progress["done"], progress["total"]) == ("read", 2, 2)
    assert progress["unit"] == "images"
    assert progress["rate"] > 0
    assert lines[-1] == {
        "event": "result",
        "exit_code": 0,
        "model": "runs/a/model",
        "accuracy": 0.9,
    }
    log = (tmp_path / "job.log").read_text()
    assert "INFO leafnet: for the person" in log
    assert "INFO leafnet: read         2 of 2 images" in log


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("raise UserError('one-class', 'one class only')", 2, "one-class"),
        ("raise KeyError('x')", 1, "internal"),
        ("terminal.keeps('all is kept')\nraise KeyboardInterrupt", 130, "interrupted"),
    ],
)
def test_json_of_what_went_wrong(body: str, code: int, error: str) -> None:
    done = run(body, "--json")
    last = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, last["exit_code"], last["error"]) == (code, code, error)
    assert last["message"] in done.stderr


def test_progress_in_json_lines(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_JSON_INTERVAL_S", 0.05)

    def job(argv: Sequence[str]) -> None:
        with terminal.progress("read", 100, unit="MB") as advance:
            advance(10)
            time.sleep(0.06)
            advance(20)
            advance(70)

    assert terminal.run_job(job, ["--json"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["done"] for line in lines[:-1]] == [30, 100]
    say("a person again")
    assert capfd.readouterr().out == "a person again\n"


def test_verbose_shows_the_chatter_as_well(tmp_path: Path) -> None:
    done = run(NOISE, tmp_path / "job.log", "--verbose")
    assert done.returncode == 0
    for noise in (
        *("a library prints", "a library complains", "C++ writes", "C++ complains"),
        *("a process started by a library", "a library logs"),
    ):
        assert done.stderr.count(noise) == 1
        assert noise not in done.stdout
        assert noise in (tmp_path / "job.log").read_text()
    assert "for the person" in done.stdout
    assert "for the person" not in done.stderr
    assert done.stderr.endswith("after\n")


def test_the_flags_of_the_terminal_are_in_the_help_of_each_job() -> None:
    assert {f"--{name}" for name in _OUTPUT} == set(terminal.FLAGS)


ROWS = [
    ("ok", "Python", "3.11.7", ""),
    ("fault", "disk", "0.2 GB of 100.0 GB free in " + "/a/long/path" * 8, "make room " * 12),
]


def test_a_checklist_in_plain_lines(capfd: Capture) -> None:
    terminal.checklist(ROWS)
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "ok       Python         3.11.7"
    assert lines[1].startswith("fault    disk           0.2 GB of 100.0 GB free in ")
    assert any(line.startswith(" " * 24 + "remedy: make room") for line in lines)
    assert max(map(len, lines)) <= 100


def test_a_checklist_on_a_terminal(tmp_path: Path) -> None:
    text = on_terminal(f"terminal.checklist({ROWS!r})", columns=160)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(map(len, plain.splitlines())) <= 100
    assert "status" in plain.splitlines()[0]
    assert "\x1b[32mok" in text
    assert "make room" in plain


def test_an_interrupt_that_a_library_makes_of_sigterm_ends_with_its_code(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Ray's C++ raises a plain KeyboardInterrupt in place of what a handler raised."""

    def job(argv: Sequence[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    assert terminal.run_job(job, []) == 143
    assert capfd.readouterr().err.startswith("ended by SIGTERM")
