"""The training loop, of the head and of fine-tuning, the same on one worker and on many.

`fit` runs in every worker. What all workers must agree on (the order of examples, when to save and
when to stop) is a function of the seed and the position, or has been summed over the workers, so
that every worker makes the same number of collective steps.

Steps are taken in pieces of about a second. Between two of them the state can be saved, and the
workers can be asked to leave.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from leafnet.core.errors import UserError
from leafnet.distributed.worker import Hooks, Leaving, Place

# Workers hear of each other so often, in seconds: a state asked for is saved within that time.
_PIECE_S = 1.0
_FIRST_PIECE = 8  # steps, before it is known how long one takes
# The share of the time that goes into saving a large state within an epoch, at the most.
_SAVING = 0.02
# Called by every worker after each epoch with its row of the history.
Report = Callable[[dict[str, float]], None]


class FitState(Protocol):
    """What the loop needs of the state of a fit, after `step` steps."""

    epoch: int  # whole epochs, with their validation
    step: int  # of all epochs, also inside one
    best_epoch: int  # 0: none yet
    best_loss: float  # on validation
    history: list[dict[str, float]]  # one row an epoch
    # Of the steps since the last whole epoch, summed over the workers.
    losses: NDArray[np.float64]
    correct: float
    # Since then, of a worker in the mean: what the steps took, and how much of it without a batch.
    seconds: float
    waited: float


State = TypeVar("State", bound=FitState)
State_contra = TypeVar("State_contra", bound=FitState, contravariant=True)


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


def class_weights(kind: str, labels: NDArray[np.int32], num_classes: int) -> NDArray[np.float32]:
    """Weight [C] of each class in the loss, for `kind` none or balanced."""
    if kind == "balanced":
        return balanced_weights(labels, num_classes)
    return np.ones(num_classes, np.float32)


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


class Workers:
    """The workers of a fit, under `tf.distribute`."""

    def __init__(self, place: Place) -> None:
        import tensorflow as tf

        self.place = place
        self.strategy = tf.distribute.get_strategy()
        if place.workers > 1:
            self.strategy = tf.distribute.MultiWorkerMirroredStrategy()

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of `values` [N] over all workers, on each of them."""
        import tensorflow as tf

        if self.place.workers == 1:
            return values
        local = self.strategy.run(lambda: tf.constant(values, tf.float64))
        return np.asarray(self.strategy.reduce(tf.distribute.ReduceOp.SUM, local, axis=None))


class Trained(NamedTuple):
    """This worker's part of a piece of steps."""

    losses: NDArray[np.float64]  # [S], its share of each
    correct: float
    waited: float = 0.0  # seconds without a batch


class Validated(NamedTuple):
    """This worker's part of a validation."""

    loss: float = 0.0  # summed
    correct: float = 0.0
    given_up: bool = False


class Learner(Protocol[State_contra]):
    """What is fitted: the variables, the optimizer and the compiled steps of one worker."""

    verb: str  # what it does, for people
    rate_setting: str  # what to lower where the loss is not finite
    workers: Workers
    valid_examples: int  # of all workers together

    @property
    def most_steps(self) -> int:
        """Steps that may be taken at once."""

    def train(self, first: int, count: int) -> Trained:
        """Take the steps from `first` to `first + count - 1`, which are of one epoch."""

    def validate(self, goes_on: Callable[[int], bool]) -> Validated:
        """Judge the weights on this worker's validation examples.

        Args:
            goes_on: called before each batch with the count of examples before it; False: give up.
                What takes no time need not call it.
        """

    def rate(self, step: int) -> float:
        """The learning rate of `step`."""

    def end_epoch(self, state: State_contra, row: dict[str, float], *, best: bool) -> None:
        """Complete `row` of the history; keep the weights that were validated if they are best."""

    def put_into(self, state: State_contra) -> None:
        """Copy the variables and those of the optimizer into `state`."""


