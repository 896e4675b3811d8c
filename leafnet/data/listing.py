"""Files of photographs: one walk over folders, globs and stores, with one rule.

The rule says what is hidden, what a system keeps for itself, what only lies beside photographs, and
that links are followed. What it passes over is counted by kind.
"""

import glob
import itertools
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from fsspec.utils import glob_translate

from leafnet.core import storage
from leafnet.core.errors import UserError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".heic", ".heif", ".avif", ".ppm", ".pgm"),
)

# What cameras, tools and people leave beside photographs. Any other file is taken for a photograph,
# so that a broken one is told and not passed over.
_SIDECARS = frozenset(
    (
        # Tables, documents, programs
        *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".rst", ".xml", ".yaml", ".yml"),
        *(".html", ".htm", ".ini", ".db", ".log", ".cls", ".pdf", ".doc", ".docx", ".odt", ".rtf"),
        *(".xls", ".xlsx", ".ods", ".py", ".ipynb", ".sh", ".bat", ".m", ".mat", ".npy", ".pkl"),
        *(".lnk", ".url", ".webloc", ".sha256", ".md5", ".crc", ".sqlite", ".arrow", ".cfg"),
        # Of photographs: edits and settings of raw converters
        *(".xmp", ".aae", ".pp3", ".dop", ".on1", ".cos", ".vrd", ".spd", ".arp", ".thm", ".ctg"),
        # Films and sounds: the other half of a live photograph, a spoken note
        *(".mov", ".mp4", ".m4v", ".avi", ".3gp", ".mts", ".m2ts", ".mpg", ".mpeg", ".mkv"),
        *(".wmv", ".webm", ".lrv", ".lrf", ".insv", ".wav", ".mp3", ".m4a", ".aac", ".amr"),
        # Places: of world files, drones and maps
        *(".jgw", ".jpgw", ".pgw", ".pngw", ".tfw", ".tifw", ".bpw", ".wld", ".prj", ".aux"),
        *(".ovr", ".mrk", ".nav", ".obs", ".rtk", ".ubx", ".imu", ".pos", ".bin", ".dat", ".srt"),
        *(".gpx", ".kml", ".kmz", ".geojson", ".shp", ".shx", ".dbf", ".cpg", ".qml"),
    )
)
_BESIDE = re.compile(
    r"_success|_committed_.*|_started_.*|_(common_)?metadata|readme|licen[cs]e|copying|notice"
)

# Camera raw files beside the photograph that was made of them.
_RAW = frozenset(
    (".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw")
)

# What storage systems, desktops and Spark keep for themselves.
_SYSTEM = frozenset(
    (
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "@sharebin"),
        *("@__thumb", "~snapshot", "lost+found", "$recycle.bin", "system volume information"),
        *("found.000", "lost.dir", "__macosx", "network trash folder", "temporary items", "icon\r"),
        *("__pycache__", "_temporary", "_delta_log", "_spark_metadata"),
    )
)
_SYSTEM_ENDS = ("@synoeastream", "@synoresource", "_$folder$")

_UNFINISHED = (".tmp", ".part", ".partial", ".filepart", ".crdownload", ".download", "~")


class Found(NamedTuple):
    """A file, by name alone: nothing of it has been read."""

    name: str  # below the folder that was walked
    url: str
    size: int | None  # bytes; None: not known
    version: str | None  # changes when the content does; None: no regular file can be reached


@dataclass
class PassedOver:
    """What a walk passed over."""

    counts: Counter[str] = field(default_factory=Counter)  # kind -> files, or whole folders
    unreadable: list[str] = field(default_factory=list)  # folders

    def notes(self) -> tuple[str, ...]:
        """What to tell of it, for people."""
        notes = []
        if self.counts:
            told = ", ".join(f"{n:,} {kind}" for kind, n in self.counts.most_common(5))
            rest = self.counts.total() - sum(n for _, n in self.counts.most_common(5))
            more = f" and {rest:,} more" if rest else ""
            notes.append(f"passed over {self.counts.total():,} other files ({told}{more})")
        if self.unreadable:
            notes.append(
                f"warning: {len(self.unreadable):,} folders cannot be read "
                f"({self.unreadable[0]}, …); what is in them is missing"
            )
        return tuple(notes)


