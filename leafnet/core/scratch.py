"""Folders on a machine's own disk that the processes of one user fill once and share.

    TMPDIR/leafnet-UID/NAME/          whole: files, and `whole.json` with the sha256 of each
    TMPDIR/leafnet-UID/NAME.lock      held by all who use it, and alone by who fills or deletes it
    TMPDIR/leafnet-UID/NAME.*.tmp/    one that is being filled; renamed when it is whole

The last one who uses a folder deletes it. A folder that a killed process left behind is used again
if every file still has its sha256, and filled again if not.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike

from leafnet.core.errors import UserError

_WHOLE = "whole.json"


class Shared:
    """A whole folder, which stays until everybody has released it."""

    def __init__(self, path: Path, lock: IO[bytes]) -> None:
        self.path, self._lock = path, lock

    def release(self) -> None:
        """Let go of the folder, and delete it if nobody else uses it.

        What is mapped of it stays readable.
        """
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.path, ignore_errors=True)
            Path(f"{self.path}.lock").unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            self._lock.close()


def share(name: str, fill: Callable[[Path], None]) -> Shared:
    """The folder `name` of this user and machine, filled by `fill` unless it is there and whole.

    Args:
        name: says all that is in it, such as a digest.
        fill: writes files into the empty folder that it is given. Of several processes that want
            the same folder, one calls it, and the others wait.

    Raises:
        UserError: the disk is full; the folder of all of them is somebody else's.
    """
    path = _root() / name
    while True:
        opened = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        lock = os.fdopen(opened, "rb")
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass  # who has it has seen that the folder is whole, or fills it now
            else:
                if not _is_whole(path):
                    _fill(path, fill)
            fcntl.flock(lock, fcntl.LOCK_SH)
            # Between the two locks, the last one of others may have deleted both.
            if path.is_dir() and _is_at(f"{path}.lock", opened):
                return Shared(path, lock)
        except BaseException:
            lock.close()
            raise
        lock.close()


def mapped(path: Path, *, dtype: DTypeLike, shape: tuple[int, ...]) -> Any:
    """A new .npy file mapped into memory for writing, with its room on the disk set aside.

    Writing to a mapped file on a disk that is full would kill the process.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, os.fstat(file.fileno()).st_size))
    return array


def _root() -> Path:
    root = Path(tempfile.gettempdir()) / f"leafnet-{os.getuid()}"
    with suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = os.lstat(root)
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not mine or found.st_mode & 0o022:
        raise UserError(
            "not-ours",
            f"{root} is not a folder that this user alone can write to; delete it, or set TMPDIR "
            "to another folder",
        )
    return root


def _is_at(path: str, opened: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(opened))
    except FileNotFoundError:
        return False


def _is_whole(path: Path) -> bool:
    try:
        described = json.loads((path / _WHOLE).read_bytes())
        return bool(described == _described(path))
    except (OSError, ValueError):
        return False


def _described(path: Path) -> dict[str, str]:
    """The sha256 of each file of the folder."""
    found = {}
    for file in sorted(path.iterdir()):
        if file.name != _WHOLE:
            with open(file, "rb") as opened:
                found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
                os.fsync(opened.fileno())
    return found


def _fill(path: Path, fill: Callable[[Path], None]) -> None:
    for left in [path, *path.parent.glob(f"{path.name}.*.tmp")]:  # of processes that were killed
        shutil.rmtree(left, ignore_errors=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    aside.mkdir(mode=0o700)
    try:
        fill(aside)
        (aside / _WHOLE).write_text(json.dumps(_described(aside)))
        os.rename(aside, path)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                "disk-full",
                f"{path.parent}: {os.strerror(error.errno)}; make room there, or set TMPDIR to a "
                "folder on another disk",
            ) from None
        raise
