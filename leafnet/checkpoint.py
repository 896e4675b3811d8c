"""The state of training as a folder: arrays, and a manifest that says what they belong to.

The manifest is written last and holds the sha256 of the arrays and of itself, so that a folder that
is half written or damaged is known for one. Folders are named by their step: the newest that is
whole is what a run goes on from.
"""

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafnet import storage
from leafnet.classifier import Head
from leafnet.errors import UserError

CHECKPOINT_VERSION = 3
MANIFEST = "manifest.json"

_ARRAYS = "arrays.npz"
_PREFIX = "checkpoint_"


@dataclass
class TrainState:
    """Everything that the rest of a head fit depends on, after `step` steps.

    Order, views, dropout and the rate of learning are functions of the seed and the position, so
    epoch and step are the random state and the place in the data and in the schedule.
    """

    epoch: int  # whole epochs
    step: int  # of all epochs, also inside one
    head: Head  # on standardised features
    optimizer: list[NDArray[Any]]  # in the optimizer's own order
    best_head: Head
    best_epoch: int  # 0: none yet
    best_loss: float
    history: list[dict[str, float]] = field(default_factory=list)  # one row an epoch
    # Of the steps since the last whole epoch, summed over the workers.
    losses: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    correct: float = 0.0


def save(folder: str | Path, state: TrainState, *, identity: Mapping[str, Any]) -> None:
    """Write `state` into the local `folder`. `identity` is what must be equal to go on from it."""
    arrays = {f"optimizer/{i}": array for i, array in enumerate(state.optimizer)}
    for name, head in (("head", state.head), ("best", state.best_head)):
        for i, (kernel, bias) in enumerate(head):
            arrays[f"{name}/{i}/kernel"], arrays[f"{name}/{i}/bias"] = kernel, bias
    arrays["losses"] = state.losses
    values = {
        "epoch": state.epoch,
        "step": state.step,
        "correct": state.correct,
        "best_epoch": state.best_epoch,
        "best_loss": state.best_loss if np.isfinite(state.best_loss) else None,
        "history": state.history,
    }
    write(folder, arrays, values, identity=identity)


def load(folder: str | Path, *, identity: Mapping[str, Any]) -> TrainState:
    """The state in `folder`, a path or URL.

    Raises:
        UserError: it belongs to other settings, data or weights (the first that differs is
            named), was written by another version, or is damaged.
    """
    arrays, values = read(folder, identity=identity)

    def head(name: str) -> Head:
        layers = sum(key.startswith(f"{name}/") for key in arrays) // 2
        return [(arrays[f"{name}/{i}/kernel"], arrays[f"{name}/{i}/bias"]) for i in range(layers)]

    return TrainState(
        epoch=values["epoch"],
        step=values["step"],
        head=head("head"),
        optimizer=[
            arrays[f"optimizer/{i}"]
            for i in range(sum(key.startswith("optimizer/") for key in arrays))
        ],
        best_head=head("best"),
        best_epoch=values["best_epoch"],
        best_loss=np.inf if values["best_loss"] is None else values["best_loss"],
        history=values["history"],
        losses=arrays["losses"],
        correct=values["correct"],
    )


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