def suffix(name: str) -> str:
    """The suffix of a file name in small letters, such as `.jpg`."""
    return posixpath.splitext(name)[1].lower()


def kind_passed(name: str) -> str | None:
    """The kind of a file or folder that is nobody's photograph or class; None: it may be one.

    >>> kind_passed(".DS_Store"), kind_passed("@eaDir"), kind_passed("leaf.jpg.tmp")
    ('hidden', '@eaDir', 'being written')
    >>> kind_passed("leaf.jpg")
    """
    if name.startswith("."):
        return "hidden"
    small = name.casefold()
    if small in _SYSTEM:
        return name.strip()
    if small.endswith(_SYSTEM_ENDS):
        return "of the storage system"
    if small.endswith(_UNFINISHED) or name.startswith("~$"):
        return "being written"
    return None


def kind_beside(name: str) -> str | None:
    """The kind of a file that lies beside photographs and is none; None: it may be one.

    >>> kind_beside("a/IMG_1.AAE"), kind_beside("_SUCCESS"), kind_beside("a/odd")
    ('.aae', '_SUCCESS', None)
    """
    if suffix(name) in _SIDECARS:
        return suffix(name)
    last = posixpath.basename(name)
    return last if _BESIDE.fullmatch(last.lower()) else None


def walk(url: str, passed: PassedOver) -> Iterator[Found]:
    """Every file below the folder or prefix `url` that the rule shows, in the order of folders.

    Links are followed, but not into a folder that they lie in. Files beside photographs are among
    them: `kind_beside` tells which.

    Raises:
        UserError: the store cannot be reached, or the folder itself not read.
    """
    return _walk(url, None, passed)


def matching(url: str, passed: PassedOver) -> Iterator[Found]:
    """The files that the pattern `url` names, and those below the folders that it names.

    Without `*`, `?` or `[`, it is the beginning of names. Hidden ones are among them only where
    the pattern has a dot in their place, as in a shell.
    """
    if not glob.has_magic(url):
        folder, _, start = url.rpartition("/")
        return _walk(folder or "/", _Pattern(f"{glob.escape(start)}*"), passed)
    fixed = _MAGIC.split(url, 1)[0].rpartition("/")[0]
    return _walk(fixed or "/", _Pattern(url[len(fixed) :].lstrip("/")), passed)


_MAGIC = re.compile(r"[*?[]")


class _Pattern:
    """A glob below a folder."""

    def __init__(self, text: str) -> None:
        self.parts = text.split("/")
        self.start = _MAGIC.split(text, 1)[0]  # all names begin with it
        self._whole = re.compile(glob_translate(text))
        fixed = list(itertools.takewhile(lambda part: "**" not in part, self.parts))
        self._folders = [re.compile(glob_translate(part)) for part in fixed]

    def names(self, name: str) -> bool:
        """Whether it names the file, or a folder that it is in."""
        parts = list(filter(None, name.split("/")))  # a key may have `//` in it
        return any(self._whole.match("/".join(parts[: i + 1])) for i in range(len(parts)))

    def may_hold(self, folder: str) -> bool:
        """Whether something below the folder can be named."""
        pairs = zip(self._folders, folder.split("/"), strict=False)
        return all(pattern.match(part) for pattern, part in pairs)

    def shows(self, depth: int) -> bool:
        """Whether it asks for hidden names there."""
        return depth < len(self.parts) and self.parts[depth].startswith(".")


def _walk(url: str, pattern: _Pattern | None, passed: PassedOver) -> Iterator[Found]:
    found = (_local if storage.is_local(url) else _remote)(url, pattern, passed)
    # Names with one stem follow each other in both.
    for _, group in itertools.groupby(found, key=lambda file: posixpath.splitext(file.name)[0]):
        files = list(group)
        if any(suffix(file.name) in _RAW for file in files):
            made = any(suffix(file.name) in IMAGE_SUFFIXES for file in files)
            raw = [file for file in files if made and suffix(file.name) in _RAW]
            passed.counts.update(f"{suffix(file.name)} beside its photograph" for file in raw)
            files = [file for file in files if file not in raw]
        yield from files


