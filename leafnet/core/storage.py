"""URLs and files: local paths and every protocol that fsspec knows (`s3://`, `https://`, …).

Nothing is ever seen half written: a local file is written aside and renamed, an object store
makes an object visible when its upload is complete.

Keys and endpoints come from the environment of each process and never from a setting; `s3` has the
list. What is wrong with a store, and not with one file, is a `UserError` in one line with the URL.
"""

import errno
import functools
import hashlib
import json
import os
import posixpath
import shutil
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from leafnet.core import local
from leafnet.core.errors import UserError
from leafnet.core.urls import absolute as absolute
from leafnet.core.urls import is_local as is_local
from leafnet.core.urls import join as join
from leafnet.core.urls import without_secret

if TYPE_CHECKING:
    import pyarrow.fs


# Reasons of errors after which the next request would wait as long for nothing.
UNREACHABLE = frozenset({"no-answer", "no-network", "store-failed"})
# Reasons of errors that one worker may meet and the others not, also in the middle of a job: a
# network that is away, keys that expire.
OF_STORES = UNREACHABLE | {"wrong-keys", "no-keys", "no-access", "disk-full", "no-such-bucket"}

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_AHEAD = 8_000_000  # bytes of one request of a stream
# Object stores answer after tens of milliseconds; so much is asked for at once.
AT_ONCE = 16
_CLIENTS = ("aiohttp", "google", "gcsfs", "azure", "adlfs", "paramiko")

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class File(NamedTuple):
    """A listed file: its URL and its size in bytes."""

    url: str
    size: int


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of `url` and the path in it.

    Raises:
        UserError: an unknown protocol, or one whose package is not installed.
    """
    if is_local(url):
        return _filesystem("file", "{}", os.getpid()), absolute(url)
    without_secret(url)
    protocol = url.split("://", 1)[0]
    try:
        fs = _filesystem(protocol, json.dumps(_options(protocol, url)), os.getpid())
        return fs, str(fs._strip_protocol(url))
    except (ValueError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("unknown-protocol", f"cannot open {url}: {error}") from None


def _options(protocol: str, url: str) -> dict[str, Any]:
    if protocol in ("s3", "s3a"):
        from leafnet.core import s3

        return s3.options()
    # Such as the host of an sftp:// URL.
    found: dict[str, Any] = fsspec.get_filesystem_class(protocol)._get_kwargs_from_urls(url)
    return found


@functools.lru_cache(maxsize=16)
def _filesystem(protocol: str, options: str, pid: int) -> AbstractFileSystem:
    # One a process: an asynchronous filesystem does not survive a fork. Listings are never
    # cached, because other processes write what this one waits for.
    kwargs = {**json.loads(options), "use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("s3", "s3a"):
        # Not at the top: botocore takes a second to import.
        from leafnet.core import s3

        return s3.Filesystem(**kwargs)
    return fsspec.filesystem(protocol, **kwargs)


def arrow_filesystem(url: str) -> tuple["pyarrow.fs.FileSystem", str]:
    """The filesystem of `url` for Ray Train and pyarrow, and the path in it.

    It is the one of `filesystem` behind pyarrow's interface, with the same settings, retries and
    errors. pyarrow's own S3 reads other variables than botocore, and takes others of the same
    name differently (apache/arrow#49643).
    """
    import pyarrow.fs

    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path


@contextmanager
def told(url: str) -> Iterator[None]:
    """Turn what is wrong with the store of `url`, and not with one file, into a UserError.

    FileNotFoundError and its kind pass.
    """
    try:
        yield
    except Exception as error:
        user_error = _explain(error, url)
        if user_error is None:
            raise
        raise user_error from None


def _explain(error: Exception, url: str) -> UserError | None:
    if isinstance(error, UserError):
        return None
    protocol = url.split("://", 1)[0]
    if is_local(url):
        found = error.errno if isinstance(error, OSError) else None
        if found in _DISK_FULL:
            return UserError("disk-full", f"cannot write {url}: {os.strerror(found)}; make room")
        if found in _NO_ACCESS:
            return UserError("no-access", f"{url}: {os.strerror(found)}; give another place")
        return None
    if protocol in ("s3", "s3a"):
        from leafnet.core import s3

        return s3.explain(error, url, filesystem(url)[0].endpoint)
    about_the_file = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
    # Every filesystem has errors of its own; what only reads a file has OSErrors without a number.
    network = isinstance(error, ConnectionError | TimeoutError) or (
        isinstance(error, OSError) and error.errno is not None
    )
    network = network or type(error).__module__.split(".")[0] in _CLIENTS
    if not network or isinstance(error, about_the_file):
        return None
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError("no-network", f"cannot reach {url}: {reason}")


def exists(url: str) -> bool:
    """True when a file or folder is at `url`."""
    fs, path = filesystem(url)
    with told(url):
        return bool(fs.exists(path))


def is_folder(url: str) -> bool:
    """True when `url` is a folder, or a prefix with something below it."""
    fs, path = filesystem(url)
    with told(url):
        return bool(fs.isdir(path))


def is_file(url: str) -> bool:
    """True when a file is at `url`."""
    fs, path = filesystem(url)
    try:
        # Not `isfile`, to which every error is a no: the next question would wait as long again.
        with told(url):
            return bool(fs.info(path)["type"] == "file")
    except (FileNotFoundError, NotADirectoryError):
        return False


def read_bytes(url: str, *, start: int | None = None, stop: int | None = None) -> bytes:
    """The content of `url`, or of it the bytes from `start` until before `stop`.

    Raises:
        FileNotFoundError: nothing is there.
        UserError: the store cannot be reached, or refuses.
    """
    fs, path = filesystem(url)
    with told(url):
        return bytes(fs.cat_file(path, start=start, end=stop))


@contextmanager
def open_file(url: str, *, stream: bool = False) -> Iterator[IO[bytes]]:
    """The file at `url`, open for reading in pieces.

    Of a remote file only what is asked for is fetched, as suits columns of Parquet; `stream`
    fetches ahead in large pieces, for who reads from front to back.

    Raises:
        FileNotFoundError: nothing is there.
        UserError: the store cannot be reached, or refuses.
    """
    fs, path = filesystem(url)
    cache = "readahead" if stream else "none"
    with told(url), fs.open(path, "rb", block_size=_AHEAD, cache_type=cache) as file:
        yield file


def read_json(url: str) -> Any:
    """The JSON document at `url`.

    Raises:
        FileNotFoundError: nothing is there.
        UserError: it is not JSON.
    """
    data = read_bytes(url)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # RecursionError: a thousand brackets
        raise UserError("not-json", f"{url} is not valid JSON: {error}") from None


def write_bytes(url: str, data: bytes) -> None:
    """Write `data` to `url`, replacing what is there, in one step as readers see it."""
    fs, path = filesystem(url)
    with told(url):
        if isinstance(fs, LocalFileSystem):
            local.write(path, data)
        else:
            fs.pipe_file(path, data)


def create_bytes(url: str, data: bytes) -> bool:
    """Write `data` to `url` if nothing is there, in one step; False when something is.

    Of several processes that do so at once, one gets True, if each has other `data`. Object stores
    have to know `If-None-Match: *` for that, as S3 does; `try_rights` finds out.
    """
    fs, path = filesystem(url)
    with told(url):
        if isinstance(fs, LocalFileSystem):
            return local.create(path, data)
        if _created(lambda: fs.pipe_file(path, data, mode="create")):
            return True
        try:
            # A try whose answer was lost may have written it, and the next one was refused.
            return bytes(fs.cat_file(path)) == data
        except FileNotFoundError:
            return False


def _created(write: Callable[[], None]) -> bool:
    """Whether `write` was not refused because something is there."""
    try:
        write()
    # What s3fs makes of a refused `If-None-Match` differs with the server.
    except OSError as error:
        if not isinstance(error, FileExistsError) and error.errno != errno.EINVAL:
            raise
        return False
    return True


def move_in(source: str | Path, url: str) -> bool:
    """Make the complete local file `source` appear at `url` in one step; False: one is there.

    A local `url` has to be on the disk of `source`, which is gone afterwards.
    """
    fs, path = filesystem(url)
    with told(url):
        if isinstance(fs, LocalFileSystem):
            return local.move_in(str(source), path)
        if not _created(lambda: fs.put_file(str(source), path, mode="create")):
            with open(source, "rb") as ours, fs.open(path, "rb") as theirs:
                digests = [hashlib.file_digest(file, "sha256").digest() for file in (ours, theirs)]
            if digests[0] != digests[1]:
                return False
        Path(source).unlink()
        return True


def write_json(url: str, document: Any) -> None:
    """Write `document` as indented JSON. NaN is refused: other readers do not know it."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(url, (text + "\n").encode())


def list_files(url: str) -> list[File]:
    """Every file below the folder or prefix `url`, sorted by URL; empty when there is none.

    Hidden files and folders (`.name`) and what is being written (`*.tmp`) are left out.
    """
    fs, path = filesystem(url)
    with told(url):
        url, found = absolute(url), fs.find(path, detail=True)
    below = len(path.rstrip("/")) + 1
    # URLs keep the spelling that was asked for; `unstrip_protocol` of some filesystems changes it.
    return [
        File(join(url, name[below:]) if name[below:] else url, int(info.get("size") or 0))
        for name, info in sorted(found.items())
        if info.get("type", "file") == "file"
        # Consoles make an object `name/` to show a folder.
        and not name.endswith((".tmp", "/"))
        and not any(part.startswith(".") for part in name[below:].split("/"))
    ]


def objects(folder: str, start: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object below the remote `folder` whose name below it begins with `start`.

    Its name, and what fsspec's `info` tells of it. Hidden ones and those with `//` in the name are
    among them. S3 is asked a page at a time, so that memory holds one.
    """
    fs, path = filesystem(folder)
    with told(folder):
        if hasattr(fs, "pages"):
            bucket, _, key = path.partition("/")
            prefix = f"{key.rstrip('/')}/" if key else ""
            for info in fs.pages(bucket, prefix + start):
                yield info["Key"][len(prefix) :], info
            return
        below = len(path.rstrip("/")) + 1
        for name, info in sorted(fs.find(path, detail=True).items()):
            if info.get("type", "file") == "file" and name[below:].startswith(start):
                yield name[below:], info


def list_names(url: str) -> list[str]:
    """Names of the files and folders directly in `url`, sorted; empty when there is none."""
    fs, path = filesystem(url)
    try:
        with told(url):
            found = [entry.rstrip("/") for entry in fs.ls(path, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(posixpath.basename(entry) for entry in found if entry != path.rstrip("/"))


def delete(url: str) -> None:
    """Delete the file at `url`, if there is one; of a symbolic link the link."""
    fs, path = filesystem(url)
    with told(url), suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        if isinstance(fs, LocalFileSystem):
            os.unlink(path)
        else:
            fs.rm_file(path)


def delete_folder(url: str, *, mark: str) -> None:
    """Delete the folder at `url`, if there is one, and all that is in it.

    Args:
        url: never the root of a disk or a whole bucket.
        mark: URL of a file that only leafnet writes, and whose presence says that the folder is
            leafnet's; if it is in the folder, it is deleted last, so that an interrupted deletion
            can be finished.

    Raises:
        UserError: the file is not there, and so the folder may be somebody's.
    """
    fs, path = filesystem(url)
    depth = 1 if is_local(url) or fs.protocol == "memory" else 2
    if len([part for part in path.split("/") if part]) < depth:
        raise UserError("not-ours", f"{url} is a whole disk or bucket, which is never deleted")
    if is_local(url) and os.path.islink(path):
        raise UserError("not-ours", f"{url} is a symbolic link, which leafnet does not make")
    if not is_folder(url):
        return
    if not is_file(mark):
        raise UserError(
            "not-ours",
            f"{url} is not deleted: {mark} is not there, and so it may not be leafnet's; move it "
            "away, or delete it yourself",
        )
    below = filesystem(mark)[1]
    last = posixpath.basename(below) if posixpath.dirname(below) == path else None
    with told(url):
        if isinstance(fs, LocalFileSystem):
            local.delete_folder(path, last=last)
            return
        # Each by its name: `rm` of fsspec takes them for patterns, and a bucket along with them.
        found = fs.find(path)
        deque(each(fs.rm_file, [name for name in found if name != below]), maxlen=0)
        if below in found:
            fs.rm_file(below)


def try_rights(folder: str) -> None:
    """Write, read, list, create and delete a small file below `folder`; nothing stays there.

    Raises:
        UserError: one of them is not possible, and why; `no-exclusive-create`: the store overwrites
            a file that is to be created only where there is none, which locks rest on.
    """
    own = join(absolute(folder), f".leafnet-{uuid.uuid4().hex}")
    url, once = join(own, "try"), join(own, "try-once")
    made = []
    if is_local(folder):
        made = [path for path in (Path(own), *Path(own).parents) if not path.exists()]
    data = uuid.uuid4().bytes
    try:
        write_bytes(url, data)
        if read_bytes(url) != data or list_names(own) != ["try"]:
            raise UserError("store-failed", f"{folder} does not give back what was written to it")
        if not create_bytes(once, data) or create_bytes(once, data[::-1] + b"2"):
            raise UserError(
                "no-exclusive-create",
                f"{folder}: its store overwrites a file that was to be created only if there is "
                "none (If-None-Match on S3), so that two jobs could not be told apart; use another "
                "store",
            )
        delete_folder(own, mark=url)
    # Every filesystem has errors of its own.
    except Exception as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError("cannot-write", f"cannot write to {folder}: {reason}") from None
    finally:
        for path in made:
            with suppress(OSError):  # it was not made after all, or is somebody's by now
                path.rmdir()


def upload_folder(folder: str | Path, url: str) -> None:
    """Copy the files of the local `folder`, one level deep, to `url`."""
    for file in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        write_bytes(join(url, file.name), file.read_bytes())


@contextmanager
def local_copy(url: str) -> Iterator[str]:
    """A local path with the content of the file at `url`, for libraries that read only paths."""
    if is_local(url):
        yield absolute(url)
        return
    fs, path = filesystem(url)
    folder = Path(tempfile.mkdtemp(prefix="leafnet-"))
    try:
        copy = folder / posixpath.basename(path)
        with told(url):
            fs.get_file(path, str(copy))
        yield str(copy)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def each(
    ask: Callable[[Item], Answer], items: Iterable[Item], *, at_once: int = AT_ONCE
) -> Iterator[Answer]:
    """`ask` of each item, in their order, `at_once` of them at a time, in threads.

    For what waits for a store. No more than `at_once` answers are held, however slowly they are
    taken.

    >>> list(each(str.upper, ["a", "b"]))
    ['A', 'B']
    """
    with ThreadPoolExecutor(at_once) as pool:
        waiting: deque[Future[Answer]] = deque()
        try:
            for item in items:
                if len(waiting) == at_once:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(ask, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            # After an error nobody wants the others.
            for future in waiting:
                future.cancel()


def sha256(data: bytes) -> str:
    """The sha256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
