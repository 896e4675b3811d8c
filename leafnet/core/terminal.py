"""What a person sees: a few lines and progress bars. Everything else goes to a log file.

Every job takes two flags: `--verbose` also shows the log on stderr, and `--json` writes JSON lines
for machines to stdout instead of text:

    {"event": "message", "text": …}
    {"event": "progress", "stage": …, "done": …, "total": …, "unit": …, "rate": …, "seconds": …}
    {"event": "table", "title": …, "columns": […], "rows": [[…], …]}
    {"event": "check", "name": …, "status": "ok" | "warning" | "fault", "found": …, "remedy": …}
    {"event": "result", "exit_code": …, …}        the last one

Ray, TensorFlow and absl print from C++, from threads and on behalf of other machines. Only
redirecting the process's file descriptors catches all of it; leafnet keeps duplicates of the real
ones for its own output.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.core.interrupts import remembered_interrupts, sigterm_interrupts, was_terminated

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

# Flags of every job beside its settings; settings.py explains them in --help.
FLAGS = ("--verbose", "--json")

# Seconds between lines of progress if there is no terminal to draw a bar on.
_PLAIN_INTERVAL_S = 15.0
_JSON_INTERVAL_S = 1.0
_TAIL_S = 0.2
# What marks lines of the log that were printed as well.
_SAID = b" INFO leafnet: "
_STATUS_STYLES = {"ok": "green", "warning": "bold yellow", "fault": "bold reverse red"}
_CHECKLIST_INDENT = " " * 24
_CHECKLIST_WRAP: dict[str, Any] = {
    "subsequent_indent": _CHECKLIST_INDENT,
    "break_on_hyphens": False,
}


def _console_on(file: TextIO | None) -> Console:
    """Make a console without markup: names of files and classes may have brackets in them."""
    return Console(file=file, highlight=False, soft_wrap=True, markup=False, emoji=False)


_console = _console_on(None)
_log_path: Path | None = None
_verbose = False
_json = False
_kept = ""
_result: dict[str, Any] = {}


def keeps(text: str) -> None:
    """Set the text about the work so far that is printed if the job is interrupted."""
    global _kept
    _kept = text


def result(**values: Any) -> None:
    """Add results, ready for JSON, to the last line of `--json`."""
    _result.update(values)


def flags() -> list[str]:
    """Return the flags of the terminal that this job was given, for jobs that it starts."""
    return [flag for flag, given in zip(FLAGS, (_verbose, _json), strict=True) if given]


def _emit(event: str, **values: Any) -> None:
    """Write one line of `--json`."""
    line = json.dumps({"event": event, **values}, ensure_ascii=False)
    _console.file.write(f"{line}\n")
    _console.file.flush()


def say(text: str = "", *, style: str | None = None) -> None:
    """Print one line for the person who runs the job, and keep it in the log."""
    if not _json:
        _console.print(text, style=style)
    elif text:
        _emit("message", text=text)
    logging.getLogger("leafnet").info(text)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; every column but the first is right-aligned."""
    if _json:
        _emit("table", title=title, columns=list(columns), rows=[list(row) for row in rows])
        return
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        drawn.add_row(*row)
    _console.print(drawn)


def records(columns: Sequence[tuple[str, str]], rows: Iterable[Mapping[str, Any]]) -> None:
    """Print an empty line and a table of `rows`.

    Args:
        columns: heading, and the format of a cell from the row's values, as for `str.format_map`.
        rows: values by name.
    """
    say()
    cells = [[cell.format_map(row) for _, cell in columns] for row in rows]
    table("", [heading for heading, _ in columns], cells)