def _local(root: str, pattern: _Pattern | None, passed: PassedOver) -> Iterator[Found]:
    """A directory at a time, so that memory holds the names of one of them."""
    root = storage.absolute(root)
    folders: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while folders:
        folder, above = folders.pop()
        place = os.path.join(root, folder)
        try:
            own = os.stat(place)
            if (own.st_dev, own.st_ino) in above:
                passed.counts["link into its own folder"] += 1
                continue
            inside, files = _names_in(place, folder, pattern, passed)
        except OSError as error:
            if not folder:
                raise UserError(
                    "no-access", f"{root}: {error.strerror}; it cannot be read"
                ) from None
            passed.unreadable.append(place)
            continue
        known = above | {(own.st_dev, own.st_ino)}
        folders += [(name, known) for name in reversed(inside)]
        for name in files:
            yield described(os.path.join(root, name), name)


def _names_in(
    place: str, folder: str, pattern: _Pattern | None, passed: PassedOver
) -> tuple[list[str], list[str]]:
    """Folders and files in the directory `place`, as names below the root, sorted."""
    folders, files = list[str](), list[str]()
    depth = folder.count("/") + 1 if folder else 0
    with os.scandir(place) as entries:
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            is_folder = entry.is_dir()
            # What the pattern does not ask for is not passed over.
            if pattern is not None and not (
                pattern.may_hold(name) if is_folder else pattern.names(name)
            ):
                continue
            kind = kind_passed(entry.name)
            if kind and not (kind == "hidden" and pattern is not None and pattern.shows(depth)):
                passed.counts[kind] += 1
            else:
                (folders if is_folder else files).append(name)
    return sorted(folders), sorted(files)


def _remote(root: str, pattern: _Pattern | None, passed: PassedOver) -> Iterator[Found]:
    counted = ""
    for name, info in storage.objects(root, pattern.start if pattern is not None else ""):
        # Consoles make an object `name/` to show a folder.
        if name.endswith("/") or not name or (pattern is not None and not pattern.names(name)):
            continue
        kind = place = ""
        for depth, part in enumerate(parts := name.split("/")):
            kind = kind_passed(part) or ""
            if kind and not (kind == "hidden" and pattern is not None and pattern.shows(depth)):
                place = "/".join(parts[: depth + 1])
                break
        if not place:
            yield Found(name, storage.join(root, name), _size(info), version(info))
        elif place != counted:
            passed.counts[kind] += 1
            counted = place


def described(url: str, name: str) -> Found:
    """The file at `url`, asked for by itself; without a version where nothing can be reached."""
    if not storage.is_local(url):
        try:
            fs, path = storage.filesystem(url)
            info = fs.info(path)
            return Found(name, url, _size(info), version(info))
        # Every filesystem has errors of its own; why it cannot be read is told by reading it.
        except Exception:
            return Found(name, url, None, None)
    path = storage.absolute(url)
    try:
        found = os.stat(path)
    except OSError:  # a link to nowhere, or gone already
        return Found(name, path, None, None)
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its writer for ever
        return Found(name, path, None, None)
    return Found(name, path, found.st_size, f"{found.st_mtime_ns}-{found.st_size}")


def without_beside(files: Iterable[Found], passed: PassedOver) -> Iterator[Found]:
    """`files` without those that lie beside photographs, which are counted."""
    for file in files:
        kind = kind_beside(file.name)
        if kind is None:
            yield file
        else:
            passed.counts[kind] += 1


def _size(info: Mapping[str, Any]) -> int | None:
    size = info.get("size")
    return None if size is None else int(size)


def version(info: Mapping[str, Any]) -> str:
    """What changes when the content of a file does, from fsspec's `info` of it.

    >>> version({"ETag": '"9a0364"', "size": 3}), version({"mtime": 12.5, "size": 3})
    ('9a0364', '12.5-3')
    """
    for key in ("ETag", "etag", "e_tag", "md5Hash", "content_md5"):
        if info.get(key):
            return str(info[key]).strip('"')
    times = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")
    time = next((info[key] for key in times if info.get(key)), "")
    # One listing of a filesystem gives seconds and another a date.
    time = time.timestamp() if isinstance(time, datetime) else time
    return f"{time}-{info.get('size')}"
