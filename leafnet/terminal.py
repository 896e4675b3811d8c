"""What a person sees: a few lines and progress bars. Everything else goes to a log file.

Ray, TensorFlow and absl print from C++, from threads and on behalf of other machines. Redirecting
the process's own file descriptors is the only way to catch all of them; leafnet keeps a duplicate
of the real ones for what it wants to say.
"""

import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from leafnet import storage
from leafnet.errors import UserError

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

# A plain line at least this often, in seconds, where there is no terminal to draw a bar on.
_PLAIN_INTERVAL_S = 15.0


def _console_on(file: TextIO | None) -> Console:
    """A console that leaves texts alone: names of files and classes may have brackets in them."""
    return Console(file=file, highlight=False, soft_wrap=True, markup=False, emoji=False)


_console = _console_on(None)
_log_path: Path | None = None


def say(text: str = "", *, style: str | None = None) -> None:
    """Print one line for the person who runs the job, and keep it in the log."""
    _console.print(text, style=style)
    logging.getLogger("leafnet").info(text)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; every column but the first is right-aligned."""
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        drawn.add_row(*row)
    _console.print(drawn)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.completed, task.elapsed or 0.0, task.fields["unit"]))


def _rate(done: float, seconds: float, unit: str) -> str:
    return f"{done / seconds:,.1f} {unit}/s" if seconds > 0 and done else ""


@contextmanager
def progress(title: str, total: int, *, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Show how far a stage is. Yields a function to be called with the count just finished.

    On a terminal a bar with rate and time left; elsewhere a line now and then and one at the end.
    """
    started = time.monotonic()
    done = 0

    def line() -> str:
        rate = _rate(done, time.monotonic() - started, unit)
        return f"{title:<12} {done:,} of {total:,} {unit}   {rate}"

    if _console.is_terminal:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} {task.fields[unit]}"),
            _Rate(),
            TimeRemainingColumn(compact=True),
        )
        # rich would take over sys.stdout and sys.stderr, and with them what Ray prints for workers.
        with Progress(
            *columns,
            console=_console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as bar:
            task = bar.add_task(title, total=total, unit=unit)

            def advance(count: int) -> None:
                nonlocal done
                done += count
                bar.update(task, completed=done)

            yield advance
    else:
        last = started

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            if done < total and time.monotonic() - last >= _PLAIN_INTERVAL_S:
                last = time.monotonic()
                say(line())

        yield advance
    say(f"{line()}   {duration(time.monotonic() - started)}")


def duration(seconds: float) -> str:
    """Seconds for people.

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
    """Send everything that libraries print, in this process and from Ray's, to the file `path`.

    `say`, `table` and `progress` still reach the terminal.
    """
    global _console, _log_path
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(1), "w", buffering=1)
    stderr = os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    before, _console = _console, _console_on(terminal)
    _log_path = path
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours = logging.getLogger("leafnet")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    try:
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
        os.dup2(terminal.fileno(), 1)
        os.dup2(stderr, 2)
        os.close(stderr)
        _console = before
        terminal.close()


@contextmanager
def log_to(folder: str, name: str) -> Iterator[None]:
    """`chatter_to` the file `name` in `folder`; to a URL it is copied when the block ends."""
    if storage.is_local(folder):
        with chatter_to(Path(folder) / name):
            yield
        return
    url, local = storage.join(folder, name), Path(tempfile.mkdtemp(prefix="leafnet-")) / name
    try:
        with chatter_to(local):
            yield
    except BaseException as error:
        # It is the error that has to be told, and not that its log cannot be stored either.
        if not (isinstance(error, UserError) and error.reason in storage.UNREACHABLE):
            with suppress(UserError):
                storage.write_bytes(url, local.read_bytes())
        raise
    storage.write_bytes(url, local.read_bytes())
    shutil.rmtree(local.parent)


def run_job(job: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run `job` with the command line; returns the exit code.

    0 done, 2 something the user gave is wrong (one line `error[reason]: …`; the error may have a
    code of its own), 130 interrupted, 1 anything else, with the log file that holds the stack
    trace.
    """
    try:
        job(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error[{error.reason}]: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if _log_path is None:
            traceback.print_exc()
        last = str(error).strip().splitlines() or [""]
        print(f"error[internal]: {type(error).__name__}: {last[0]}", file=sys.stderr)
        if _log_path is not None:
            print(f"the details are in {_log_path}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE
