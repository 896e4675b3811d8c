"""What fine-tuning trains: the variables, the optimizer and the compiled steps of one worker."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leafnet.distributed.worker import Place, even_split
from leafnet.models import resnet
from leafnet.models.classifier import Head
from leafnet.models.weights import stage_of
from leafnet.training import loop
from leafnet.training.finetune import augment
from leafnet.training.finetune.augment import Augmentation
from leafnet.training.finetune.pixels import Photographs, streamed_order
from leafnet.training.finetune.state import Array, Arrays, Convolutions, TuneState
from leafnet.training.loop import Steps, Trained, Validated, Workers, epoch_order
from leafnet.training.settings import FineTuneSettings

if TYPE_CHECKING:
    import tensorflow as tf

Batch = tuple[NDArray[Any], ...]  # pixels, draws, mixing, labels

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-7

# Scale of a variable that is smaller or 0 at the start (Shazeer and Stern 2018, arXiv:1804.04235).
_SMALLEST = 1e-3

_VALID_BATCH = 32

# What the frozen part makes of validation photographs is kept by a worker up to so many bytes.
_KEPT_BYTES = 2**30


class TuningData(NamedTuple):
    """What is learnt from, the same on every worker, and what the head was fitted on."""

    train: Photographs
    valid: Photographs
    mean: Array  # [D] of the features that the head was fitted on
    deviation: Array  # [D]


def rate_at(step: int, *, peak: float, warmup: int, total: int) -> float:
    """The rate of a step: up in a straight line, then a cosine to 0 at the end.

    >>> [round(rate_at(step, peak=1.0, warmup=2, total=6), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def mixes(settings: FineTuneSettings) -> bool:
    """True when examples are mixed in pairs."""
    return settings.mixup > 0 or settings.cutmix > 0


class _Trained(NamedTuple):
    """A variable with what its updates need."""

    variable: "tf.Variable"
    first: "tf.Variable"
    second: "tf.Variable"
    average: "tf.Variable"
    share: float  # of the rate: the variable's own scale, less the further it is from the head
    decay: float  # a step, as a share of the rate


class Tuner:
    """The variables, the optimizer and the compiled steps of one worker.

    Variables are plain ones of each process and not those of the strategy: it sums the gradients,
    and every worker applies the same sum to equal numbers.
    """

    verb, rate_setting = "fine-tuning", "--fine_tune.learning_rate"
    feed: Iterator[Batch]  # of the steps to come, as `batches` gives them

    def __init__(
        self,
        data: TuningData,
        *,
        weights: Convolutions,
        head: Head,
        settings: FineTuneSettings,
        class_weights: str,
        precision: str,
        image_size: int,
        num_classes: int,
        seed: int,
        place: Place,
        steps: Steps,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.workers, self.valid_examples = Workers(place), data.valid.labels.size
        self._data, self._settings, self._place = data, settings, place
        self._seed, self._batch, self._steps = seed, steps.batch, steps.per_epoch
        self._num_classes, self._advance = num_classes, advance
        self._mixes = mixes(settings)
        self._start, self._stop = even_split(steps.batch, place)
        if self._mixes:
            pairs = even_split(steps.batch // 2, place)
            self._start, self._stop = 2 * pairs[0], 2 * pairs[1]
        self._strategy = self.workers.strategy
        self._weights = loop.class_weights(class_weights, data.train.labels, num_classes)
        self._total = steps.total
        self._warmup = min(round(settings.warmup_epochs * steps.per_epoch), self._total - 1)
        assert settings.blocks != 0
        self._parts = resnet.build_parts(weights, precision=precision, blocks=settings.blocks)
        self._how = Augmentation(
            size=image_size if settings.crop_size == "auto" else settings.crop_size,
            crop=settings.crop,
            brightness=settings.brightness,
            colour=settings.colour,
        )
        self._variables = self._make_variables(head)
        self._step = self._compile()
        self._frozen_maps, self._of_maps = self._compile_validation()
        self._valid_maps: list[tf.Tensor] | None = None

    def _make_variables(self, head: Head) -> dict[str, _Trained]:
        import tensorflow as tf

        tensors = {}
        for layer in self._parts.trained.layers:
            if layer.weights:
                tensors[f"{layer.name}/kernel"] = layer.kernel.value
                tensors[f"{layer.name}/bias"] = layer.bias.value
        for i, (kernel, bias) in enumerate(head):
            tensors[f"head/{i}/kernel"] = tf.Variable(kernel)
            tensors[f"head/{i}/bias"] = tf.Variable(bias)
        settings = self._settings
        variables = {}
        for name, variable in tensors.items():
            below = 0 if name.startswith("head/") else 5 - stage_of(name)
            share = settings.layer_decay**below
            variables[name] = _Trained(
                variable,
                first=tf.Variable(tf.zeros_like(variable)),
                second=tf.Variable(tf.zeros_like(variable)),
                average=tf.Variable(variable.read_value()),
                share=share * max(_root_mean_square(variable), _SMALLEST),
                decay=0.0 if name.endswith("/bias") else share * settings.weight_decay,
            )
        return variables

    def rate(self, step: int) -> float:
        """The rate of the last stage and the head at `step`."""
        return rate_at(
            step, peak=self._settings.learning_rate, warmup=self._warmup, total=self._total
        )

    def average(self) -> Arrays:
        """A copy of the averaged weights."""
        return {name: one.average.numpy() for name, one in self._variables.items()}

    def state(self) -> TuneState:
        """A state at the start."""
        average = self.average()
        return TuneState(0, 0, average, {}, {}, average, average, 0, math.inf, {})

    def put_into(self, state: TuneState) -> None:
        """Copy the variables into `state`."""
        for group in ("weights", "first", "second", "average"):
            of_group = {
                name: getattr(one, "variable" if group == "weights" else group).numpy()
                for name, one in self._variables.items()
            }
            setattr(state, group, of_group)

    def restore(self, state: TuneState) -> None:
        for name, one in self._variables.items():
            one.variable.assign(state.weights[name])
            one.first.assign(state.first[name])
            one.second.assign(state.second[name])
            one.average.assign(state.average[name])

    @property
    def most_steps(self) -> int:
        return sys.maxsize  # each takes its batch by itself

    def end_epoch(self, state: TuneState, row: dict[str, float], *, best: bool) -> None:
        examples = state.losses.size * self._batch
        row["images_per_s"] = examples / state.seconds
        row["waited"] = state.waited / state.seconds
        row["best"] = float(best)
        if best:
            state.best = self.average()

    def train(self, first: int, count: int) -> Trained:
        """Take `count` steps from `first` on, with the next batches of `feed`."""
        import tensorflow as tf

        losses, correct, waited = [], 0.0, 0.0
        for step in range(first, first + count):
            asked = time.monotonic()
            batch = next(self.feed)
            waited += time.monotonic() - asked
            decay = min(self._settings.ema, (1 + step) / (10 + step))
            loss, right = self._step(
                *map(tf.constant, batch),
                tf.constant(self.rate(step), tf.float32),
                tf.constant(decay, tf.float32),
                tf.constant(step + 1, tf.float32),
            )
            losses.append(float(loss))
            correct += float(right)
            self._advance(self._batch)
        return Trained(np.array(losses), correct, waited)

    def batches(self, first: int) -> Iterator[Batch]:
        """This worker's rows of each step from `first` on, to the end of the last epoch."""
        train, seed = self._data.train, self._seed
        for epoch in range(first // self._steps, self._settings.epochs):
            if train.shard_rows:
                order = streamed_order(train.shard_rows, seed=seed, epoch=epoch)
            else:
                order = epoch_order(train.labels.size, seed=seed, epoch=epoch)
            for step in range(max(0, first - epoch * self._steps), self._steps):
                at = step * self._batch
                rows = order[at + self._start : at + self._stop]
                pairs = np.zeros(0, np.int64)
                if self._mixes:
                    of_step = step * (self._batch // 2)
                    pairs = np.arange(of_step + self._start // 2, of_step + self._stop // 2)
                yield (
                    train.gather(rows),
                    augment.draw(rows, seed=seed, epoch=epoch),
                    augment.draw_mixing(
                        pairs,
                        seed=seed,
                        epoch=epoch,
                        mixup=self._settings.mixup,
                        cutmix=self._settings.cutmix,
                    ),
                    train.labels[rows],
                )

    def validate(self, goes_on: Callable[[int], bool]) -> Validated:
        """Judge the averaged weights."""
        loss, correct = 0.0, 0.0
        start, stop = even_split(self._data.valid.labels.size, self._place)
        with self._averaged():
            for at, maps in zip(range(start, stop, _VALID_BATCH), self._maps(), strict=True):
                if not goes_on(at - start):
                    return Validated(loss, correct, given_up=True)
                labels = self._data.valid.labels[at : min(at + _VALID_BATCH, stop)]
                of_batch, right = self._of_maps(maps, labels)
                loss, correct = loss + float(of_batch), correct + float(right)
        return Validated(loss, correct)

    def _maps(self) -> "Iterator[tf.Tensor]":
        """What the frozen part makes of this worker's validation photographs, batch by batch."""
        if self._valid_maps is not None:
            yield from self._valid_maps
            return
        kept: list[tf.Tensor] = []
        size = 0
        start, stop = even_split(self._data.valid.labels.size, self._place)
        for at in range(start, stop, _VALID_BATCH):
            rows = np.arange(at, min(at + _VALID_BATCH, stop))
            maps = self._frozen_maps(self._data.valid.gather(rows))
            size += int(np.prod(maps.shape)) * maps.dtype.size
            if size <= _KEPT_BYTES:
                kept.append(maps)
            yield maps
        if size <= _KEPT_BYTES:
            self._valid_maps = kept

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of those of the last step."""
        held = []
        for one in self._variables.values():
            held.append(one.variable.read_value())
            one.variable.assign(one.average)
        try:
            yield
        finally:
            for one, value in zip(self._variables.values(), held, strict=True):
                one.variable.assign(value)

    def _logits(self, maps: "tf.Tensor") -> "tf.Tensor":
        import tensorflow as tf

        features = self._parts.trained(maps, training=False)
        x = (features - self._data.mean) / self._data.deviation
        layers = sum(name.startswith("head/") for name in self._variables) // 2
        for i in range(layers):
            kernel = self._variables[f"head/{i}/kernel"].variable
            x = tf.matmul(x, kernel) + self._variables[f"head/{i}/bias"].variable
            if i < layers - 1:
                x = tf.nn.relu(x)
        return x

    def _compile(self) -> Callable[..., tuple["tf.Tensor", "tf.Tensor"]]:
        """The function that takes one step."""
        import tensorflow as tf

        settings, smoothing = self._settings, self._settings.label_smoothing
        trained = list(self._variables.values())

        def step_fn(
            pixels: "tf.Tensor",
            draws: "tf.Tensor",
            mixing: "tf.Tensor",
            labels: "tf.Tensor",
            rate: "tf.Tensor",
            decay: "tf.Tensor",
            count: "tf.Tensor",
        ) -> "tuple[tf.Tensor, tf.Tensor]":
            views = augment.augment(pixels, draws, self._how)
            targets = tf.one_hot(labels, self._num_classes)
            if self._mixes:
                views, targets = augment.mix(views, targets, mixing)
            importance = tf.linalg.matvec(targets, self._weights)
            targets = targets * (1 - smoothing) + smoothing / self._num_classes
            maps = self._parts.frozen(views, training=False)
            with tf.GradientTape() as tape:
                logits = self._logits(maps)
                losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
                # The sum over the workers follows: each divides by the global batch.
                loss = tf.reduce_sum(losses * importance) / self._batch
            gradients = tape.gradient(loss, [one.variable for one in trained])
            replica = tf.distribute.get_replica_context()
            gradients = replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
            gradients, norm = tf.clip_by_global_norm(gradients, settings.clip_norm)
            for one, gradient in zip(trained, gradients, strict=True):
                _adamw(one, gradient, rate=rate, count=count)
                one.average.assign_sub((1 - decay) * (one.average - one.variable))
            right = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), labels)
            # A relu turns NaN into 0 on CPUs: broken weights leave the loss finite and show only
            # in the gradients.
            return loss + 0.0 * norm, tf.reduce_sum(tf.cast(right, tf.float32))

        def step(*args: "tf.Tensor") -> Any:
            return self._strategy.run(step_fn, args=args)

        return tf.function(step)  # type: ignore[no-any-return]

    def _compile_validation(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        import tensorflow as tf

        def frozen_maps(pixels: "tf.Tensor") -> "tf.Tensor":
            return self._parts.frozen(tf.cast(pixels, tf.float32), training=False)

        def of_maps(maps: "tf.Tensor", labels: "tf.Tensor") -> "tuple[tf.Tensor, tf.Tensor]":
            logits = self._logits(maps)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            right = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), labels)
            return tf.reduce_sum(losses), tf.reduce_sum(tf.cast(right, tf.float32))

        return (
            tf.function(frozen_maps, reduce_retracing=True),
            tf.function(of_maps, reduce_retracing=True),
        )


def _adamw(one: _Trained, gradient: "tf.Tensor", *, rate: "tf.Tensor", count: "tf.Tensor") -> None:
    """A step of AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), `count` from 1.

    TensorFlow's own kernel of Adam reads and writes each array once.
    """
    import tensorflow as tf

    if one.decay:
        one.variable.assign(one.variable * (1 - rate * one.decay))
    tf.raw_ops.ResourceApplyAdam(
        var=one.variable.handle,
        m=one.first.handle,
        v=one.second.handle,
        beta1_power=tf.pow(_BETA_1, count),
        beta2_power=tf.pow(_BETA_2, count),
        lr=rate * one.share,
        beta1=_BETA_1,
        beta2=_BETA_2,
        epsilon=_EPSILON,
        grad=gradient,
    )


def _root_mean_square(variable: "tf.Variable") -> float:
    return float(np.sqrt(np.square(variable.numpy()).mean()))
