"""A cache of shards on a machine's own disk, for what reads them more than once from afar.

    FOLDER/SHA256          a shard, named by what is in it
    FOLDER/SHA256.tmp      one that is being written, as long as it will be
    FOLDER/lock-ab         held by the one process that fetches a shard whose name begins with ab
    FOLDER/lock            held while room is made

All processes of a machine share it, and a network disk may be shared by machines. A copy counts
only if its sha256 is right, so that whatever happens to the disk costs a read of the store. Those
that were read least recently make room for others, and `max_gb` is never exceeded.
"""

import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from leafnet.core import storage

_STALE_S = 3600.0  # a copy that has been written for so long is a dead process's


class LocalCache(NamedTuple):
    """Where copies are kept, and how much of them [GB]."""

    folder: str
    max_gb: float


def read(cache: LocalCache | None, *, sha256: str, fetch: Callable[[], bytes]) -> bytes | None:
    """The bytes with the digest `sha256`, from the cache, else from `fetch`, whose answer is kept.

    Processes that want the same at once fetch it once. A disk that is full or broken makes reading
    slower, and nothing worse.

    Args:
        cache: None: there is none, and each read fetches.
        sha256: in hexadecimal.
        fetch: reads them from the store.

    Returns:
        None when what `fetch` gave is something else; it is not kept.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"{sha256!r} is no sha256, and would be the name of a file")
    if cache is None:
        return _right(fetch(), sha256)
    path = Path(cache.folder) / sha256
    with ExitStack() as held:
        try:
            data = _kept(path, sha256)
            if data is not None:
                return data
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(path.with_name(f"lock-{sha256[:2]}")))
            data = _kept(path, sha256)  # another process has fetched it meanwhile
        except OSError as error:
            _warn(cache, error)
            return _right(fetch(), sha256)
        if data is None:
            data = _right(fetch(), sha256)
            try:
                if data is not None:
                    _keep(cache, sha256, data)
            except OSError as error:
                _warn(cache, error)
    return data


def _warn(cache: LocalCache, error: OSError) -> None:
    logging.getLogger("leafnet").warning("no copy is kept in %s: %s", cache.folder, error)


def _right(data: bytes, sha256: str) -> bytes | None:
    return data if storage.sha256(data) == sha256 else None


def _kept(path: Path, sha256: str) -> bytes | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if storage.sha256(data) != sha256:
        path.unlink(missing_ok=True)
        return None
    with suppress(FileNotFoundError):  # another's, who made room
        os.utime(path)
    return data


def _keep(cache: LocalCache, sha256: str, data: bytes) -> None:
    """Keep `data`, if the cache can hold it at all."""
    folder = Path(cache.folder)
    aside = folder / f"{sha256}.tmp"
    with _locked(folder / "lock"):
        if not _make_room(folder, len(data), cache.max_gb * 1e9):
            return
        # As long as it will be from the start: it counts when another makes room meanwhile.
        # A new file, whatever link of that name somebody has put there.
        aside.unlink(missing_ok=True)
        with open(aside, "xb") as file:
            file.truncate(len(data))
    try:
        with open(aside, "r+b") as file:
            file.write(data)
        os.replace(aside, folder / sha256)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _make_room(folder: Path, size: int, limit: float) -> bool:
    """Delete what was read least recently until `size` more bytes fit."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("lock"):
                continue
            status = entry.stat()
            found.append((status.st_mtime, status.st_size, entry.path))
    total = sum(of_one for _, of_one, _ in found)
    for used, of_one, path in sorted(found):
        if total + size <= limit:
            break
        if path.endswith(".tmp") and time.time() - used < _STALE_S:
            continue
        Path(path).unlink(missing_ok=True)
        total -= of_one
    return total + size <= limit


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(opened, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
