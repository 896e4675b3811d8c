"""The state of training as a folder: arrays, and a manifest that says what they belong to."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafnet import storage
from leafnet.classifier import Head
from leafnet.errors import UserError

CHECKPOINT_VERSION = 1


@dataclass
class TrainState:
    """Everything that the rest of a head fit depends on, after `epoch` whole epochs.

    Order, views and dropout are functions of the seed and the position, so these two counts are
    the random state.
    """

    epoch: int
    step: int
    head: Head  # on standardised features
    optimizer: list[NDArray[Any]]  # in the optimizer's own order
    best_head: Head
    best_epoch: int  # 0: none yet
    best_loss: float
    history: list[dict[str, float]] = field(default_factory=list)  # one row an epoch


def save(folder: str | Path, state: TrainState, *, identity: dict[str, Any]) -> None:
    """Write `state` into the local `folder`. `identity` is what must be equal to go on from it.

    The manifest, with the sha256 of the arrays, is written last.
    """
    arrays = {f"optimizer/{i}": array for i, array in enumerate(state.optimizer)}
    for name, head in (("head", state.head), ("best", state.best_head)):
        for i, (kernel, bias) in enumerate(head):
            arrays[f"{name}/{i}/kernel"], arrays[f"{name}/{i}/bias"] = kernel, bias
    sink = io.BytesIO()
    np.savez(sink, **arrays)  # type: ignore[arg-type]  # numpy's stub knows only positional arrays
    data = sink.getvalue()
    manifest = {
        "version": CHECKPOINT_VERSION,
        "sha256": storage.sha256(data),
        "epoch": state.epoch,
        "step": state.step,
        "best_epoch": state.best_epoch,
        "best_loss": state.best_loss if state.best_epoch else None,
        "history": state.history,
        "identity": identity,
    }
    storage.write_bytes(str(Path(folder) / "arrays.npz"), data)
    storage.write_json(str(Path(folder) / "manifest.json"), manifest)


def load(folder: str | Path, *, identity: dict[str, Any]) -> TrainState:
    """The state in the local `folder`.

    Raises:
        UserError: it belongs to other settings, data or weights (the first that differs is
            named), was written by another version, or is damaged.
    """
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    if manifest["version"] != CHECKPOINT_VERSION:
        raise UserError(
            "other-version",
            f"checkpoint {folder} has version {manifest['version']}, this leafnet reads "
            f"{CHECKPOINT_VERSION}; train under another --name",
        )
    compare_identity(manifest["identity"], identity, where=f"checkpoint {folder}")
    data = (Path(folder) / "arrays.npz").read_bytes()
    if storage.sha256(data) != manifest["sha256"]:
        raise UserError("damaged-checkpoint", f"checkpoint {folder} is damaged: sha256 differs")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = dict(file)

    def head(name: str) -> Head:
        layers = sum(key.startswith(f"{name}/") for key in arrays) // 2
        return [(arrays[f"{name}/{i}/kernel"], arrays[f"{name}/{i}/bias"]) for i in range(layers)]

    return TrainState(
        epoch=manifest["epoch"],
        step=manifest["step"],
        head=head("head"),
        optimizer=[
            arrays[f"optimizer/{i}"]
            for i in range(sum(key.startswith("optimizer/") for key in arrays))
        ],
        best_head=head("best"),
        best_epoch=manifest["best_epoch"],
        best_loss=np.inf if manifest["best_loss"] is None else manifest["best_loss"],
        history=manifest["history"],
    )


def compare_identity(found: dict[str, Any], expected: dict[str, Any], *, where: str) -> None:
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
