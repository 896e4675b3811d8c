"""A checkpoint on disk: arrays, JSON and a manifest that is written last."""

import io
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafnet.core import storage
from leafnet.core.errors import UserError

CHECKPOINT_VERSION = 3
MANIFEST = "manifest.json"

_ARRAYS = "arrays.npz"
_PREFIX = "checkpoint_"


def write(
    folder: str | Path,
    arrays: Mapping[str, NDArray[Any]],
    values: Mapping[str, Any],
    *,
    identity: Mapping[str, Any],
) -> None:
    """Write arrays by name, and values that JSON knows, into the local `folder`."""
    sink = io.BytesIO()
    np.savez(sink, **arrays)  # type: ignore[arg-type]  # numpy's stub knows only positional arrays
    data = sink.getvalue()
    manifest = {
        "version": CHECKPOINT_VERSION,
        "files": {_ARRAYS: {"bytes": len(data), "sha256": storage.sha256(data)}},
        "identity": dict(identity),
        "values": dict(values),
    }
    storage.write_bytes(str(Path(folder) / _ARRAYS), data)
    url = str(Path(folder) / MANIFEST)
    storage.write_json(url, manifest | {"sha256": _own_sha256(manifest)})


def read(
    folder: str | Path, *, identity: Mapping[str, Any]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """(arrays, values) of the checkpoint at `folder`, a path or URL.

    Raises:
        UserError: as `load`.
    """
    url = str(folder)
    manifest, files = _whole(url)
    compare_identity(manifest["identity"], identity, where=f"checkpoint {url}")
    with np.load(io.BytesIO(files[_ARRAYS]), allow_pickle=False) as file:
        return dict(file), manifest["values"]


def name(step: int, tag: str) -> str:
    """The folder of a checkpoint after `step` steps; `tag` tells two of the same step apart.

    >>> name(1200, "a3f1")
    'checkpoint_000001200_a3f1'
    """
    return f"{_PREFIX}{step:09d}_{tag}"


def newest(url: str, say: Callable[[str], None]) -> str | None:
    """The name of the newest whole checkpoint in the folder `url`; what is damaged is told.

    Raises:
        UserError: it was written by another version; the store cannot be reached.
    """
    for found in names(url):
        try:
            _whole(storage.join(url, found))
        except UserError as error:
            if error.reason != "damaged-checkpoint":
                raise
            say(f"{error}; passed over, the one before is used")
        else:
            return found
    return None


def names(url: str) -> list[str]:
    """The checkpoints in the folder `url`, whole or not, the newest first."""
    # Ray Train keeps a checkpoint_manager_snapshot.json beside them.
    found = [name for name in storage.list_names(url) if re.match(_PREFIX + r"\d", name)]
    return sorted(found, reverse=True)


def delete(url: str) -> None:
    """Delete the checkpoint `url`, whole or not: what leafnet wrote there, and nothing else."""
    for name in (MANIFEST, _ARRAYS):
        storage.delete(storage.join(url, name))
    if storage.is_local(url):
        with suppress(OSError):  # something of others is there
            Path(storage.absolute(url)).rmdir()


def _whole(url: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest of a checkpoint and its files, all of them as they were written.

    Raises:
        UserError: they are not, or another version wrote them.
    """

    def damaged(why: str) -> UserError:
        return UserError("damaged-checkpoint", f"checkpoint {url} is damaged: {why}")

    try:
        manifest = storage.read_json(storage.join(url, MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        raise damaged("it was not written to the end") from None
    except UserError as error:
        if error.reason != "not-json":
            raise
        raise damaged("its manifest cannot be read") from None
    except UnicodeDecodeError:
        raise damaged("its manifest cannot be read") from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    # Read first: the rest is what this version writes.
    if version is not None and version != CHECKPOINT_VERSION:
        raise UserError(
            "other-version",
            f"checkpoint {url} has version {version}, this leafnet reads "
            f"{CHECKPOINT_VERSION}; train under another --name",
        )
    if version is None or manifest.pop("sha256", None) != _own_sha256(manifest):
        raise damaged("sha256 of its manifest differs")
    files = {}
    for name, stored in manifest["files"].items():
        try:
            files[name] = storage.read_bytes(storage.join(url, name))
        except FileNotFoundError:
            raise damaged(f"{name} is gone") from None
        if storage.sha256(files[name]) != stored["sha256"]:
            raise damaged(f"sha256 of {name} differs")
    return manifest, files


def _own_sha256(manifest: Mapping[str, Any]) -> str:
    return storage.sha256(json.dumps(manifest, sort_keys=True).encode())


def compare_identity(found: Mapping[str, Any], expected: Mapping[str, Any], *, where: str) -> None:
    """Refuse to go on with something that was started differently.

    Raises:
        UserError: naming the first entry that differs and both values.
    """
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise UserError(
                "started-differently",
                f"{where} was started with {name} {found.get(name)}, not {expected.get(name)}; "
                "give the same settings to go on, or another --name to start anew",
            )
