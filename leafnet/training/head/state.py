"""The state of training as a folder: arrays, and a manifest that says what they belong to.

The manifest is written last and holds the sha256 of the arrays and of itself, so that a folder that
is half written or damaged is known for one. Folders are named by their step: the newest that is
whole is what a run goes on from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafnet.distributed.checkpoint import read, write
from leafnet.models.classifier import Head


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
    # Of those that this start has taken, which no checkpoint has.
    seconds: float = 0.0
    waited: float = 0.0


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
