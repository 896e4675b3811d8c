"""Ctrl-C and SIGTERM: both interrupt a job, and loops that wait learn of it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

_interrupt: KeyboardInterrupt | None = None  # that the job has received


class Terminated(KeyboardInterrupt):
    """SIGTERM has asked this process to end."""


def raise_if_asked() -> None:
    """Raise again what Ctrl-C or SIGTERM raised in this job.

    Loops that wait call it: Python prints and forgets what is raised in a hook or callback, of
    which Ray has many, and the job would continue.
    """
    if _interrupt is not None:
        raise _interrupt


def was_terminated(error: KeyboardInterrupt) -> bool:
    """True when SIGTERM led to `error`, of which Ray may have made a plain KeyboardInterrupt."""
    return isinstance(_interrupt or error, Terminated)


def _raise(interrupt: KeyboardInterrupt) -> NoReturn:
    global _interrupt
    _interrupt = interrupt
    raise interrupt


@contextmanager
def remembered_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, as always, and `raise_if_asked` know of it."""
    global _interrupt
    mine = threading.current_thread() is threading.main_thread()
    # A job in the background of a shell ignores SIGINT, and must continue to do so.
    taken = mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if taken:
        signal.signal(signal.SIGINT, lambda number, frame: _raise(KeyboardInterrupt()))
    try:
        yield
    finally:
        _interrupt = None
        if taken:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM interrupt the block as Ctrl-C does; Ray's handler would exit without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: _raise(Terminated()))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
