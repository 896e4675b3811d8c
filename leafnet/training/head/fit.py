"""Fitting the head: its data, schedule, optimizer and train step; the loop is `training.loop`."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from leafnet.core.errors import UserError
from leafnet.distributed.worker import Hooks, Place, even_split
from leafnet.features.cache import SplitFeatures
from leafnet.features.moments import BLOCK, Features
from leafnet.models.classifier import Head, initial_head
from leafnet.training import loop
from leafnet.training.head.state import TrainState
from leafnet.training.loop import (
    Report,
    Saving,
    Steps,
    Trained,
    Validated,
    Workers,
    class_weights,
    epoch_order,
)
from leafnet.training.settings import HeadSettings

if TYPE_CHECKING:
    import keras
    import tensorflow as tf


# The features that a worker copies out of the memory map at a time, in bytes.
_PIECE_BYTES = 16 * 2**20

# (indices of examples [M], epoch) -> features [M, D] of the view that this epoch takes of each.
Gather = Callable[[NDArray[np.int64], int], NDArray[np.floating]]

# (features [S, rows, D], labels [S, rows], first step) -> (loss [S], correct) of S steps.
_RunSteps = Callable[["tf.Tensor", "tf.Tensor", "tf.Tensor"], tuple["tf.Tensor", "tf.Tensor"]]


@dataclass(frozen=True)
class TrainingData:
    """What the head is fitted on."""

    gather: Gather
    labels: NDArray[np.int32]  # [N] of the training split
    valid: SplitFeatures
    mean: NDArray[np.float32]  # [D] of the training features
    deviation: NDArray[np.float32]  # [D]


def epoch_views(count: int, views: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The view [count] of each example that `epoch` learns from."""
    return np.random.default_rng([seed, epoch, 1]).integers(0, views, count)


def cached_views(features: Features, *, seed: int) -> Gather:
    """Gather from the memory map `features` [N, K, D], a random view of each example an epoch."""

    # Kept for the pieces of an epoch: at 80 million examples a draw takes a second.
    @functools.lru_cache(maxsize=1)
    def views_of(epoch: int) -> NDArray[np.int64]:
        return epoch_views(features.shape[0], features.shape[1], seed=seed, epoch=epoch)

    def gather(indices: NDArray[np.int64], epoch: int) -> NDArray[np.floating]:
        return features[indices, views_of(epoch)[indices]]

    return gather


def fit_head(
    data: TrainingData,
    *,
    settings: HeadSettings,
    num_classes: int,
    seed: int,
    place: Place,
    report: Report,
    saving: Saving[TrainState] | None = None,
    hooks: Hooks | None = None,
    state: TrainState | None = None,
) -> TrainState:
    """Fit the head under `tf.distribute`, from `state` when there is one, also inside an epoch.

    Args:
        data: the same on every worker.
        settings: of the head; `batch_size` is the global batch.
        num_classes: C.
        seed: of initial weights, order, views and dropout.
        place: of this worker.
        report: called after each epoch.
        saving: when and how the state is saved; none: never.
        hooks: how the fit is followed, and asked to stop.
        state: to go on from.

    Returns:
        The state after the last epoch, on every worker.

    Raises:
        UserError: the loss is not finite, with the steps where it happened.
        Leaving: on every worker, after one was asked to leave and the state was saved.
    """
    hooks = hooks or Hooks()
    steps = Steps.of(data.labels.size, settings.batch_size, settings.epochs)
    check_batch(steps.batch, workers=place.workers)
    hooks.doing("building the head, which waits for the other workers")
    learner = _Learner(
        state.head
        if state
        else initial_head(settings.units, num_classes, inputs=data.mean.size, seed=seed),
        data=data,
        settings=settings,
        num_classes=num_classes,
        seed=seed,
        place=place,
        steps=steps,
    )
    if state:
        learner.restore_optimizer(state.optimizer)
    else:
        head = learner.head()
        state = TrainState(
            epoch=0,
            step=0,
            head=head,
            optimizer=learner.optimizer_arrays(),
            best_head=head,
            best_epoch=0,
            best_loss=math.inf,
        )
    return loop.fit(
        learner,
        state,
        steps=steps,
        patience=settings.patience,
        report=report,
        saving=saving,
        hooks=hooks,
    )


def check_batch(batch: int, *, workers: int) -> None:
    """Refuse a global batch that leaves a worker without an example.

    Raises:
        UserError: there are more workers than examples in it.
    """
    if batch < workers:
        raise UserError(
            "batch-too-small",
            f"a global batch of {batch} cannot be shared out among {workers} workers; "
            "raise --head.batch_size or lower --workers",
        )


