"""Fine-tuning: the last stages of the network and the head, on augmented photographs.

The head was fitted on frozen features before (linear probing, then fine-tuning: Kumar et al. 2022,
arXiv:2202.10054): a head that starts at random would pull the features out of shape. What is judged
and published is the average of the weights over steps (EMA).

The rate is relative to each variable's root mean square, as in Adafactor, and lower the further a
stage is from the head. BatchNorm is folded into the kernels, whose scales then differ by a factor
of 6 within a stage and 40 between stages: with one rate for all, a step of AdamW at 3e-4 was 6 % of
some kernels and 0.1 % of others, and the first epoch ruined the features.

`fine_tune` runs in every worker, as `head.fit.fit_head` does and by the same rules: order, views
and mixing are functions of the seed and the position, gradients are summed over the workers before
they are clipped, so that all take the same steps, and between two pieces of about a second the
state can be saved, and the workers can be asked to leave.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leafnet.core.errors import UserError
from leafnet.distributed.worker import Hooks, Leaving, Place, even_split
from leafnet.models import resnet, runtime
from leafnet.models.classifier import Head
from leafnet.models.weights import stage_of
from leafnet.training.finetune import augment
from leafnet.training.finetune.augment import Augmentation
from leafnet.training.finetune.pixels import Photographs, streamed_order
from leafnet.training.finetune.state import Array, Arrays, Convolutions, TuneState
from leafnet.training.loop import (
    Clock,
    Report,
    Saving,
    Steps,
    balanced_weights,
    epoch_order,
    refuse_non_finite,
)
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


def fine_tune(
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
    report: Report,
    advance: Callable[[int], None],
    saving: Saving[TuneState] | None = None,
    hooks: Hooks | None = None,
    state: TuneState | None = None,
) -> TuneState:
    """Train the last stages and the head under `tf.distribute`, also from inside an epoch.

    Args:
        data: the same on every worker.
        weights: of the whole network, folded.
        head: fitted, on standardised features.
        settings: `batch_size` is the global batch.
        class_weights: `none` or `balanced`, as the head was fitted.
        precision: of convolutions.
        image_size: of the photographs, and what validation and the published network look at.
        num_classes: C.
        seed: of order, views and mixing.
        place: of this worker.
        report: called after each epoch.
        advance: called with counts of examples of the global batch.
        saving: when and how the state is saved; none: never.
        hooks: how it is followed, and asked to stop.
        state: to go on from.

    Returns:
        The state after the last epoch, on every worker.

    Raises:
        UserError: the loss is not finite, with the steps; a batch that cannot be shared out.
        Leaving: on every worker, after one was asked to leave and the state was saved.
    """
    hooks = hooks or Hooks()
    # They may still be decoding on other machines.
    hooks.long("building the network, which waits for the other workers")
    examples, valid = data.train.labels.size, data.valid.labels.size
    batch = min(settings.batch_size, examples)
    check_batch(settings, examples=examples, workers=place.workers)
    steps = Steps.of(examples, batch, settings.epochs).per_epoch
    tuner = _Tuner(
        data,
        weights=weights,
        head=head,
        settings=settings,
        class_weights=class_weights,
        precision=precision,
        image_size=image_size,
        num_classes=num_classes,
        seed=seed,
        place=place,
        batch=batch,
        steps=steps,
    )

    def validate(what: str, *, may_leave: bool) -> tuple[float, float, bool]:
        def goes_on(done: int) -> bool:
            hooks.doing(f"validating {what}, {done:,} photographs of this worker are done")
            return not (may_leave and hooks.leave())

        return tuner.validate(goes_on)

    if state:
        tuner.restore(state)
    else:
        state = tuner.state()
        if valid:
            mine = validate("the head alone", may_leave=False)
            loss, correct, _ = tuner.sum_over_workers(np.array(mine, np.float64)).tolist()
            state.head_alone = {"valid_loss": loss / valid, "valid_accuracy": correct / valid}
            state.best_loss = loss / valid
    advance(state.step * batch)
    clock = Clock(saving, steps, first=1)
    with closing(runtime.ahead(tuner.batches(state.step), depth=3)) as batches:
        while not finished(state, settings):
            epoch, first = state.epoch, state.step
            left, piece = (epoch + 1) * steps - first, 0
            if left:
                piece = clock.piece(first, epoch, most=left)
                hooks.doing(f"fine-tuning, epoch {epoch + 1}, step {first + 1} to {first + piece}")
                found = tuner.train(batches, first, piece, advance)
                # At the end of an epoch it is saved once that is validated.
                due = piece < left and clock.due(first + piece, ends=False)
            else:
                found = list(validate(f"epoch {epoch + 1}", may_leave=True))
                due = clock.due(first, ends=True)
            asked = [due and place.rank == 0, hooks.leave()]
            # One sum over the workers: every worker then sees, and decides, the same.
            sums = tuner.sum_over_workers(np.array([*found, *asked], np.float64))
            found, (due_sum, leave_sum) = sums[:-2].tolist(), sums[-2:]
            if left:
                hooks.started()
                *losses, correct, taken, waited = found
                refuse_non_finite(
                    np.array(losses),
                    first_step=first,
                    epoch=epoch,
                    mend="--fine_tune.learning_rate",
                )
                clock.took(taken / place.workers / piece)
                state.step = first + piece
                state.losses = np.concatenate([state.losses, losses])
                state.correct += correct
                state.seconds += taken / place.workers
                state.waited += waited / place.workers
            elif not found[2]:
                loss, correct, _ = found
                judged = {}
                if valid:
                    judged = {"valid_loss": loss / valid, "valid_accuracy": correct / valid}
                _end_epoch(state, tuner, examples=steps * batch, valid=judged)
                report(state.history[-1])
            over = finished(state, settings)
            if due_sum or leave_sum or over:
                began = time.monotonic()
                hooks.doing(f"saving the state after step {state.step}")
                tuner.put_into(state)
                if saving:
                    saving.save(state if place.rank == 0 else None)
                clock.saved(time.monotonic() - began)
            if leave_sum and not over:
                raise Leaving(f"after step {state.step}")
    return state


def _end_epoch(
    state: TuneState, tuner: "_Tuner", *, examples: int, valid: dict[str, float]
) -> None:
    """Add the epoch whose steps are taken to the history, and keep its weights if it is the best.

    Args:
        state: after the last step of the epoch.
        tuner: with the weights as they are then.
        examples: that the epoch has learnt from.
        valid: `valid_loss` and `valid_accuracy`; empty without a validation split.
    """
    row = {
        "epoch": state.epoch + 1,
        "step": state.step,
        "learning_rate": tuner.rate(state.step - 1),
        "train_loss": float(state.losses.mean()),
        "train_accuracy": state.correct / examples,
        **valid,
        "images_per_s": examples / state.seconds,
        "waited": state.waited / state.seconds,
        # Without a validation split the last epoch is as good a choice as any.
        "best": float(not valid or valid["valid_loss"] < state.best_loss),
    }
    state.epoch += 1
    state.losses, state.correct, state.seconds, state.waited = np.empty(0), 0.0, 0.0, 0.0
    if row["best"]:
        state.best_epoch, state.best = state.epoch, tuner.average()
        state.best_loss = row.get("valid_loss", math.inf)
    state.history.append(row)


def check_batch(settings: FineTuneSettings, *, examples: int, workers: int) -> None:
    """Refuse a global batch that the workers cannot share out.

    Raises:
        UserError: there are too few examples for each worker, or pairs would be cut.
    """
    batch, mixes = min(settings.batch_size, examples), _mixes(settings)
    if batch < workers or (mixes and batch % (2 * workers)):
        wanted = f"a multiple of {2 * workers}" if mixes else f"at least {workers}"
        raise UserError(
            "batch-too-small",
            f"a global batch of {batch} cannot be shared out among {workers} workers"
            + (", whose examples are mixed in pairs" if mixes else "")
            + f"; give {wanted} with --fine_tune.batch_size",
        )


def measured_rate(
    *,
    weights: Convolutions,
    head: Head,
    settings: FineTuneSettings,
    precision: str,
    image_size: int,
    steps: int,
    seconds: float,
) -> float:
    """Examples a second that one worker learns from by itself, on blank photographs.

    Args:
        weights: of the whole network, folded.
        head: of the shape that the run's will have.
        settings: `batch_size` is what the worker has of a global batch.
        precision: of convolutions.
        image_size: of the photographs.
        steps: taken at most after the first, which compiles.
        seconds: that they take, more or less.
    """
    batch = settings.batch_size
    blank = np.zeros((batch, image_size, image_size, 3), np.uint8)
    data = Photographs(np.zeros(batch, np.int32), lambda rows: blank[rows])
    width = head[0][0].shape[0]
    tuner = _Tuner(
        TuningData(data, data, np.zeros(width, np.float32), np.ones(width, np.float32)),
        weights=weights,
        head=head,
        settings=settings.model_copy(update={"epochs": 1 + steps}),
        class_weights="none",
        precision=precision,
        image_size=image_size,
        num_classes=head[-1][1].size,
        seed=0,
        place=Place(0, 1),
        batch=batch,
        steps=1,
    )
    batches = tuner.batches(0)
    tuner.train(batches, 0, 1, lambda count: None)
    began, taken = time.monotonic(), 0
    while taken < steps and (taken == 0 or time.monotonic() - began < seconds):
        tuner.train(batches, 1 + taken, 1, lambda count: None)
        taken += 1
    return taken * batch / (time.monotonic() - began)


def _mixes(settings: FineTuneSettings) -> bool:
    return settings.mixup > 0 or settings.cutmix > 0


def finished(state: TuneState, settings: FineTuneSettings) -> bool:
    """True when no epoch is left, or validation has not improved for too long."""
    if state.epoch >= settings.epochs:
        return True
    waited = state.epoch - state.best_epoch
    return settings.patience is not None and waited >= settings.patience


class _Trained(NamedTuple):
    """A variable with what its updates need."""

    variable: "tf.Variable"
    first: "tf.Variable"
    second: "tf.Variable"
    average: "tf.Variable"
    share: float  # of the rate: the variable's own scale, less the further it is from the head
    decay: float  # a step, as a share of the rate


class _Tuner:
    """The variables, the optimizer and the compiled steps of one worker.

    Variables are plain ones of each process and not those of the strategy: it sums the gradients,
    and every worker applies the same sum to equal numbers.
    """

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
        batch: int,
        steps: int,
    ) -> None:
        import tensorflow as tf

        self._data, self._settings, self._place = data, settings, place
        self._seed, self._batch, self._steps = seed, batch, steps
        self._num_classes = num_classes
        self._start, self._stop = even_split(batch, place)
        self._mixes = _mixes(settings)
        if self._mixes:
            pairs = even_split(batch // 2, place)
            self._start, self._stop = 2 * pairs[0], 2 * pairs[1]
        self._strategy = tf.distribute.get_strategy()
        if place.workers > 1:
            self._strategy = tf.distribute.MultiWorkerMirroredStrategy()
        self._weights = np.ones(num_classes, np.float32)
        if class_weights == "balanced":
            self._weights = balanced_weights(data.train.labels, num_classes)
        self._total = settings.epochs * steps
        self._warmup = min(round(settings.warmup_epochs * steps), self._total - 1)
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

        found = {}
        for layer in self._parts.trained.layers:
            if layer.weights:
                found[f"{layer.name}/kernel"] = layer.kernel.value
                found[f"{layer.name}/bias"] = layer.bias.value
        for i, (kernel, bias) in enumerate(head):
            found[f"head/{i}/kernel"] = tf.Variable(kernel)
            found[f"head/{i}/bias"] = tf.Variable(bias)
        settings = self._settings
        variables = {}
        for name, variable in found.items():
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

    def train(
        self, batches: Iterator[Batch], first: int, count: int, advance: Callable[[int], None]
    ) -> list[float]:
        """Take `count` steps from `first` on, with the next of `batches`.

        Returns:
            This worker's share of the loss of each step, then how many were correct, the seconds
            that it took, and how many of them were without a batch.
        """
        import tensorflow as tf

        losses, correct, waited = [], 0.0, 0.0
        began = time.monotonic()
        for step in range(first, first + count):
            asked = time.monotonic()
            batch = next(batches)
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
            advance(self._batch)
        return [*losses, correct, time.monotonic() - began, waited]

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

    def validate(self, goes_on: Callable[[int], bool]) -> tuple[float, float, bool]:
        """How the averaged weights do on this worker's validation examples.

        Args:
            goes_on: called for each batch with the count of examples before it; False: give up.

        Returns:
            The summed loss, how many are correct, and True where it was given up.
        """
        loss, correct = 0.0, 0.0
        start, stop = even_split(self._data.valid.labels.size, self._place)
        with self._averaged():
            for at, maps in zip(range(start, stop, _VALID_BATCH), self._maps(), strict=True):
                if not goes_on(at - start):
                    return loss, correct, True
                labels = self._data.valid.labels[at : min(at + _VALID_BATCH, stop)]
                of_batch, right = self._of_maps(maps, labels)
                loss, correct = loss + float(of_batch), correct + float(right)
        return loss, correct, False

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

    def sum_over_workers(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        import tensorflow as tf

        if self._place.workers == 1:
            return values
        local = self._strategy.run(lambda: tf.constant(values, tf.float64))
        return np.asarray(self._strategy.reduce(tf.distribute.ReduceOp.SUM, local, axis=None))

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