def fit(
    learner: Learner[State],
    state: State,
    *,
    steps: Steps,
    patience: int | None,
    report: Report,
    saving: Saving[State] | None,
    hooks: Hooks,
    first_piece: int = _FIRST_PIECE,
) -> State:
    """Fit until no epoch is left, or validation has not improved for `patience` epochs.

    Args:
        learner: with the variables as `state` has them.
        state: after the steps that are taken already; changed in place.
        steps: to take, with those.
        patience: in epochs; none: take all.
        report: called after each epoch.
        saving: when and how the state is saved; none: never.
        hooks: how the fit is followed, and asked to stop.
        first_piece: steps to take at once before it is known how long one takes.

    Returns:
        The state after the last epoch, on every worker.

    Raises:
        UserError: the loss is not finite, with the steps where it happened.
        Leaving: on every worker, after one was asked to leave and the state was saved.
    """
    place = learner.workers.place
    clock = Clock(saving, steps.per_epoch, first=first_piece)
    while not finished(state, steps.epochs, patience):
        first, left = state.step, (state.epoch + 1) * steps.per_epoch - state.step
        most = min(left, learner.most_steps)
        piece = clock.piece(first, state.epoch, most=most) if left else 0
        ends = piece == left
        began = time.monotonic()
        trained = _train(learner, state, piece, hooks)
        taken = time.monotonic() - began
        validated = validate(learner, f"epoch {state.epoch + 1}", hooks) if ends else Validated()
        due = place.rank == 0 and clock.due(first + piece, ends=ends)
        # One sum over the workers: every worker then sees, and decides, the same.
        flags = [*validated, due, hooks.leave()]
        sums = learner.workers.sum(
            np.array([*trained.losses, trained.correct, taken, trained.waited, *flags], np.float64)
        )
        correct, taken, waited, loss, valid_correct, given_up, save, leave = sums[piece:].tolist()
        if piece:
            hooks.started()
            refuse_non_finite(
                sums[:piece], first_step=first, epoch=state.epoch, mend=learner.rate_setting
            )
            clock.took(taken / place.workers / piece)
            state.step = first + piece
            state.losses = np.concatenate([state.losses, sums[:piece]])
            state.correct += correct
            state.seconds += taken / place.workers
            state.waited += waited / place.workers
        if ends and not given_up:
            end_epoch(learner, state, steps, scores(learner, loss, valid_correct))
            report(state.history[-1])
        over = finished(state, steps.epochs, patience)
        if save or leave or over:
            began = time.monotonic()
            hooks.doing(f"saving the state after step {state.step}")
            learner.put_into(state)
            if saving:
                saving.save(state if place.rank == 0 else None)
            clock.saved(time.monotonic() - began)
        if leave and not over:
            raise Leaving(f"after step {state.step}")
    return state


def _train(learner: Learner[State], state: State, piece: int, hooks: Hooks) -> Trained:
    if not piece:  # an earlier fit left before the epoch was validated
        return Trained(np.empty(0), 0.0)
    first = state.step
    hooks.doing(f"{learner.verb}, epoch {state.epoch + 1}, step {first + 1} to {first + piece}")
    return learner.train(first, piece)


def validate(
    learner: Learner[Any], what: str, hooks: Hooks, *, may_leave: bool = True
) -> Validated:
    """Validate `what` on this worker; given up when it is asked to leave, if it may."""

    def goes_on(done: int) -> bool:
        hooks.doing(f"validating {what}, {done:,} photographs of this worker are done")
        return not (may_leave and hooks.leave())

    return learner.validate(goes_on)


def scores(learner: Learner[Any], loss: float, correct: float) -> dict[str, float]:
    """Loss and accuracy of validation from sums over all workers; {} without a split for it."""
    examples = learner.valid_examples
    if not examples:
        return {}
    return {"valid_loss": loss / examples, "valid_accuracy": correct / examples}


def end_epoch(learner: Learner[State], state: State, steps: Steps, valid: dict[str, float]) -> None:
    """Add the epoch whose steps are taken to the history, and keep its weights if it is the best.

    Args:
        learner: with the weights as they are then.
        state: after the last step of the epoch.
        steps: of the fit.
        valid: as `scores` has them.
    """
    row = {
        "epoch": state.epoch + 1,
        "step": state.step,
        "learning_rate": learner.rate(state.step - 1),
        "train_loss": float(state.losses.mean()),
        "train_accuracy": state.correct / (steps.per_epoch * steps.batch),
        **valid,
    }
    # Without a validation split the last epoch is as good a choice as any.
    best = not valid or valid["valid_loss"] < state.best_loss
    state.epoch += 1
    if best:
        state.best_epoch, state.best_loss = state.epoch, valid.get("valid_loss", math.inf)
    learner.end_epoch(state, row, best=best)
    state.losses, state.correct, state.seconds, state.waited = np.empty(0), 0.0, 0.0, 0.0
    state.history.append(row)


def finished(state: FitState, epochs: int, patience: int | None) -> bool:
    """True when no epoch is left, or validation has not improved for too long."""
    if state.epoch >= epochs:
        return True
    return patience is not None and state.epoch - state.best_epoch >= patience


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