def checklist(rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Print the results of checks: (status, name, what was found, remedy) of each.

    A table on a terminal, lines elsewhere, and neither wider than 100 columns. The status is a
    word; its colour only emphasises it.
    """
    if _json:
        for status, name, found, remedy in rows:
            _emit("check", name=name, status=status, found=found, remedy=remedy)
        return
    for row in rows:
        logging.getLogger("leafnet").info("   ".join(row))
    if not _console.is_terminal:
        for status, name, found, remedy in rows:
            for text in (found, *([f"remedy: {remedy}"] if remedy else [])):
                head = f"{status:<9}{name:<15}" if text == found else _CHECKLIST_INDENT
                _console.print(textwrap.fill(text, 100, initial_indent=head, **_CHECKLIST_WRAP))
        return
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), width=min(100, _console.width))
    for column in ("status", "check", "found, and the remedy"):
        drawn.add_column(column, overflow="fold")
    for status, name, found, remedy in rows:
        last = Text(found)
        if remedy:
            last.append(f"\n{remedy}", style="italic")
        drawn.add_row(Text(status, style=_STATUS_STYLES[status]), Text(name), last)
    _console.print(drawn)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.completed, task.elapsed or 0.0, task.fields["unit"]))


def _rate(done: float, seconds: float, unit: str) -> str:
    return f"{done / seconds:,.1f} {unit}/s" if seconds > 0 and done else ""


class _Progress:
    """How far a stage is, in lines of text or JSON."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.began = self._last = time.monotonic()

    def advance(self, count: int) -> None:
        """Count what was finished; prints a line now and then."""
        self.done += count
        interval = _JSON_INTERVAL_S if _json else _PLAIN_INTERVAL_S
        if self.done < self.total and time.monotonic() - self._last >= interval:
            self._last = time.monotonic()
            self.show()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.began

    def line(self) -> str:
        """How far it is, in words."""
        rate = _rate(self.done, self.seconds, self.unit)
        return f"{self.title:<12} {self.done:,} of {self.total:,} {self.unit}   {rate}"

    def show(self) -> None:
        """Print how far it is."""
        if not _json:
            say(self.line())
            return
        seconds = self.seconds
        _emit(
            "progress",
            stage=self.title,
            done=self.done,
            total=self.total,
            unit=self.unit,
            rate=round(self.done / seconds, 2) if seconds > 0 else None,
            seconds=round(seconds, 2),
        )

    @contextmanager
    def bar(self) -> Iterator[Callable[[int], None]]:
        """Draw a bar with rate and time left."""
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} {task.fields[unit]}"),
            _Rate(),
            TimeRemainingColumn(compact=True),
        )
        # By default rich takes over sys.stdout and sys.stderr, and so what Ray prints for workers.
        with Progress(
            *columns,
            console=_console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as bar:
            task = bar.add_task(self.title, total=self.total, unit=self.unit)

            def advance(count: int) -> None:
                self.done += count
                bar.update(task, completed=self.done)

            yield advance


@contextmanager
def progress(title: str, total: int, *, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Show the progress of a stage. Yields a function that takes the count just finished.

    On a terminal a bar; elsewhere a line now and then and one at the end.
    """
    stage = _Progress(title, total, unit)
    if _console.is_terminal and not _verbose and not _json:
        with stage.bar() as advance:
            yield advance
    else:
        yield stage.advance
    if _json:
        stage.show()
        logging.getLogger("leafnet").info(stage.line())
    else:
        say(f"{stage.line()}   {duration(stage.seconds)}")


def duration(seconds: float) -> str:
    """Write a duration for people.

    >>> duration(3.21), duration(75), duration(7384)
    ('3.2 s', '1 min 15 s', '2 h 03 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def chatter_to(path: Path) -> Iterator[None]:
    """Send everything that libraries print here and in Ray's processes to the file `path`.

    `say`, `table` and `progress` still reach the terminal; with `--verbose` everything does.
    """
    global _console, _log_path
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(1), "w", buffering=1)
    stderr = os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    start = os.fstat(log).st_size
    ours = logging.getLogger("leafnet")
    over = threading.Event()
    tail = threading.Thread(target=_tail, args=(path, start, stderr, over), daemon=True)
    before = _console
    # From here on an interruption must restore the terminal.
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        _console = _console_on(terminal)
        _log_path = path
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False
        if _verbose:
            tail.start()
        yield
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc(file=handler.stream)
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        ours.removeHandler(handler)
        handler.close()
        if tail.is_alive():
            over.set()
            tail.join()
        os.dup2(terminal.fileno(), 1)
        os.dup2(stderr, 2)
        os.close(stderr)
        _console = before
        terminal.close()


def _tail(path: Path, start: int, stderr: int, over: threading.Event) -> None:
    """Copy the file `path` from its byte `start` to `stderr`, without what was printed already.

    It reads the file because a pipe would lose the last words of a process that is killed.
    """
    with open(path, "rb") as log:
        log.seek(start)
        rest = b""
        while True:
            last = over.is_set()
            *lines, rest = (rest + log.read()).split(b"\n")
            shown = [line for line in lines if _SAID not in line]
            if shown:
                os.write(stderr, b"\n".join(shown) + b"\n")
            if last:
                break
            over.wait(_TAIL_S)
        if rest:
            os.write(stderr, rest + b"\n")


@contextmanager
def log_to(folder: str, name: str) -> Iterator[Path]:
    """Send output to the file `name` in `folder`, see `chatter_to`.

    A file for a URL is uploaded when the block ends. Yields the path of the local file.
    """
    if storage.is_local(folder):
        path = Path(storage.absolute(folder)) / name
        with chatter_to(path):
            yield path
        return
    url, local = storage.join(folder, name), Path(tempfile.mkdtemp(prefix="leafnet-")) / name
    try:
        with chatter_to(local):
            yield local
    except BaseException as error:
        # Report the error itself and not that its log cannot be stored either.
        if not (isinstance(error, UserError) and error.reason in storage.UNREACHABLE):
            with suppress(UserError):
                storage.write_bytes(url, local.read_bytes())
        raise
    storage.write_bytes(url, local.read_bytes())
    shutil.rmtree(local.parent)


def run_job(job: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run `job` with the command line without `--verbose` and `--json`; return the exit code.

    0: done. 2: a mistake of the user, printed as `error[reason]: …`; the error may have an exit
    code of its own. 130: interrupted. 143: ended by SIGTERM. 1: anything else; the last line names
    the log file with the stack trace.
    """
    global _verbose, _json, _kept
    words = sys.argv[1:] if argv is None else argv
    before = _verbose, _json, _kept
    _verbose, _json = "--verbose" in words, "--json" in words
    _result.clear()
    try:
        with remembered_interrupts(), sigterm_interrupts():
            code, error = _run(job, [word for word in words if word not in FLAGS])
        if _json:
            _emit("result", exit_code=code, **error, **_result)
    finally:
        _verbose, _json, _kept = before
    return code


def leave(code: int) -> NoReturn:
    """End the process with the exit code of `run_job`.

    After an interruption it skips Python's finalisation, in which threads of Ray Data that nobody
    can stop crashed the process after 3 of 30 interruptions just after Ray's start.
    """
    if code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # nobody reads it any more
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _run(job: Callable[[Sequence[str]], None], argv: Sequence[str]) -> tuple[int, dict[str, str]]:
    """Return the exit code and what went wrong."""
    try:
        job(argv)
    except UserError as error:
        print(f"error[{error.reason}]: {error}", file=sys.stderr)
        return error.exit_code, {"error": error.reason, "message": str(error)}
    except KeyboardInterrupt as error:
        kept = f": {_kept}" if _kept else ""
        ended, code = "interrupted", EXIT_INTERRUPTED
        if was_terminated(error):
            ended, code = "ended by SIGTERM", EXIT_TERMINATED
        message = f"{ended}{kept}; run the same command again to continue"
        print(message, file=sys.stderr)
        return code, {"error": "interrupted", "message": message}
    except Exception as error:
        if _log_path is None:
            traceback.print_exc()
        last = str(error).strip().splitlines() or [""]
        message = f"{type(error).__name__}: {last[0]}"
        print(f"error[internal]: {message}", file=sys.stderr)
        if _log_path is not None:
            print(f"the details are in {_log_path}", file=sys.stderr)
        return EXIT_FAILED, {"error": "internal", "message": message}
    return EXIT_DONE, {}
