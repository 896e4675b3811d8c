"""Fitting the head: schedule, train step and loop, the same on one worker and on many.

`fit_head` runs in every worker. What all workers must agree on (the order of examples, views,
dropout, when to save and when to stop) is a function of the seed and the position, or has been
summed over the workers, so that every worker makes the same number of collective steps.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from leafnet.checkpoint import TrainState
from leafnet.classifier import Head, initial_head
from leafnet.config import HeadSettings
from leafnet.errors import UserError
from leafnet.features import Features, SplitFeatures

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

# The features that a worker copies out of the memory map at a time, in bytes.
_CHUNK_BYTES = 64 * 2**20

# (indices of examples [M], epoch) -> features [M, D] of the view that this epoch takes of each.
Gather = Callable[[NDArray[np.int64], int], NDArray[np.floating]]
# Called by every worker after each epoch with its row of the history, and with the state when
# it is time to save; only rank 0 has a state to give.
Report = Callable[[dict[str, float], TrainState | None, bool], None]


@dataclass(frozen=True)
class Place:
    """Which of how many workers this is."""

    rank: int
    workers: int


@dataclass(frozen=True)
class TrainingData:
    """What the head is fitted on."""

    gather: Gather
    labels: NDArray[np.int32]  # [N] of the training split
    valid: SplitFeatures
    mean: NDArray[np.float32]  # [D] of the training features
    deviation: NDArray[np.float32]  # [D]


def even_split(count: int, place: Place) -> tuple[int, int]:
    """(start, stop) of the worker's part of `count` things; parts differ by one at the most.

    >>> [even_split(10, Place(rank, 4)) for rank in range(4)]
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    return (
        count * place.rank // place.workers,
        count * (place.rank + 1) // place.workers,
    )


def epoch_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order [count] in which `epoch` takes the examples, whatever the number of workers."""
    return np.random.default_rng([seed, epoch, 0]).permutation(count)


def epoch_views(count: int, views: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The view [count] of each example that `epoch` learns from."""
    return np.random.default_rng([seed, epoch, 1]).integers(0, views, count)


def cached_views(features: Features, *, seed: int) -> Gather:
    """Gather from the memory map `features` [N, K, D], a random view of each example an epoch."""

    # Kept for the chunks of an epoch: at 80 million examples a draw takes a second.
    @functools.lru_cache(maxsize=1)
    def views_of(epoch: int) -> NDArray[np.int64]:
        return epoch_views(features.shape[0], features.shape[1], seed=seed, epoch=epoch)

    def gather(indices: NDArray[np.int64], epoch: int) -> NDArray[np.floating]:
        return features[indices, views_of(epoch)[indices]]

    return gather


