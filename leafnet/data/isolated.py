"""Decoding in a separate process, for tasks whose own process a photograph has killed.

A damaged file can crash a C library, and with it the process that decodes many photographs. Ray
would run the task again and again. A mark on the node's disk tells the next try that the previous
one died; it decodes the photographs in a separate process, one by one, and so finds the bad one.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from leafnet.core.errors import UserError
from leafnet.data.images import MAX_PIXELS, Fingerprint, ImageError, Photo, decode, fingerprint

_LIMIT_S = 120.0  # for one photograph
_DEATHS = 10  # of tries on one node
# Address space of the process: itself, and what the hungriest format takes for each pixel.
_BASE_BYTES, _BYTES_PER_PIXEL = 2_000_000_000, 24

_Result = TypeVar("_Result")


class Decoder(NamedTuple):
    """`images.decode` and `images.fingerprint`, in this process or in another one."""

    decode: Callable[..., Photo]
    fingerprint: Callable[..., Fingerprint]


@contextmanager
def decoder(job: str, number: int, *, of: str) -> Iterator[Decoder]:
    """Choose the decoder for task `number` of `job`: another process if an earlier try died.

    Args:
        job: a unique name of this start of the job.
        number: of the task.
        of: what the task reads, for people.

    Raises:
        UserError: as `tried`.
    """
    with tried(job, number, of=of) as died:
        if not died:
            yield Decoder(decode, fingerprint)
            return
        with DecoderProcess() as other:
            yield Decoder(other.decode, other.fingerprint)


@contextmanager
def tried(job: str, number: int, *, of: str = "photographs") -> Iterator[bool]:
    """Mark on this node's disk that task `number` of `job` is running, until the block ends.

    Yields whether an earlier try of it on this node died in the block. It takes 0.2 ms of a CPU.

    Raises:
        UserError: too many tries have died; the message names `of`, what they read.
    """
    folder = Path(tempfile.gettempdir()) / f"leafnet-{os.getuid()}" / f"tries-{job}"
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / str(number)
    with open(mark, "ab") as file:
        file.write(b"x")
    deaths = mark.stat().st_size - 1
    if deaths >= _DEATHS:
        mark.unlink()
        raise UserError(
            "worker-dies",
            f"the process that reads and decodes {of} died {deaths} times in the same place; see "
            "the log of the job and the memory of the machine",
        )
    try:
        yield deaths > 0
    finally:
        mark.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are at work
            folder.rmdir()


class DecoderProcess:
    """A process that decodes, and is replaced when a photograph kills it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection
        self._calls = 0  # that this process has answered

    def __enter__(self) -> "DecoderProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def decode(self, data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> Photo:
        """Decode as `images.decode` does.

        Raises:
            ImageError: as there; `crashed` if the photograph killed the process or took too long.
        """
        return self._call(max_pixels, decode, data, size)

    def fingerprint(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> Fingerprint:
        """Compute the fingerprint as `images.fingerprint` does.

        Raises:
            ImageError: as `decode`.
        """
        return self._call(max_pixels, fingerprint, data)

    def _call(self, max_pixels: int, function: Callable[..., _Result], *arguments: Any) -> _Result:
        is_new = not self._calls
        try:
            result: _Result | ImageError = self._ask(max_pixels, function, *arguments)
        except _Died as error:
            if is_new:
                raise ImageError("crashed", str(error)) from None
            # What an earlier photograph left in memory may have killed it.
            return self._call(max_pixels, function, *arguments)
        if isinstance(result, ImageError):
            raise result
        return result

    def _ask(self, max_pixels: int, *call: Any) -> Any:
        if self._process is None:
            self._start(_BASE_BYTES + _BYTES_PER_PIXEL * max_pixels)
        try:
            self._connection.send((max_pixels, *call))
            if not self._connection.poll(_LIMIT_S):
                self._end(kill=True)
                raise _Died(f"the decoder was not done with it after {_LIMIT_S:.0f} s")
            result = self._connection.recv()
        except (EOFError, OSError):
            raise _Died(f"the decoder's process died on it ({_ended(self._end())})") from None
        self._calls += 1
        return result

    def _start(self, limit: int) -> None:
        self._connection, other = multiprocessing.Pipe()
        # Not multiprocessing.Process: it would import the main module, which in a worker is Ray's.
        environment = {
            **os.environ,
            # Where this process finds its modules: Ray puts a job's folder there.
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            # Each of its threads takes address space.
            "OPENBLAS_NUM_THREADS": "1",
        }
        code = f"from leafnet.data import isolated; isolated.serve({other.fileno()}, {limit})"
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[other.fileno()], env=environment
            )

    def _end(self, *, kill: bool = False) -> int:
        """End the process, if there is one, and return its exit code."""
        process, self._process, self._calls = self._process, None, 0
        if process is None:
            return 0
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0 if kill else 5)
        process.kill()
        return process.wait()


class _Died(Exception):
    pass


def serve(descriptor: int, limit: int) -> None:
    """Answer the calls of a `DecoderProcess`, in at most `limit` bytes of address space."""
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError):
        while True:
            max_pixels, function, *arguments = connection.recv()
            try:
                connection.send(function(*arguments, max_pixels=max_pixels))
            except ImageError as error:
                connection.send(error)


def _ended(code: int) -> str:
    """Describe how a process ended.

    >>> _ended(-11), _ended(3)
    ('SIGSEGV', 'exit code 3')
    """
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
