"""Decoding in a process of its own, for photographs of which one has killed the decoder's.

A damaged file can crash a C library, and with it the process that decodes a stack of photographs.
Ray then runs the task again, for ever. A mark on the node's disk tells the next try that the one
before died; that one decodes here, one photograph at a time, and learns which one it was.
"""

import contextlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from leafnet.core.errors import UserError
from leafnet.data.images import MAX_PIXELS, Fingerprint, ImageError, Photo, decode, fingerprint

_LIMIT_S = 120.0  # for one photograph
_DEATHS = 10  # of tries on one node
# Address space of the process: itself, and what the hungriest format takes for each pixel.
_BASE_BYTES, _BYTES_PER_PIXEL = 2_000_000_000, 24

# Bytes of the photograph, size, max_pixels; then the photograph. Size 0 asks for its fingerprint.
_ASK = struct.Struct("<QIQ")
_ANSWER = struct.Struct("<I")  # bytes of JSON; then JSON, and the pixels if there are some


class Decoder(NamedTuple):
    """`images.decode` and `images.fingerprint`, here or in another process."""

    decode: Callable[..., Photo]
    fingerprint: Callable[..., Fingerprint]


@contextmanager
def decoder(job: str, number: int, *, of: str) -> Iterator[Decoder]:
    """What decodes for task `number` of `job`: another process where an earlier try of it died.

    Args:
        job: unlike any other, also of the same command started again.
        number: of the task.
        of: what the task reads, for people.

    Raises:
        UserError: as `tried`.
    """
    with tried(job, number, of=of) as died:
        if not died:
            yield Decoder(decode, fingerprint)
            return
        with Apart() as other:
            yield Decoder(other.decode, other.fingerprint)


@contextmanager
def tried(job: str, number: int, *, of: str = "photographs") -> Iterator[bool]:
    """Mark on this node's disk that task `number` of `job` is at work, until the block ends.

    Yields whether an earlier try of it on this node died in the block. It takes 0.2 ms of a CPU.

    Raises:
        UserError: so many have died that the next will as well; it tells that they were `of`.
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


class Apart:
    """A process that decodes, and is started again when a photograph kills it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._decoded = 0  # by this process

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def decode(self, data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> Photo:
        """`images.decode`.

        Raises:
            ImageError: as there; `crashed` where it killed the process, or took too long.
        """
        answer, pixels = self._ask_twice(data, size, max_pixels)
        taken = answer.pop("captured_at")
        return Photo(
            pixels=np.frombuffer(pixels, np.uint8).reshape(size, size, 3),
            captured_at=datetime.fromisoformat(taken) if taken else None,
            **answer,
        )

    def fingerprint(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> Fingerprint:
        """`images.fingerprint`.

        Raises:
            ImageError: as `decode`.
        """
        answer, _ = self._ask_twice(data, 0, max_pixels)
        return Fingerprint(**answer)

    def _ask_twice(self, data: bytes, size: int, max_pixels: int) -> tuple[dict[str, Any], bytes]:
        try:
            return self._ask(data, size, max_pixels)
        except _Died as error:
            if not self._decoded:
                raise ImageError("crashed", str(error)) from None
        # What an earlier photograph left in the memory may have been what killed it.
        self._end()
        try:
            return self._ask(data, size, max_pixels)
        except _Died as error:
            raise ImageError("crashed", str(error)) from None

    def _ask(self, data: bytes, size: int, max_pixels: int) -> tuple[dict[str, Any], bytes]:
        if self._process is None:
            self._process = _start(max_pixels)
            self._decoded = 0
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(_LIMIT_S, end)
        timer.start()
        try:
            process.stdin.write(_ASK.pack(len(data), size, max_pixels))
            process.stdin.write(data)
            process.stdin.flush()
            (length,) = _ANSWER.unpack(_read(process.stdout, _ANSWER.size))
            answer: dict[str, Any] = json.loads(_read(process.stdout, length))
            if "reason" in answer:
                self._decoded += 1
                raise ImageError(answer["reason"], answer["message"])
            pixels = _read(process.stdout, size * size * 3)
        except (EOFError, OSError):
            decoded = self._decoded
            code = self._end()
            self._decoded = decoded
            if late.is_set():
                raise _Died(f"the decoder was not done with it after {_LIMIT_S:.0f} s") from None
            raise _Died(f"the decoder's process died on it ({_ended(code)})") from None
        finally:
            timer.cancel()
        self._decoded += 1
        return answer, pixels

    def _end(self) -> int:
        """End the process, if there is one; its exit code."""
        process, self._process, self._decoded = self._process, None, 0
        if process is None:
            return 0
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            process.communicate(timeout=5)
        process.kill()
        return process.wait()


class _Died(Exception):
    pass


def _start(max_pixels: int) -> subprocess.Popen[bytes]:
    # Where this process finds its modules: Ray puts a job's folder there.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        # Each of its threads takes address space.
        "OPENBLAS_NUM_THREADS": "1",
    }
    limit = _BASE_BYTES + _BYTES_PER_PIXEL * max_pixels
    code = f"from leafnet.data import isolated; isolated.serve({limit})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def serve(limit: int) -> None:
    """Decode what comes on stdin until it ends, in at most `limit` bytes of address space."""
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    while header := sys.stdin.buffer.read(_ASK.size):
        length, size, max_pixels = _ASK.unpack(header)
        data = _read(sys.stdin.buffer, length)
        answer: dict[str, Any]
        pixels = b""
        try:
            if size:
                photo = decode(data, size, max_pixels=max_pixels)
                pixels = photo.pixels.tobytes()
                answer = {
                    "width": photo.width,
                    "height": photo.height,
                    "format": photo.format,
                    "captured_at": photo.captured_at and photo.captured_at.isoformat(),
                    "latitude": photo.latitude,
                    "longitude": photo.longitude,
                }
            else:
                answer = asdict(fingerprint(data, max_pixels=max_pixels))
        except ImageError as error:
            answer = {"reason": error.reason, "message": str(error)}
        text = json.dumps(answer).encode()
        answers.write(_ANSWER.pack(len(text)) + text + pixels)
        answers.flush()


def _read(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _ended(code: int) -> str:
    """How a process ended, for people.

    >>> _ended(-11), _ended(3)
    ('SIGSEGV', 'exit code 3')
    """
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