def balanced_weights(labels: NDArray[np.int32], num_classes: int) -> NDArray[np.float32]:
    """Weight [C] of each class in the loss, N / (C x its count): all classes then count the same.

    >>> balanced_weights(np.array([0, 0, 0, 1], np.int32), 2).tolist()[1]
    2.0
    """
    counts = np.bincount(labels, minlength=num_classes)
    return (labels.size / (num_classes * np.maximum(counts, 1))).astype(np.float32)


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Whole global batches in an epoch; what remains is left out, other examples each epoch.

    Fewer examples than a batch make one smaller batch.
    """
    return max(1, examples // batch_size)


def fit_head(
    data: TrainingData,
    *,
    settings: HeadSettings,
    num_classes: int,
    seed: int,
    place: Place,
    save_every_s: float,
    report: Report,
    state: TrainState | None = None,
) -> TrainState:
    """Fit the head under `tf.distribute`, from `state` when there is one.

    Args:
        data: the same on every worker.
        settings: of the head; `batch_size` is the global batch.
        num_classes: C.
        seed: of initial weights, order, views and dropout.
        place: of this worker.
        save_every_s: seconds between saved states; the last epoch is always saved.
        report: called after each epoch.
        state: to go on from.

    Returns:
        The state after the last epoch, on every worker.

    Raises:
        UserError: the loss is not finite, with the steps where it happened.
    """
    examples = data.labels.size
    batch = min(settings.batch_size, examples)
    steps = steps_per_epoch(examples, batch)
    if batch < place.workers:
        raise UserError(
            "batch-too-small",
            f"a global batch of {batch} cannot be shared out among {place.workers} workers; "
            "raise --head.batch_size or lower --workers",
        )
    learner = _Learner(
        state.head
        if state
        else initial_head(settings.units, num_classes, inputs=data.mean.size, seed=seed),
        data=data,
        settings=settings,
        num_classes=num_classes,
        seed=seed,
        place=place,
        batch=batch,
        steps=steps,
    )
    if state:
        learner.restore_optimizer(state.optimizer)
    else:
        state = TrainState(
            epoch=0,
            step=0,
            head=learner.head(),
            optimizer=learner.optimizer_arrays(),
            best_head=learner.head(),
            best_epoch=0,
            best_loss=math.inf,
        )
    last_saved = time.monotonic()
    while not _finished(state, settings):
        epoch = state.epoch
        order = epoch_order(examples, seed=seed, epoch=epoch)[: steps * batch]
        losses, correct = learner.train_epoch(order.reshape(steps, batch), epoch, epoch * steps)
        valid_loss, valid_correct = learner.validate()
        due = place.rank == 0 and time.monotonic() - last_saved >= save_every_s
        # One sum over the workers an epoch: every worker then sees, and decides, the same.
        sums = learner.sum_over_workers(
            np.concatenate([losses, [correct, valid_loss, valid_correct, float(due)]])
        )
        losses, (correct, valid_loss, valid_correct, due_sum) = sums[:steps], sums[steps:]
        _refuse_non_finite(losses, first_step=epoch * steps, epoch=epoch)
        row = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * steps,
            "learning_rate": learner.learning_rate((epoch + 1) * steps - 1),
            "train_loss": float(losses.mean()),
            "train_accuracy": float(correct) / (steps * batch),
        }
        if data.valid.labels.size:
            row["valid_loss"] = float(valid_loss) / data.valid.labels.size
            row["valid_accuracy"] = float(valid_correct) / data.valid.labels.size
        state.epoch, state.step = epoch + 1, (epoch + 1) * steps
        state.history.append(row)
        # Without a validation split the last epoch is as good a choice as any.
        if row.get("valid_loss", -math.inf) < state.best_loss or "valid_loss" not in row:
            state.best_epoch = epoch + 1
            state.best_loss = row.get("valid_loss", math.inf)
            state.best_head = learner.head()
        save = due_sum > 0 or _finished(state, settings)
        if save:
            state.head, state.optimizer = learner.head(), learner.optimizer_arrays()
            last_saved = time.monotonic()
        report(row, state if save and place.rank == 0 else None, save)
    return state


def _finished(state: TrainState, settings: HeadSettings) -> bool:
    if state.epoch >= settings.epochs:
        return True
    waited = state.epoch - state.best_epoch
    return settings.patience is not None and state.epoch > 0 and waited >= settings.patience


def _refuse_non_finite(losses: NDArray[np.float64], *, first_step: int, epoch: int) -> None:
    bad = np.flatnonzero(~np.isfinite(losses)) + first_step
    if bad.size:
        raise UserError(
            "loss-not-finite",
            f"the training loss is not finite in epoch {epoch + 1}, at {_steps(bad)}; "
            "lower --head.learning_rate",
        )


def _steps(steps: NDArray[np.int64]) -> str:
    first, last = steps[0], steps[-1]
    return f"step {first}" if first == last else f"{steps.size} steps from {first} to {last}"


class _Learner:
    """The variables, the optimizer and the compiled steps of one worker."""

    def __init__(
        self,
        head: Head,
        *,
        data: TrainingData,
        settings: HeadSettings,
        num_classes: int,
        seed: int,
        place: Place,
        batch: int,
        steps: int,
    ) -> None:
        import keras
        import tensorflow as tf

        self._data, self._place, self._batch = data, place, batch
        self._start, self._stop = even_split(batch, place)
        self._strategy = tf.distribute.get_strategy()
        if place.workers > 1:
            self._strategy = tf.distribute.MultiWorkerMirroredStrategy()
        self._weights = np.ones(num_classes, np.float32)
        if settings.class_weights == "balanced":
            self._weights = balanced_weights(data.labels, num_classes)
        total_steps = settings.epochs * steps
        warmup = min(round(settings.warmup_epochs * steps), total_steps - 1)
        with self._strategy.scope():
            self._layers = [_dense(kernel, bias) for kernel, bias in head]
            self._variables = [v for layer in self._layers for v in layer.trainable_variables]
            self._schedule = keras.optimizers.schedules.CosineDecay(
                0.0 if warmup else settings.learning_rate,
                decay_steps=total_steps - warmup,
                warmup_target=settings.learning_rate if warmup else None,
                warmup_steps=warmup,
            )
            self._optimizer = keras.optimizers.AdamW(
                self._schedule, weight_decay=settings.weight_decay
            )
            self._optimizer.exclude_from_weight_decay(var_names=["bias"])
            self._optimizer.build(self._variables)
        self._run_steps = self._compile(settings, num_classes=num_classes, seed=seed)
        self._validate = self._compile_validation()

    def head(self) -> Head:
        """A copy of the weights."""
        return [
            (np.array(layer.kernel.numpy()), np.array(layer.bias.numpy())) for layer in self._layers
        ]

    def optimizer_arrays(self) -> list[NDArray[Any]]:
        return [np.array(variable.numpy()) for variable in self._optimizer.variables]

    def restore_optimizer(self, arrays: list[NDArray[Any]]) -> None:
        variables = self._optimizer.variables
        shapes = [tuple(variable.shape) for variable in variables]
        assert shapes == [array.shape for array in arrays], "compare_identity let it through"
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)

    def learning_rate(self, step: int) -> float:
        return float(self._schedule(step))

    def train_epoch(
        self, order: NDArray[np.int64], epoch: int, first_step: int
    ) -> tuple[NDArray[np.float64], float]:
        """Take the steps of `order` [S, batch]; (this worker's share of each loss [S], correct)."""
        import tensorflow as tf

        mine = order[:, self._start : self._stop]
        losses, correct = [], 0.0
        for start, stop in self._chunks(mine.shape):
            indices = mine[start:stop]
            features = self._data.gather(indices.reshape(-1), epoch)
            loss, right = self._run_steps(
                tf.constant(
                    features.reshape(*indices.shape, -1),
                    tf.float16 if features.dtype == np.float16 else tf.float32,
                ),
                tf.constant(self._data.labels[indices]),
                tf.constant(first_step + start, tf.int32),
            )
            losses.append(np.asarray(loss, np.float64))
            correct += float(right)
        return np.concatenate(losses), correct

    def _chunks(self, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        step_bytes = max(1, shape[1] * self._data.mean.size * 4)
        size = max(1, _CHUNK_BYTES // step_bytes)
        for start in range(0, shape[0], size):
            yield start, min(start + size, shape[0])

    def validate(self) -> tuple[float, float]:
        """(summed loss, correct) over this worker's part of the validation split, view 0."""
        import tensorflow as tf

        loss, correct = 0.0, 0.0
        features, labels = self._data.valid
        start, stop = even_split(labels.size, self._place)
        for at in range(start, stop, 8192):
            rows = slice(at, min(at + 8192, stop))
            batch_loss, batch_correct = self._validate(
                tf.constant(np.asarray(features[rows, 0])), tf.constant(labels[rows])
            )
            loss, correct = loss + float(batch_loss), correct + float(batch_correct)
        return loss, correct

    def sum_over_workers(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        import tensorflow as tf

        if self._place.workers == 1:
            return values
        local = self._strategy.run(lambda: tf.constant(values, tf.float64))
        return np.asarray(self._strategy.reduce(tf.distribute.ReduceOp.SUM, local, axis=None))

    def _logits(self, features: "tf.Tensor", masks: "list[tf.Tensor] | None") -> "tf.Tensor":
        import tensorflow as tf

        x = (tf.cast(features, tf.float32) - self._data.mean) / self._data.deviation
        for i, layer in enumerate(self._layers[:-1]):
            x = tf.nn.relu(layer(x))
            if masks is not None:
                x *= masks[i]
        return self._layers[-1](x)

    def _compile(
        self, settings: HeadSettings, *, num_classes: int, seed: int
    ) -> "Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]":
        """The function that takes a chunk of steps inside one graph."""
        import tensorflow as tf

        smoothing, batch = settings.label_smoothing, self._batch

        def masks(step: "tf.Tensor") -> "list[tf.Tensor] | None":
            if not settings.dropout:
                return None
            # Drawn for the whole global batch and cut to this worker's rows: the same example
            # gets the same mask however many workers there are.
            drawn = []
            for i, width in enumerate(settings.units):
                noise = tf.random.stateless_uniform([batch, width], [seed + 1_000_003 * i, step])
                mine = noise[self._start : self._stop]
                kept = tf.cast(mine >= settings.dropout, tf.float32)
                drawn.append(kept / (1.0 - settings.dropout))
            return drawn

        def step_fn(
            features: "tf.Tensor", labels: "tf.Tensor", step: "tf.Tensor"
        ) -> "tuple[tf.Tensor, tf.Tensor]":
            targets = tf.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
            with tf.GradientTape() as tape:
                logits = self._logits(features, masks(step))
                losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
                # Keras 3's optimizers sum gradients over the workers, so the worker's part is
                # divided by the global batch and not by its own rows.
                loss = tf.reduce_sum(losses * tf.gather(self._weights, labels)) / batch
            gradients = tape.gradient(loss, self._variables)
            self._optimizer.apply(gradients, self._variables)
            right = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), labels)
            # A relu turns NaN into 0 on CPUs: broken features or weights leave the loss finite
            # and show only in the gradients.
            loss += 0.0 * tf.linalg.global_norm(gradients)
            return loss, tf.reduce_sum(tf.cast(right, tf.float32))

        rows, width = self._stop - self._start, self._data.mean.size

        def run_steps(
            features: "tf.Tensor", labels: "tf.Tensor", first_step: "tf.Tensor"
        ) -> "tuple[tf.Tensor, tf.Tensor]":
            count = tf.shape(features)[0]
            losses = tf.TensorArray(tf.float32, size=count)
            correct = tf.constant(0.0)
            for i in tf.range(count):
                loss, right = self._strategy.run(
                    step_fn,
                    args=(
                        tf.ensure_shape(features[i], [rows, width]),
                        tf.ensure_shape(labels[i], [rows]),
                        first_step + i,
                    ),
                )
                losses = losses.write(i, loss)
                correct += right
            return losses.stack(), correct

        return tf.function(run_steps, reduce_retracing=True)  # type: ignore[no-any-return]

    def _compile_validation(
        self,
    ) -> "Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]":
        import tensorflow as tf

        def validate(features: "tf.Tensor", labels: "tf.Tensor") -> "tuple[tf.Tensor, tf.Tensor]":
            logits = self._logits(features, None)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            right = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), labels)
            return tf.reduce_sum(losses), tf.reduce_sum(tf.cast(right, tf.float32))

        return tf.function(validate, reduce_retracing=True)  # type: ignore[no-any-return]


def _dense(kernel: NDArray[np.float32], bias: NDArray[np.float32]) -> "keras.layers.Dense":
    import keras

    layer = keras.layers.Dense(kernel.shape[1], dtype="float32")
    layer.build((None, kernel.shape[0]))
    layer.set_weights([kernel, bias])
    return layer
