"""What every training loop needs: order, steps, pieces of an epoch, when to save."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from leafnet.core.errors import UserError

# Workers hear of each other so often, in seconds: a state asked for is saved within that time.
_PIECE_S = 1.0
_FIRST_PIECE = 8  # steps, before it is known how long one takes
# The share of the time that goes into saving a large state within an epoch, at the most.
_SAVING = 0.02
# Called by every worker after each epoch with its row of the history.
Report = Callable[[dict[str, float]], None]
State = TypeVar("State")


@dataclass(frozen=True)
class Saving(Generic[State]):
    """When the state is saved. At the end of the fit it always is."""

    # Called by every worker after the same step when it is time; only rank 0 gets the state.
    save: Callable[[State | None], None]
    every_s: float  # when the last is this old, see `Clock.due`; 0: at the end of every epoch
    every_steps: int | None = None
    # False while the last saved state is still on its way: then the next is left out.
    ready: Callable[[], bool] = lambda: True


def epoch_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order [count] in which `epoch` takes the examples, whatever the number of workers."""
    return np.random.default_rng([seed, epoch, 0]).permutation(count)


def balanced_weights(labels: NDArray[np.int32], num_classes: int) -> NDArray[np.float32]:
    """Weight [C] of each class in the loss, N / (C x its count): all classes then count the same.

    >>> balanced_weights(np.array([0, 0, 0, 1], np.int32), 2).tolist()[1]
    2.0
    """
    counts = np.bincount(labels, minlength=num_classes)
    return (labels.size / (num_classes * np.maximum(counts, 1))).astype(np.float32)


class Steps(NamedTuple):
    """The steps of a fit."""

    batch: int  # examples of a step, of all workers together
    per_epoch: int
    epochs: int

    @classmethod
    def of(cls, examples: int, batch_size: int, epochs: int) -> "Steps":
        """Whole global batches; what remains of an epoch is left out, other examples each epoch.

        Fewer examples than a batch make one smaller batch.

        >>> Steps.of(90, 16, 2), Steps.of(9, 16, 2)
        (Steps(batch=16, per_epoch=5, epochs=2), Steps(batch=9, per_epoch=1, epochs=2))
        """
        batch = min(batch_size, examples)
        return cls(batch, examples // batch, epochs)

    @property
    def total(self) -> int:
        """Of all epochs."""
        return self.per_epoch * self.epochs


class Clock:
    """How many steps to take at once, and when the state has to be saved.

    Args:
        saving: when it is; none: never.
        steps: of an epoch.
        first: steps to take at once before it is known how long one takes.
    """

    def __init__(
        self, saving: Saving[Any] | None, steps: int, *, first: int = _FIRST_PIECE
    ) -> None:
        self._saving, self._steps, self._first = saving, steps, first
        self._step_s: float | None = None
        self._saved = time.monotonic()
        self._save_s = 0.0  # that it took the last time

    def piece(self, step: int, epoch: int, *, most: int) -> int:
        """How many steps come after `step`, within `epoch`; the same on every worker."""
        wanted = self._first if self._step_s is None else int(_PIECE_S / self._step_s)
        piece = max(1, min(wanted, most, (epoch + 1) * self._steps - step))
        every = self._saving.every_steps if self._saving else None
        return min(piece, every - step % every) if every else piece

    def took(self, step_s: float) -> None:
        """Hear the seconds of a step, the mean of all workers."""
        self._step_s = max(step_s, 1e-6)

    def due(self, step: int, *, ends: bool) -> bool:
        """True when the state after `step` is to be saved; `ends`: an epoch is over with it."""
        if self._saving is None or not self._saving.ready():
            return False
        every_s, every_steps = self._saving.every_s, self._saving.every_steps
        if every_steps and step % every_steps == 0:
            return True
        age = time.monotonic() - self._saved
        if ends:
            return age >= every_s
        return every_s > 0 and age >= max(every_s, self._save_s / _SAVING)

    def saved(self, seconds: float) -> None:
        """Hear that the state is saved now, and how long that took."""
        self._saved, self._save_s = time.monotonic(), seconds


def refuse_non_finite(
    losses: NDArray[np.float64], *, first_step: int, epoch: int, mend: str
) -> None:
    """Refuse to go on where a loss of the steps from `first_step` on is not a number.

    Raises:
        UserError: which steps, and the setting `mend` to be lowered.
    """
    bad = np.flatnonzero(~np.isfinite(losses)) + first_step
    if bad.size:
        raise UserError(
            "loss-not-finite",
            f"the training loss is not finite in epoch {epoch + 1}, at {_steps(bad)}; lower {mend}",
        )


def _steps(steps: NDArray[np.int64]) -> str:
    first, last = steps[0], steps[-1]
    return f"step {first}" if first == last else f"{steps.size} steps from {first} to {last}"
