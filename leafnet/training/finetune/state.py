"""The state of fine-tuning: arrays by name, saved and loaded."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafnet.distributed import checkpoint
from leafnet.models.classifier import Head
from leafnet.models.weights import stage_of

Array = NDArray[np.float32]
Arrays = dict[str, Array]  # by name of the variable, such as conv5_block1_1_conv/kernel
Convolutions = dict[str, tuple[Array, Array]]


@dataclass
class TuneState:
    """Everything that the rest of a fine-tuning depends on, after `step` steps."""

    epoch: int  # whole epochs, with their validation
    step: int  # of all epochs, also inside one
    weights: Arrays
    first: Arrays  # moments of AdamW
    second: Arrays
    average: Arrays  # of the weights over steps
    best: Arrays  # the average as it was after `best_epoch`
    best_epoch: int  # 0: none was better than the head alone
    best_loss: float  # on validation; at first that of the head alone
    head_alone: dict[str, float]  # valid_loss and valid_accuracy of it
    history: list[dict[str, float]] = field(default_factory=list)  # one row an epoch
    # Of the steps since the last whole epoch, summed over the workers.
    losses: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    correct: float = 0.0
    # Of a worker in the mean: what they took, and how much of it was without a batch.
    seconds: float = 0.0
    waited: float = 0.0


def convolutions(arrays: Arrays) -> Convolutions:
    """The convolutions among `arrays`."""
    names = [name.removesuffix("/kernel") for name in arrays if name.startswith("conv")]
    return {
        name: (arrays[f"{name}/kernel"], arrays[f"{name}/bias"])
        for name in names
        if not name.endswith("/bias")
    }


def head(arrays: Arrays) -> Head:
    """The head among `arrays`, on standardised features."""
    layers = sum(name.startswith("head/") for name in arrays) // 2
    return [(arrays[f"head/{i}/kernel"], arrays[f"head/{i}/bias"]) for i in range(layers)]


def save(folder: str | Path, state: TuneState, *, identity: dict[str, Any]) -> None:
    """Write `state` into the local `folder`, see `checkpoint.write`."""
    groups = {
        "weights": state.weights,
        "first": state.first,
        "second": state.second,
        "average": state.average,
    }
    # Before the first best epoch it is what fine-tuning began from; right after one, the average.
    after_best = state.epoch == state.best_epoch and not state.losses.size
    if state.best_epoch > 0 and not after_best:
        groups["best"] = state.best
    arrays: dict[str, NDArray[Any]] = {
        f"{group}/{name}": a for group, of_group in groups.items() for name, a in of_group.items()
    }
    arrays["losses"] = state.losses
    values = {
        "epoch": state.epoch,
        "step": state.step,
        "correct": state.correct,
        "seconds": state.seconds,
        "waited": state.waited,
        "best_epoch": state.best_epoch,
        "best_loss": state.best_loss if math.isfinite(state.best_loss) else None,
        "head_alone": state.head_alone,
        "history": state.history,
    }
    checkpoint.write(folder, arrays, values, identity=identity)


def load(folder: str | Path, initial: Arrays, *, identity: dict[str, Any]) -> TuneState:
    """The state in `folder`, a path or URL; `initial` is what fine-tuning began from.

    Raises:
        UserError: it belongs to other settings, data or weights (the first that differs is
            named), was written by another version, or is damaged.
    """
    arrays, values = checkpoint.read(folder, identity=identity)
    losses = arrays.pop("losses")
    groups: dict[str, Arrays] = {}
    for key, array in arrays.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = array
    best = initial if values["best_epoch"] == 0 else groups.get("best", groups["average"])
    return TuneState(
        epoch=values["epoch"],
        step=values["step"],
        weights=groups["weights"],
        first=groups["first"],
        second=groups["second"],
        average=groups["average"],
        best=best,
        best_epoch=values["best_epoch"],
        best_loss=math.inf if values["best_loss"] is None else values["best_loss"],
        head_alone=values["head_alone"],
        history=values["history"],
        losses=losses,
        correct=values["correct"],
        seconds=values["seconds"],
        waited=values["waited"],
    )


def initial_arrays(weights: Convolutions, head: Head, blocks: int | str) -> Arrays:
    """The weights that are trained, as fine-tuning begins."""
    first = 1 if blocks == "all" else 6 - int(blocks)
    arrays = {}
    for name, (kernel, bias) in weights.items():
        if stage_of(name) >= first:
            arrays[f"{name}/kernel"], arrays[f"{name}/bias"] = kernel, bias
    for i, (kernel, bias) in enumerate(head):
        arrays[f"head/{i}/kernel"], arrays[f"head/{i}/bias"] = kernel, bias
    return arrays