class _Learner:
    """The variables, the optimizer and the compiled steps of one worker."""

    verb, rate_setting = "training", "--head.learning_rate"

    def __init__(
        self,
        head: Head,
        *,
        data: TrainingData,
        settings: HeadSettings,
        num_classes: int,
        seed: int,
        place: Place,
        steps: Steps,
    ) -> None:
        import keras

        self.workers, self.valid_examples = Workers(place), data.valid.labels.size
        self._data, self._place, self._seed = data, place, seed
        self._epoch_steps, self._batch = steps.per_epoch, steps.batch
        self._start, self._stop = even_split(steps.batch, place)
        self._strategy = self.workers.strategy
        self._weights = class_weights(settings.class_weights, data.labels, num_classes)
        warmup = min(round(settings.warmup_epochs * steps.per_epoch), steps.total - 1)
        # Kept for the pieces of an epoch: at 80 million examples a draw takes a second.
        self._order_of = functools.lru_cache(maxsize=1)(self._draw_order)
        with self._strategy.scope():
            self._layers = [_dense(kernel, bias) for kernel, bias in head]
            self._variables = [v for layer in self._layers for v in layer.trainable_variables]
            self._schedule = keras.optimizers.schedules.CosineDecay(
                0.0 if warmup else settings.learning_rate,
                decay_steps=steps.total - warmup,
                warmup_target=settings.learning_rate if warmup else None,
                warmup_steps=warmup,
            )
            self._optimizer = keras.optimizers.AdamW(
                self._schedule, weight_decay=settings.weight_decay
            )
            self._optimizer.exclude_from_weight_decay(var_names=["bias"])
            self._optimizer.build(self._variables)
        self._steps = self._step_loop(settings, num_classes=num_classes, seed=seed)
        self._run_steps: _RunSteps | None = None
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

    def put_into(self, state: TrainState) -> None:
        state.head, state.optimizer = self.head(), self.optimizer_arrays()

    def rate(self, step: int) -> float:
        return float(self._schedule(step))

    def end_epoch(self, state: TrainState, row: dict[str, float], *, best: bool) -> None:
        if best:
            state.best_head = self.head()

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        """The examples [steps, batch] of an epoch."""
        order = epoch_order(self._data.labels.size, seed=self._seed, epoch=epoch)
        of_steps = order[: self._epoch_steps * self._batch]
        return of_steps.reshape(self._epoch_steps, self._batch)

    @property
    def most_steps(self) -> int:
        """Steps whose features fit into `_PIECE_BYTES`, on the worker with the most rows."""
        rows = -(-self._batch // self._place.workers)
        return max(1, _PIECE_BYTES // max(1, rows * self._data.mean.size * 4))

    def train(self, first: int, count: int) -> Trained:
        import tensorflow as tf

        epoch, done = divmod(first, self._epoch_steps)
        indices = self._order_of(epoch)[done : done + count, self._start : self._stop]
        features = self._data.gather(indices.reshape(-1), epoch)
        dtype = tf.float16 if features.dtype == np.float16 else tf.float32
        if self._run_steps is None:
            rows, width = indices.shape[1], self._data.mean.size
            # For any number of steps: without, each length of a piece would be compiled.
            self._run_steps = tf.function(
                self._steps,
                input_signature=[
                    tf.TensorSpec([None, rows, width], dtype),
                    tf.TensorSpec([None, rows], tf.int32),
                    tf.TensorSpec([], tf.int32),
                ],
            )
        loss, right = self._run_steps(
            tf.constant(features.reshape(*indices.shape, -1), dtype),
            tf.constant(self._data.labels[indices]),
            tf.constant(first, tf.int32),
        )
        return Trained(np.asarray(loss, np.float64), float(right))

    def validate(self, goes_on: Callable[[int], bool]) -> Validated:
        """Judge the head on view 0, which takes no time: it is not given up."""
        import tensorflow as tf

        loss, correct = 0.0, 0.0
        features, labels = self._data.valid
        start, stop = even_split(labels.size, self._place)
        for at in range(start, stop, BLOCK):
            rows = slice(at, min(at + BLOCK, stop))
            batch_loss, batch_correct = self._validate(
                tf.constant(np.asarray(features[rows, 0])), tf.constant(labels[rows])
            )
            loss, correct = loss + float(batch_loss), correct + float(batch_correct)
        return Validated(loss, correct)

    def _logits(self, features: "tf.Tensor", masks: "list[tf.Tensor] | None") -> "tf.Tensor":
        import tensorflow as tf

        x = (tf.cast(features, tf.float32) - self._data.mean) / self._data.deviation
        for i, layer in enumerate(self._layers[:-1]):
            x = tf.nn.relu(layer(x))
            if masks is not None:
                x *= masks[i]
        return self._layers[-1](x)

    def _step_loop(self, settings: HeadSettings, *, num_classes: int, seed: int) -> _RunSteps:
        """What takes a piece of steps inside one graph."""
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

        def run_steps(
            features: "tf.Tensor", labels: "tf.Tensor", first_step: "tf.Tensor"
        ) -> "tuple[tf.Tensor, tf.Tensor]":
            count = tf.shape(features)[0]
            losses = tf.TensorArray(tf.float32, size=count)
            correct = tf.constant(0.0)
            for i in tf.range(count):
                loss, right = self._strategy.run(
                    step_fn,
                    args=(features[i], labels[i], first_step + i),
                )
                losses = losses.write(i, loss)
                correct += right
            return losses.stack(), correct

        return run_steps

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
