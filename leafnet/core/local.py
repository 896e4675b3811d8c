"""Files on a disk, or mounted as one: written whole, created once, and there after a power cut.

A file is written under another name, brought to the disk, and renamed; then its folder is brought
to the disk as well, without which a power cut may undo the renaming. What stays after a kill is
called `*.tmp`, which no listing shows.
"""

import errno
import os
import shutil
import uuid
from pathlib import Path

# What filesystems answer that have no hard links: exFAT, SMB and some of FUSE.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


def write(path: str, data: bytes) -> None:
    """Write `data` to `path`, replacing what is there, in one step."""
    aside = _write_aside(path, data)
    try:
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
    _sync_folder(os.path.dirname(path))


def create(path: str, data: bytes) -> bool:
    """Write `data` to `path` if nothing is there; False when something is.

    In one step as readers see it, where the filesystem has hard links. Where it has none, the file
    is empty for a moment, and stays empty if the power fails in it.
    """
    aside = _write_aside(path, data)
    try:
        return _link(aside, path)
    finally:
        os.unlink(aside)


def move_in(source: str, path: str) -> bool:
    """Make the complete file `source`, on the same disk, appear at `path`; False: one is there.

    `source` is gone afterwards, unless the answer is False.
    """
    _make_folder(os.path.dirname(path))
    with open(source, "rb") as file:
        os.fsync(file.fileno())
    if not _link(source, path):
        return False
    os.unlink(source)
    return True


def delete_folder(path: str, *, last: str | None = None) -> None:
    """Delete the folder `path`, its file `last` after all the others; links are not followed."""
    if os.path.islink(path):
        raise NotADirectoryError(errno.ENOTDIR, "a symbolic link", path)
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name != last:
                os.unlink(entry.path)
    if last is not None:
        Path(path, last).unlink(missing_ok=True)
    os.rmdir(path)


def _write_aside(path: str, data: bytes) -> str:
    """A file beside `path` with `data`, on the disk."""
    _make_folder(os.path.dirname(path))
    aside = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(aside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return aside


def _link(source: str, path: str) -> bool:
    """Give the file `source` the name `path` as well; False when that is taken."""
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _copy_exclusively(source, path)
    _sync_folder(os.path.dirname(path))
    return True


def _copy_exclusively(source: str, path: str) -> bool:
    try:
        with open(source, "rb") as whole, open(path, "xb") as file:
            try:
                shutil.copyfileobj(whole, file)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                os.unlink(path)
                raise
    except FileExistsError:
        return False
    _sync_folder(os.path.dirname(path))
    return True


def _make_folder(path: str) -> None:
    """Make the folder `path` and those above it, where they are missing, on the disk."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        os.makedirs(folder, exist_ok=True)
        _sync_folder(os.path.dirname(folder))


def _sync_folder(path: str) -> None:
    """Bring the names in the folder `path` to the disk, where the filesystem can be asked to."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        # Some of FUSE and SMB have no such call; a disk that is full or broken has.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
            raise
    finally:
        os.close(folder)
