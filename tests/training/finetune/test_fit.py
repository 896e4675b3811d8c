import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import ray
from numpy.typing import NDArray

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data import shards
from leafnet.data.images import decode
from leafnet.data.shards import ShardIndex
from leafnet.distributed import checkpoint
from leafnet.distributed.group import RestartPolicy
from leafnet.distributed.worker import Hooks, Leaving, Place
from leafnet.metrics import scores as metrics_scores
from leafnet.metrics.scores import tally
from leafnet.models import bundle, resnet
from leafnet.models.classifier import Head, head_logits, initial_head
from leafnet.models.weights import FEATURES, Weights, load_weights
from leafnet.training import loop
from leafnet.training.finetune import augment, worker
from leafnet.training.finetune import fit as finetune_fit
from leafnet.training.finetune import state as finetune_state
from leafnet.training.finetune import tuner as finetune_tuner
from leafnet.training.finetune.fit import (
    check_batch,
    fine_tune,
    measured_rate,
)
from leafnet.training.finetune.pixels import Photographs, open_split, streamed_order
from leafnet.training.finetune.state import (
    Arrays,
    Convolutions,
    TuneState,
    convolutions,
    initial_arrays,
    load,
)
from leafnet.training.finetune.tuner import Tuner, TuningData, _adamw, _Trained
from leafnet.training.loop import Clock, Saving, Steps, Trained, epoch_order
from leafnet.training.settings import FineTuneSettings, TrainSettings
from leafnet.training.train import run
from leafnet.training.worker import Placement
from tests.support.markup import check
from tests.training import test_tensorboard

ALONE = Place(0, 1)

# A network of five convolutions of one pixel, whose steps are redone below from the definitions.
CHANNELS = (3, 4, 5, 6, 7, 8)
TRAIN, VALID = 14, 70  # three batches of 4 and two left over; three batches to validate
SMALL = 6  # pixels


def tiny_weights() -> Convolutions:
    generator = np.random.default_rng(1)
    found = {}
    for stage, (inputs, filters) in enumerate(itertools.pairwise(CHANNELS), start=1):
        kernel = generator.normal(0.2, 1.0, (1, 1, inputs, filters)) / np.sqrt(inputs)
        kernel /= 100 if stage == 1 else 1
        bias = generator.normal(0, 0.1, filters)
        found[f"conv{stage}_conv"] = (kernel.astype(np.float32), bias.astype(np.float32))
    return found


def tiny_parts(weights: Convolutions, *, precision: str, blocks: int | str) -> resnet.Parts:
    """As `backbone.build_parts`, of a convolution a stage."""
    import keras

    first = 1 if blocks == "all" else 6 - int(blocks)

    def part(stages: range, name: str) -> tuple[Any, Any]:
        start = x = keras.Input((None, None, CHANNELS[stages.start - 1]), dtype=precision)
        for stage in stages:
            layer = keras.layers.Conv2D(
                CHANNELS[stage], 1, activation="relu", dtype=precision, name=f"conv{stage}_conv"
            )
            x = layer(x)
            layer.set_weights(weights[layer.name])
        return start, keras.ops.mean(x, axis=(1, 2)) if name == "trained" else x

    return resnet.Parts(
        *(
            keras.Model(*part(stages, name), name=name)
            for stages, name in ((range(1, first), "frozen"), (range(first, 6), "trained"))
        )
    )


def tiny_head() -> Head:
    head = initial_head((4,), 3, inputs=CHANNELS[-1], seed=0)
    return [(kernel, bias + 0.1 * np.arange(bias.size, dtype=np.float32)) for kernel, bias in head]


def tiny_data() -> TuningData:
    """Photographs of noise in the colour of their class, the classes of unequal counts."""
    generator = np.random.default_rng(2)

    def split(count: int) -> Photographs:
        labels = generator.choice(3, count, p=[0.5, 0.3, 0.2]).astype(np.int32)
        pixels = generator.integers(0, 120, (count, SMALL, SMALL, 3))
        pixels += 40 * (labels[:, None, None, None] == np.arange(3))
        return Photographs(labels, lambda rows: pixels[rows].astype(np.uint8))

    train, valid = split(TRAIN), split(VALID)
    middle = generator.uniform(0, 0.2, CHANNELS[-1]).astype(np.float32)
    return TuningData(train, valid, middle, 0.2 + middle)


TINY: dict[str, Any] = {
    **{"blocks": 3, "epochs": 3, "batch_size": 4, "learning_rate": 0.03, "warmup_epochs": 1.4},
    **{"layer_decay": 0.6, "weight_decay": 0.3, "clip_norm": 0.2, "ema": 0.5, "crop": 0.4},
    **{"label_smoothing": 0.15, "brightness": 0.2, "colour": 0.3, "mixup": 0.4, "cutmix": 1.0},
}


@contextmanager
def tiny_network() -> Iterator[None]:
    """The tiny network in place of the ResNet50, and nothing compiled, which takes longer."""
    import tensorflow as tf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "build_parts", tiny_parts)
        tf.config.run_functions_eagerly(True)
        try:
            yield
        finally:
            tf.config.run_functions_eagerly(False)


@pytest.fixture(name="tiny_network")
def _tiny_network() -> Iterator[None]:
    with tiny_network():
        yield


def tiny_tuner(*, place: Place = ALONE, data: TuningData | None = None, **settings: Any) -> Tuner:
    chosen = FineTuneSettings.model_validate(TINY | settings)
    return Tuner(
        data or tiny_data(),
        weights=tiny_weights(),
        head=tiny_head(),
        settings=chosen,
        class_weights="balanced",
        precision="float32",
        image_size=SMALL,
        num_classes=3,
        seed=5,
        place=place,
        steps=Steps.of(TRAIN, chosen.batch_size, chosen.epochs),
    )


def train(tuner: Tuner, count: int) -> Trained:
    """The first steps of a fit."""
    tuner.feed = tuner.batches(0)
    return tuner.train(0, count)


class TinyFit(NamedTuple):
    final: TuneState
    saved: list[TuneState]
    doing: list[str]
    seconds: float


def tiny_fit(
    *,
    data: TuningData | None = None,
    weights: Convolutions | None = None,
    state: TuneState | None = None,
    saved: list[TuneState] | None = None,
    every_s: float = 0,
    every_steps: int | None = None,
    class_weights: str = "balanced",
    leave: Callable[[list[str]], bool] = lambda doing: False,
    save: bool = True,
    **settings: Any,
) -> TinyFit:
    """A fit of the tiny network, which takes a second."""
    kept: list[TuneState] = [] if saved is None else saved
    doing: list[str] = []

    def keep(state: TuneState | None) -> None:
        assert state is not None
        kept.append(dataclasses.replace(state, history=list(state.history)))

    began = time.monotonic()
    with tiny_network():
        final = fine_tune(
            data or tiny_data(),
            weights=weights or tiny_weights(),
            head=tiny_head(),
            settings=FineTuneSettings.model_validate(TINY | settings),
            class_weights=class_weights,
            precision="float32",
            image_size=SMALL,
            num_classes=3,
            seed=5,
            place=ALONE,
            report=lambda row: None,
            advance=lambda count: None,
            saving=Saving(keep, every_s, every_steps) if save else None,
            hooks=Hooks(doing=doing.append, leave=lambda: leave(doing)),
            state=state and dataclasses.replace(state, history=list(state.history)),
        )
    return TinyFit(final, kept, doing, time.monotonic() - began)


@pytest.fixture(scope="module")
def tiny() -> TinyFit:
    """Three epochs of three steps, with the state after each step."""
    return tiny_fit(every_steps=1)


def tiny_start(blocks: int | str = 3) -> Arrays:
    return initial_arrays(tiny_weights(), tiny_head(), blocks)


def logits_of(arrays: Mapping[str, Any], views: Any) -> Any:
    """Of the tiny network in double precision, on [B, S, S, 3]."""
    import tensorflow as tf

    folded = {
        f"{name}/{kind}": array
        for name, both in tiny_weights().items()
        for kind, array in zip(("kernel", "bias"), both, strict=True)
    }
    of = {name: tf.cast(array, tf.float64) for name, array in (folded | dict(arrays)).items()}
    x = tf.cast(views, tf.float64)
    for stage in range(1, 6):
        kernel = of[f"conv{stage}_conv/kernel"][0, 0]
        x = tf.nn.relu(tf.tensordot(x, kernel, 1) + of[f"conv{stage}_conv/bias"])
    data = tiny_data()
    x = (tf.reduce_mean(x, axis=(1, 2)) - data.mean) / data.deviation
    hidden = tf.nn.relu(x @ of["head/0/kernel"] + of["head/0/bias"])
    return hidden @ of["head/1/kernel"] + of["head/1/bias"]


class Learnt(NamedTuple):
    """What a step learns from, and what of it."""

    loss: float
    correct: int
    gradients: dict[str, NDArray[np.float64]]


def learnt(arrays: Arrays, step: int, *, balanced: bool = True, size: int = SMALL) -> Learnt:
    """Loss and gradients of `step` from 0 on, before they are clipped."""
    import tensorflow as tf

    labels = tiny_data().train.labels
    epoch, of_epoch = divmod(step, 3)
    rows = epoch_order(TRAIN, seed=5, epoch=epoch)[4 * of_epoch : 4 * of_epoch + 4]
    pairs = np.array([2 * of_epoch, 2 * of_epoch + 1])
    views, targets = augment.mix(
        augment.augment(
            tiny_data().train.gather(rows),
            augment.draw(rows, seed=5, epoch=epoch),
            augment.Augmentation(size=size, crop=0.4, brightness=0.2, colour=0.3),
        ),
        tf.one_hot(labels[rows], 3),
        augment.draw_mixing(pairs, seed=5, epoch=epoch, mixup=0.4, cutmix=1.0),
    )
    weights = TRAIN / (3 * np.bincount(labels)) if balanced else np.ones(3)
    importance = np.asarray(targets) @ weights
    smoothed = 0.85 * np.asarray(targets, np.float64) + 0.15 / 3
    variables = {name: tf.Variable(array, dtype=tf.float64) for name, array in arrays.items()}
    with tf.GradientTape() as tape:
        logits = logits_of(variables, views)
        losses = -tf.reduce_sum(smoothed * tf.nn.log_softmax(logits), axis=1)
        loss = tf.reduce_sum(importance * losses) / 4
    gradients = tape.gradient(loss, variables)
    right = np.argmax(logits, axis=1) == labels[rows]
    return Learnt(
        float(loss), int(right.sum()), {name: np.asarray(each) for name, each in gradients.items()}
    )


def rate_of(step: int) -> float:
    """Four steps up, 1.4 epochs of three; then half a cosine over the five others."""
    if step < 4:
        return 0.03 * (step + 1) / 4
    return 0.03 * (1 + math.cos(math.pi * (step - 4) / 5)) / 2


def before(tiny: TinyFit, step: int) -> TuneState:
    """The state before `step`, from 0 on."""
    if step > 0:
        return tiny.saved[step - 1]
    start = tiny_start()
    zeros = {name: np.zeros_like(array) for name, array in start.items()}
    return TuneState(0, 0, start, zeros, zeros, start, start, 0, math.inf, {})


def near(found: Arrays, expected: Mapping[str, NDArray[Any]], what: str) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        scale = max(float(np.abs(array).max()), 1e-12)
        np.testing.assert_allclose(
            found[name], array, rtol=0, atol=2e-5 * scale, err_msg=f"{what} of {name}"
        )


def test_moments_are_those_of_the_clipped_gradient(tiny: TinyFit) -> None:
    """Adam's (Kingma and Ba 2014, arXiv:1412.6980), with 0.9 and 0.999."""
    longest = 0.0
    for step in range(9):
        was, state = before(tiny, step), tiny.saved[step]
        gradients = learnt(was.weights, step).gradients
        norm = math.sqrt(sum(np.square(each).sum() for each in gradients.values()))
        longest = max(longest, norm)
        clipped = {name: each * min(1.0, 0.2 / norm) for name, each in gradients.items()}
        first = {name: 0.9 * was.first[name] + 0.1 * each for name, each in clipped.items()}
        second = {
            name: 0.999 * was.second[name] + 0.001 * each**2 for name, each in clipped.items()
        }
        near(state.first, first, "first moment")
        near(state.second, second, "second moment")
    assert longest > 0.2, "nothing was clipped"


def test_each_step_is_adamw_at_the_rate_of_stage_and_scale(tiny: TinyFit) -> None:
    """Decoupled decay (Loshchilov and Hutter 2017), of kernels alone."""
    stage_rates = {"conv3": 0.6**2, "conv4": 0.6, "conv5": 1.0, "head/": 1.0}
    start = tiny_start()
    for step in range(9):
        was, state = before(tiny, step), tiny.saved[step]
        expected = {}
        for name, array in was.weights.items():
            rate = rate_of(step) * stage_rates[name[:5]]
            scale = max(math.sqrt(np.mean(start[name].astype(np.float64) ** 2)), 0.001)
            unbiased = math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
            direction = unbiased * state.first[name] / (np.sqrt(state.second[name]) + 1e-7)
            decayed = array * (1 - 0.3 * rate) if name.endswith("kernel") else array
            expected[name] = decayed - rate * scale * direction
        near(state.weights, expected, f"step {step}")


def test_the_average_warms_up_and_then_keeps_the_share_that_is_set(tiny: TinyFit) -> None:
    """A share of (1 + t) / (10 + t), as TensorFlow's ExponentialMovingAverage has it."""
    shares = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5]
    for step, share in enumerate(shares):
        was, state = before(tiny, step), tiny.saved[step]
        expected = {
            name: share * array + (1 - share) * state.weights[name]
            for name, array in was.average.items()
        }
        near(state.average, expected, f"average after step {step}")


def judged(arrays: Arrays) -> tuple[float, float]:
    """Cross-entropy and accuracy on the validation photographs as they are."""
    valid = tiny_data().valid
    logits = np.asarray(logits_of(arrays, valid.gather(np.arange(VALID))))
    of_label = logits[np.arange(VALID), valid.labels]
    losses = np.log(np.exp(logits).sum(axis=1)) - of_label
    return float(losses.mean()), float((logits.argmax(axis=1) == valid.labels).mean())


def test_validation_is_of_the_average_and_at_first_of_the_head_alone(tiny: TinyFit) -> None:
    told = [tiny.final.head_alone, *tiny.final.history]
    for row, arrays in zip(
        told, [tiny_start(), *(tiny.saved[i].average for i in (2, 5, 8))], strict=True
    ):
        loss, accuracy = judged(arrays)
        assert row["valid_loss"] == pytest.approx(loss, rel=1e-5)
        assert row["valid_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert judged(tiny.saved[2].average)[0] != pytest.approx(judged(tiny.saved[2].weights)[0], 1e-4)


def test_the_best_are_the_averages_of_the_epoch_with_the_least_validation_loss(
    tiny: TinyFit,
) -> None:
    losses = [tiny.final.head_alone["valid_loss"]]
    losses += [row["valid_loss"] for row in tiny.final.history]
    best = int(np.argmin(losses))
    assert best > 0
    assert tiny.final.best_epoch == best
    assert tiny.final.best_loss == losses[best]
    near(tiny.final.best, tiny.saved[3 * best - 1].average, "best")
    assert judged(tiny.final.best)[0] == pytest.approx(tiny.final.best_loss, rel=1e-5)
    least = np.minimum.accumulate(losses)
    assert [row["best"] for row in tiny.final.history] == list(np.diff(least) < 0)


def test_the_history_has_the_mean_of_the_epochs_steps(tiny: TinyFit) -> None:
    for epoch, row in enumerate(tiny.final.history):
        steps = [
            learnt(before(tiny, step).weights, step) for step in range(3 * epoch, 3 * epoch + 3)
        ]
        assert (row["epoch"], row["step"]) == (epoch + 1, 3 * epoch + 3)
        assert row["learning_rate"] == pytest.approx(rate_of(3 * epoch + 2))
        assert row["train_loss"] == pytest.approx(np.mean([each.loss for each in steps]), rel=1e-5)
        assert row["train_accuracy"] == sum(each.correct for each in steps) / 12
        assert 0 < row["waited"] < 1
    assert sum(12 / row["images_per_s"] for row in tiny.final.history) < tiny.seconds


def test_the_first_step_is_taken_alone_and_is_told_of_as_the_others(tiny: TinyFit) -> None:
    steps = [each for each in tiny.doing if each.startswith("fine-tuning")]
    assert steps[0] == "fine-tuning, epoch 1, step 1 to 1"
    assert steps[-1] == "fine-tuning, epoch 3, step 9 to 9"
    batches = [each for each in tiny.doing if each.startswith("validating epoch 2")]
    assert batches == [
        f"validating epoch 2, {done} photographs of this worker are done" for done in (0, 32, 64)
    ]


@pytest.mark.parametrize(
    ("every_s", "every_steps", "steps"), [(0, None, [3, 6, 9]), (1e9, 2, [2, 4, 6, 8, 9])]
)
def test_the_state_is_saved_at_the_end_of_epochs_or_after_so_many_steps(
    every_s: float, every_steps: int | None, steps: list[int], tiny: TinyFit
) -> None:
    fit = tiny_fit(every_s=every_s, every_steps=every_steps)
    assert [state.step for state in fit.saved] == steps
    assert [state.epoch for state in fit.saved] == [step // 3 for step in steps]
    equals(fit.final, tiny.final)
    near(fit.final.weights, tiny.saved[-1].weights, "weights")


def test_going_on_from_any_step_changes_nothing(tiny: TinyFit) -> None:
    """At the end of an epoch, and inside one."""
    for done in (3, 4, 8):
        fit = tiny_fit(state=tiny.saved[done - 1], save=False)
        equals(fit.final, tiny.final)
        assert fit.doing[0] == f"fine-tuning, epoch {done // 3 + 1}, step {done + 1} to {done + 1}"


def leaves_at(what: str, asked: int) -> Callable[[list[str]], bool]:
    """Asked to leave after it told of `what`, at the `asked`th time that it looks."""
    looks = itertools.count(1)
    return lambda doing: any(what in each for each in doing) and next(looks) >= asked


@pytest.mark.parametrize(
    ("what", "asked", "epoch", "step"),
    [
        ("validating the head alone", 1, 0, 1),
        ("validating epoch 1, 32 ", 1, 0, 3),
        ("validating epoch 1, 64 ", 2, 1, 3),
    ],
)
def test_a_worker_that_is_to_leave_saves_first(
    what: str, asked: int, epoch: int, step: int, tiny: TinyFit
) -> None:
    """The head alone is validated all the same; another validation is given up."""
    saved: list[TuneState] = []
    with pytest.raises(Leaving, match=f"after step {step}"):
        tiny_fit(saved=saved, leave=leaves_at(what, asked))
    (state,) = saved
    assert (state.epoch, state.step) == (epoch, step)
    assert state.head_alone == tiny.final.head_alone
    equals(tiny_fit(state=state).final, tiny.final)


def test_a_worker_asked_to_leave_when_all_is_done_just_ends(tiny: TinyFit) -> None:
    fit = tiny_fit(leave=leaves_at("validating epoch 3, 64 ", 2))
    equals(fit.final, tiny.final)


def test_without_class_weights_every_example_counts_the_same() -> None:
    fit = tiny_fit(epochs=1, class_weights="none")
    start, saved = tiny_start(), tiny_fit(epochs=1, class_weights="none", every_steps=1).saved
    steps = [start, saved[0].weights, saved[1].weights]
    losses = [learnt(arrays, i, balanced=False).loss for i, arrays in enumerate(steps)]
    assert fit.final.history[0]["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_without_validation_the_last_average_is_published() -> None:
    data = tiny_data()
    nobody = Photographs(
        np.zeros(0, np.int32), lambda rows: np.zeros((0, SMALL, SMALL, 3), np.uint8)
    )
    final = tiny_fit(data=data._replace(valid=nobody)).final
    assert (final.best_epoch, final.best_loss, final.head_alone) == (3, math.inf, {})
    near(final.best, final.average, "best")
    assert [row["best"] for row in final.history] == [1.0, 1.0, 1.0]
    assert "valid_loss" not in final.history[0]


def test_where_nothing_helps_the_head_alone_is_the_best() -> None:
    """A rate that ruins the network: patience counts from the head alone."""
    final = tiny_fit(learning_rate=9.0, warmup_epochs=0, epochs=9, patience=2).final
    assert (final.best_epoch, final.epoch) == (0, 2)
    assert largest_difference(final.best, tiny_start()) == 0
    assert final.best_loss == final.head_alone["valid_loss"]


def test_a_batch_is_at_most_all_examples() -> None:
    final = tiny_fit(batch_size=99, epochs=1).final
    assert final.step == 1
    assert final.history[0]["train_accuracy"] * TRAIN % 1 == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="a global batch of 5 cannot be shared out"):
        tiny_fit(batch_size=5)


def test_a_loss_that_is_no_number_is_refused_with_its_step(tiny: TinyFit) -> None:
    broken = dict.fromkeys(tiny.saved[3].weights, np.float32(np.nan))
    weights = {name: array * broken[name] for name, array in tiny.saved[3].weights.items()}
    with pytest.raises(UserError, match=r"in epoch 2, at step 4; lower --fine_tune\.learning_rate"):
        tiny_fit(state=dataclasses.replace(tiny.saved[3], weights=weights))


def test_gradients_that_overflow_are_refused_though_the_loss_is_finite() -> None:
    data = tiny_data()
    with pytest.raises(UserError, match="not finite in epoch 1, at step 0"):
        tiny_fit(data=data._replace(deviation=np.full(CHANNELS[-1], 1e-25, np.float32)))


@pytest.mark.parametrize(
    ("blocks", "stages"), [(1, "5"), (2, "45"), (3, "345"), (4, "2345"), ("all", "12345")]
)
def test_the_last_stages_are_trained_and_the_head(blocks: int | str, stages: str) -> None:
    found = tiny_start(blocks)
    names = {f"conv{stage}_conv/{kind}" for stage in stages for kind in ("kernel", "bias")}
    assert found.keys() == names | {
        f"head/{i}/{kind}" for i in (0, 1) for kind in ("kernel", "bias")
    }
    for name, both in convolutions(found).items():
        for array, expected in zip(both, tiny_weights()[name], strict=True):
            np.testing.assert_array_equal(array, expected)
    assert len(convolutions(found)) == len(stages)
    for layer, of_layer in zip(finetune_state.head(found), tiny_head(), strict=True):
        for array, expected in zip(layer, of_layer, strict=True):
            np.testing.assert_array_equal(array, expected)


@pytest.mark.usefixtures("tiny_network")
@pytest.mark.parametrize(("layer_decay", "weight_decay"), [(0.5, 0.2), (1.0, 0.0)])
def test_the_further_from_the_head_the_lower_rate_and_decay(
    layer_decay: float, weight_decay: float
) -> None:
    """`layer_decay`: a stage's rate as a share of that of the one after it, of which is decayed."""
    tuner = tiny_tuner(blocks="all", layer_decay=layer_decay, weight_decay=weight_decay)
    powers = {"conv1": 4, "conv2": 3, "conv3": 2, "conv4": 1, "conv5": 0, "head/": 0}
    for name, one in tuner._variables.items():
        share = layer_decay ** powers[name[:5]]
        scale = np.linalg.norm(one.variable) / math.sqrt(one.variable.numpy().size)
        assert one.share == pytest.approx(share * scale, rel=1e-5)
        assert one.decay == pytest.approx(share * weight_decay if "kernel" in name else 0)


@pytest.mark.usefixtures("tiny_network")
def test_what_is_0_at_the_start_moves_as_if_its_scale_were_a_thousandth() -> None:
    """Adafactor's smallest scale (Shazeer and Stern 2018, arXiv:1804.04235)."""
    tuner = tiny_tuner()
    assert tiny_head()[0][1][0] == 0
    head = [(kernel, 0 * bias) for kernel, bias in tiny_head()]
    made = tuner._make_variables(head)
    assert made["head/0/bias"].share == pytest.approx(0.001)


def test_a_step_is_keras_adamw() -> None:
    """A gradient so small that epsilon counts, and another; two steps."""
    import keras
    import tensorflow as tf

    start, gradients = np.array([0.5, -2.0]), np.array([[3e-8, -0.2], [-2e-8, 0.7]])
    first, second, variable = (
        tf.Variable(each, dtype=tf.float32) for each in (0 * start, 0 * start, start)
    )
    one = _Trained(variable, first, second, variable, share=0.25, decay=0.5)
    stock = keras.Variable(start, dtype="float32")
    optimizer = keras.optimizers.AdamW(0.025, weight_decay=2.0)  # which decays by rate x decay
    for count, gradient in enumerate(gradients, start=1):
        _adamw(
            one,
            tf.constant(gradient, tf.float32),
            rate=tf.constant(0.1),
            count=tf.constant(float(count)),
        )
        optimizer.apply([tf.constant(gradient, tf.float32)], [stock])
    np.testing.assert_allclose(one.variable.numpy(), np.asarray(stock), rtol=1e-6)


@pytest.mark.usefixtures("tiny_network")
def test_the_rate_warms_up_for_so_many_epochs() -> None:
    tuner = tiny_tuner(epochs=4, warmup_epochs=1.5, learning_rate=0.6)  # 3 steps an epoch
    assert [tuner.rate(step) for step in (0, 3, 4)] == pytest.approx([0.15, 0.6, 0.6])
    assert tuner.rate(8) == pytest.approx(0.3)  # half of the way down
    assert tuner.rate(12) == pytest.approx(0)
    assert tiny_tuner(warmup_epochs=0).rate(0) == pytest.approx(0.03)
    long = tiny_tuner(epochs=2, warmup_epochs=99, learning_rate=0.6)
    assert [long.rate(step) for step in (0, 4, 5)] == pytest.approx([0.12, 0.6, 0.6])


@pytest.mark.usefixtures("tiny_network")
def test_crop_size_is_that_of_the_views_to_train_on_alone() -> None:
    tuner = tiny_tuner(crop_size=32)
    (loss,) = train(tuner, 1).losses
    assert loss == pytest.approx(learnt(tiny_start(), 0, size=32).loss, rel=1e-5)
    assert loss != pytest.approx(learnt(tiny_start(), 0).loss, rel=1e-4)
    again = tiny_tuner(crop_size=32)
    assert again.validate(lambda done: True)[0] / VALID == pytest.approx(
        judged(tiny_start())[0], rel=1e-5
    )


def test_the_average_keeps_the_share_ema() -> None:
    """Of 0 it is the weights of the last step; of nearly 1 it warms up all the same."""
    fit = tiny_fit(ema=0.0, epochs=1)
    near(fit.final.average, fit.final.weights, "average")
    slow = tiny_fit(ema=0.999, epochs=1, every_steps=1)
    start, (first, *_) = tiny_start(), slow.saved
    expected = {name: 0.1 * start[name] + 0.9 * first.weights[name] for name in start}
    near(first.average, expected, "average")


def test_a_norm_below_clip_norm_is_left_alone() -> None:
    (state, *_) = tiny_fit(clip_norm=1e6, epochs=1, every_steps=1).saved
    gradients = learnt(tiny_start(), 0).gradients
    near(state.first, {name: 0.1 * each for name, each in gradients.items()}, "first moment")


@pytest.mark.usefixtures("tiny_network")
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.0, "cutmix": 0.0}])
def test_workers_share_out_the_rows_of_one(
    mixing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels, draws, pairs and labels; what they make of them adds up to the loss of one."""
    import tensorflow as tf

    monkeypatch.setattr(
        tf.distribute, "MultiWorkerMirroredStrategy", lambda: tf.distribute.get_strategy()
    )
    whole = tiny_tuner(**mixing)
    parts = [tiny_tuner(place=Place(rank, 2), **mixing) for rank in (0, 1)]
    for first in (0, 4):  # in the second epoch, after its first step
        of_parts = zip(*(part.batches(first) for part in parts), strict=True)
        for batch, shared in zip(whole.batches(first), of_parts, strict=True):
            for array, *pieces in zip(batch, *shared, strict=True):
                np.testing.assert_array_equal(array, np.concatenate(pieces))
                assert len(pieces[0]) == len(array) / 2
    one, *two = (train(each, 1) for each in (whole, *parts))
    assert one.losses[0] == pytest.approx(sum(each.losses[0] for each in two), rel=1e-5)
    assert one.correct == sum(each.correct for each in two)


@pytest.mark.usefixtures("tiny_network")
def test_batches_are_the_epochs_order_with_its_draws_and_pairs() -> None:
    """From the second step of the second epoch on, in a fit of three."""
    tuner, data = tiny_tuner(), tiny_data()
    found = list(tuner.batches(4))
    assert len(found) == 5
    for (epoch, step), (pixels, draws, mixing, labels) in zip(
        [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2)], found, strict=True
    ):
        rows = epoch_order(TRAIN, seed=5, epoch=epoch)[4 * step : 4 * step + 4]
        np.testing.assert_array_equal(pixels, data.train.gather(rows))
        np.testing.assert_array_equal(labels, data.train.labels[rows])
        np.testing.assert_array_equal(draws, augment.draw(rows, seed=5, epoch=epoch))
        pairs = np.array([2 * step, 2 * step + 1])
        expected = augment.draw_mixing(pairs, seed=5, epoch=epoch, mixup=0.4, cutmix=1.0)
        np.testing.assert_array_equal(mixing, expected)
    # Nothing is mixed: no pairs are drawn.
    assert next(tiny_tuner(mixup=0.0, cutmix=0.0).batches(0))[2].shape == (0, augment.MIXING)


@pytest.mark.usefixtures("tiny_network")
def test_streamed_photographs_come_shard_by_shard() -> None:
    data = tiny_data()
    shards_of = (5, 1, 2, 1, 2, 3)
    streamed = data._replace(train=data.train._replace(shard_rows=shards_of))
    batches = tiny_tuner(data=streamed).batches(3)
    order = streamed_order(shards_of, seed=5, epoch=1)
    for at in (0, 4, 8):
        np.testing.assert_array_equal(next(batches)[3], data.train.labels[order[at : at + 4]])
    assert not np.array_equal(order, epoch_order(TRAIN, seed=5, epoch=1))


def counting(data: TuningData) -> tuple[TuningData, list[int]]:
    """`data`, and how many validation photographs were asked for at a time."""
    asked: list[int] = []

    def gather(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        asked.append(rows.size)
        return data.valid.gather(rows)

    return data._replace(valid=data.valid._replace(gather=gather)), asked


@pytest.mark.usefixtures("tiny_network")
def test_workers_share_out_the_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    monkeypatch.setattr(
        tf.distribute, "MultiWorkerMirroredStrategy", lambda: tf.distribute.get_strategy()
    )
    found = [tiny_tuner(place=Place(rank, 4)).validate(lambda done: True) for rank in range(4)]
    loss, accuracy = judged(tiny_start())
    assert sum(each[0] for each in found) == pytest.approx(loss * VALID, rel=1e-5)
    assert sum(each[1] for each in found) == pytest.approx(accuracy * VALID)


@pytest.mark.usefixtures("tiny_network")
@pytest.mark.parametrize(("short_of", "times"), [(0, 1), (1, 2)])
def test_frozen_maps_of_validation_are_kept_where_they_fit(
    short_of: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six channels of four bytes a pixel, as stage 3 makes them."""
    monkeypatch.setattr(finetune_tuner, "_KEPT_BYTES", VALID * SMALL * SMALL * 6 * 4 - short_of)
    data, asked = counting(tiny_data())
    tuner = tiny_tuner(data=data, blocks=2)
    looked: list[int] = []

    def look(done: int) -> bool:
        looked.append(done)
        return True

    results = [tuner.validate(look) for _ in range(2)]
    assert asked == [32, 32, 6] * times
    assert looked == [0, 32, 64] * 2
    assert results[0] == results[1]
    assert results[0][0] / VALID == pytest.approx(judged(tiny_start())[0], rel=1e-5)
    assert not results[0][2]


@pytest.mark.usefixtures("tiny_network")
def test_validation_leaves_the_weights_of_the_last_step() -> None:
    tuner = tiny_tuner()
    train(tuner, 2)
    state = tuner.state()
    tuner.put_into(state)
    assert tuner.validate(lambda done: done < 64)[2], "it was given up"
    after = tuner.state()
    tuner.put_into(after)
    near(after.weights, state.weights, "weights")
    assert judged(state.average)[0] == pytest.approx(
        tuner.validate(lambda done: True)[0] / VALID, rel=1e-5
    )


@pytest.mark.usefixtures("tiny_network")
def test_a_state_at_the_start_has_done_nothing() -> None:
    state = tiny_tuner().state()
    assert (state.epoch, state.step, state.best_epoch, state.best_loss) == (0, 0, 0, math.inf)
    assert (state.correct, state.seconds, state.waited, state.losses.size) == (0, 0, 0, 0)
    assert (state.history, state.head_alone) == ([], {})
    for arrays in (state.weights, state.average, state.best):
        near(arrays, tiny_start(), "start")


class Stub:
    """What the end of an epoch asks of a tuner."""

    _batch = 4
    end_epoch = Tuner.end_epoch

    def rate(self, step: int) -> float:
        return step / 1000

    def average(self) -> Arrays:
        return small(7)


def ended(best_loss: float, **valid: float) -> TuneState:
    """The end of the second epoch, after steps 4 to 6."""
    state = TuneState(
        *(1, 6, small(1), small(2), small(3), small(4), small(5)),
        *(1, best_loss, {}, [{"epoch": 1.0}]),
        *(np.array([1.0, 2.0, 6.0]), 9.0, 2.0, 0.5),
    )
    loop.end_epoch(Stub(), state, Steps(4, 3, 4), valid)  # type: ignore[arg-type]
    return state


def test_the_end_of_an_epoch_is_told_by_hand() -> None:
    state = ended(0.5, valid_loss=0.25, valid_accuracy=0.75)
    assert state.history == [
        {"epoch": 1.0},
        {
            **{"epoch": 2, "step": 6, "learning_rate": 0.005, "train_loss": 3.0},
            **{"train_accuracy": 0.75, "valid_loss": 0.25, "valid_accuracy": 0.75},
            **{"images_per_s": 6.0, "waited": 0.25, "best": 1.0},
        },
    ]
    assert (state.epoch, state.losses.size, state.correct) == (2, 0, 0.0)
    assert (state.seconds, state.waited) == (0.0, 0.0)
    assert (state.best_epoch, state.best_loss) == (2, 0.25)
    near(state.best, small(7), "best")


def test_as_good_as_the_best_is_not_better() -> None:
    state = ended(0.25, valid_loss=0.25, valid_accuracy=0.75)
    assert state.history[-1]["best"] == 0
    assert (state.epoch, state.best_epoch, state.best_loss) == (2, 1, 0.25)
    near(state.best, small(5), "best")
    without = ended(math.inf)
    assert (without.best_epoch, without.best_loss) == (2, math.inf)


@pytest.mark.parametrize(
    ("epoch", "best_epoch", "patience", "over"),
    [
        *((4, 4, None, True), (5, 5, None, True), (3, 0, None, False)),
        *((3, 1, 2, True), (2, 1, 2, False), (2, 0, 2, True), (0, 0, 1, False), (4, 4, 2, True)),
    ],
)
def test_it_ends_after_all_epochs_or_when_patience_does(
    epoch: int, best_epoch: int, patience: int | None, over: bool
) -> None:
    state = TuneState(*(epoch, 0, {}, {}, {}, {}, {}), *(best_epoch, 0.5, {}))
    assert loop.finished(state, 4, patience) == over


@pytest.mark.parametrize(
    ("batch", "examples", "workers", "mixup", "refused"),
    [
        *((3, 99, 3, 0.0, False), (2, 99, 3, 0.0, True), (99, 2, 3, 0.0, True)),
        *((4, 99, 1, 0.4, False), (5, 99, 1, 0.4, True), (5, 99, 1, 0.0, False)),
        *((6, 99, 2, 0.4, True), (8, 99, 2, 0.4, False), (12, 99, 3, 0.4, False)),
        *((8, 7, 1, 0.4, True), (9, 8, 1, 0.4, False)),
    ],
)
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_pairs_are_not_cut_and_no_worker_goes_without(
    batch: int, examples: int, workers: int, mixup: float, refused: bool, kind: str
) -> None:
    settings = FineTuneSettings.model_validate({"batch_size": batch, kind: mixup})
    with pytest.raises(UserError, match="cannot be shared out") if refused else nullcontext():
        check_batch(settings, examples=examples, workers=workers)


@pytest.mark.parametrize(("seconds", "steps", "taken"), [(1e9, 3, 3), (5.0, 9, 3), (0.0, 9, 1)])
def test_the_measured_rate_is_that_of_the_steps_after_the_first(
    seconds: float, steps: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 2 s, and a first one that takes 50."""
    clock, asked = [1000.0], []

    def train(tuner: Tuner, first: int, count: int) -> None:
        pixels, _, _, labels = next(tuner.feed)
        assert (pixels.shape, pixels.max(), labels.shape) == ((6, SMALL, SMALL, 3), 0, (6,))
        asked.append((first, count))
        clock[0] += 2 if first else 50

    monkeypatch.setattr(Tuner, "train", train)
    monkeypatch.setattr(finetune_fit, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    assert rate_measured(steps=steps, seconds=seconds) == 6 / 2
    assert asked == [(first, 1) for first in range(1 + taken)]


def rate_measured(**how: Any) -> float:
    head = initial_head((), 3, inputs=CHANNELS[-1], seed=0)
    with tiny_network():
        return measured_rate(
            weights=tiny_weights(),
            head=head,
            settings=FineTuneSettings.model_validate(TINY | {"batch_size": 6}),
            precision="float32",
            image_size=SMALL,
            **how,
        )


def test_the_rate_is_measured_on_steps_that_are_taken() -> None:
    assert 0 < rate_measured(steps=2, seconds=60) < 1e6


def test_seconds_of_pieces_are_heard_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock hears of one step, the history of all of the epoch."""
    heard: list[float] = []

    class Counted(Clock):
        def piece(self, step: int, epoch: int, *, most: int) -> int:
            self.now = min(2, most)
            return self.now

        def took(self, step_s: float) -> None:
            heard.append(step_s * self.now)

        def saved(self, seconds: float) -> None:
            assert 0 <= seconds < 60

    monkeypatch.setattr(loop, "Clock", Counted)
    fit = tiny_fit()
    assert len(heard) == 6
    for epoch, row in enumerate(fit.final.history):
        assert sum(heard[2 * epoch : 2 * epoch + 2]) == pytest.approx(12 / row["images_per_s"])


def test_a_checkpoint_has_all_of_the_state(tmp_path: Path) -> None:
    """Every number of it another, without a validation split."""
    state = TuneState(
        *(3, 11, small(1), small(2), small(3), small(4), small(5)),
        *(2, math.inf, {"valid_loss": 0.5}, [{"epoch": 1.0}, {"epoch": 2.0}]),
        *(np.array([0.5, 0.25]), 7.0, 2.5, 0.125),
    )
    finetune_state.save(tmp_path, state, identity={"seed": 0})
    found = load(tmp_path, small(9), identity={"seed": 0})
    for field in dataclasses.fields(TuneState):
        value, expected = getattr(found, field.name), getattr(state, field.name)
        if isinstance(expected, dict) and "head/0/kernel" in expected:
            near(value, expected, field.name)
        else:
            assert np.array_equal(value, expected), field.name


# The network as it is.


SIZE = 32
STRONG = {"crop": 0.4, "brightness": 0.2, "colour": 0.2}
SETTINGS = {"blocks": 1, "epochs": 2, "batch_size": 12, "mixup": 0.4, "cutmix": 1.0, **STRONG}


@pytest.fixture(scope="module")
def weights() -> Weights:
    return load_weights("random")


def probe() -> worker.Probe:
    ones = np.ones(FEATURES, np.float32)
    return worker.Probe(initial_head((8,), 3, inputs=FEATURES, seed=0), 0 * ones, ones)


def fit(
    data_set: ShardIndex,
    weights: Weights,
    state: TuneState | None = None,
    *,
    local_gb: float = 1,
    every_steps: int | None = None,
    hooks: Hooks | None = None,
    saved: list[TuneState] | None = None,
    **settings: Any,
) -> tuple[TuneState, list[TuneState]]:
    """(the last state, a copy of each that was saved), in this process."""
    kept: list[TuneState] = [] if saved is None else saved

    def save(state: TuneState | None) -> None:
        assert state is not None
        kept.append(dataclasses.replace(state, history=list(state.history)))

    train, valid = (
        open_split(
            data_set.root,
            data_set.of_split(split),
            image_size=SIZE,
            threads=2,
            max_local=local_gb * 1e9,
        )
        for split in ("train", "valid")
    )
    start = probe()
    final = fine_tune(
        TuningData(train, valid, start.mean, start.deviation),
        weights=weights.convolutions,
        head=start.head,
        settings=FineTuneSettings.model_validate(SETTINGS | settings),
        class_weights="balanced",
        precision="float32",
        image_size=SIZE,
        num_classes=3,
        seed=0,
        place=Place(0, 1),
        report=lambda row: None,
        advance=lambda count: None,
        saving=Saving(save, 0, every_steps),
        hooks=hooks,
        state=state,
    )
    return final, kept


@pytest.fixture(scope="module")
def whole(data_set: ShardIndex, weights: Weights) -> tuple[TuneState, list[TuneState]]:
    """A fit of two epochs of three steps that was not interrupted, and its state at each step."""
    return fit(data_set, weights, every_steps=1)


def equals(found: TuneState, expected: TuneState) -> None:
    """Bit for bit, but for what the clock says."""
    for name in ("weights", "first", "second", "average", "best"):
        assert largest_difference(getattr(found, name), getattr(expected, name)) == 0
    assert (found.best_epoch, found.best_loss) == (expected.best_epoch, expected.best_loss)
    assert found.head_alone == expected.head_alone
    assert len(found.history) == len(expected.history)
    times = ("images_per_s", "waited")
    for row, other in zip(found.history, expected.history, strict=True):
        assert {k: v for k, v in row.items() if k not in times} == {
            k: v for k, v in other.items() if k not in times
        }


def largest_difference(found: Arrays, expected: Arrays) -> float:
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max()) for name in found)


@pytest.mark.parametrize("step", [3, 5])
def test_going_on_from_a_checkpoint_changes_nothing(
    step: int,
    data_set: ShardIndex,
    weights: Weights,
    whole: tuple[TuneState, list[TuneState]],
    tmp_path: Path,
) -> None:
    """Between two epochs, and inside the second one."""
    final, saved = whole
    assert [state.step for state in saved] == [1, 2, 3, 4, 5, 6]
    identity = {"seed": 0}
    finetune_state.save(tmp_path, saved[step - 1], identity=identity)
    initial = initial_arrays(weights.convolutions, probe().head, 1)
    loaded = load(tmp_path, initial, identity=identity)
    assert (loaded.epoch, loaded.step, loaded.losses.size) == (1, step, step - 3)
    again, _ = fit(data_set, weights, loaded)
    equals(again, final)


def small(number: float) -> Arrays:
    return {"head/0/kernel": np.full((2, 3), number, np.float32)}


@pytest.mark.parametrize(
    ("best_epoch", "losses", "best"), [(0, [], 9), (0, [0.5], 9), (2, [], 4), (2, [0.5], 5)]
)
def test_a_checkpoint_has_the_best_weights(
    best_epoch: int, losses: list[float], best: int, tmp_path: Path
) -> None:
    """What fine-tuning began from, the average right after the best epoch, or those kept since."""
    state = TuneState(
        *(2, 6 + len(losses), small(1), small(2), small(3), small(4), small(5)),
        *(best_epoch, 0.25, {"valid_loss": 0.5}, [{"epoch": 1.0}]),
        *(np.array(losses), 7.0, 2.5, 0.125),
    )
    finetune_state.save(tmp_path, state, identity={"seed": 0})
    found = load(tmp_path, small(9), identity={"seed": 0})
    assert found.best["head/0/kernel"][0, 0] == best
    assert found.losses.tolist() == losses
    assert (found.step, found.correct, found.seconds, found.waited) == (state.step, 7.0, 2.5, 0.125)

    with pytest.raises(UserError, match="started with seed 0, not 1"):
        load(tmp_path, small(9), identity={"seed": 1})
    (tmp_path / "arrays.npz").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged"):
        load(tmp_path, small(9), identity={"seed": 0})


def test_the_trained_stage_and_the_head_move_each_by_a_small_part_of_its_own_scale(
    weights: Weights, whole: tuple[TuneState, list[TuneState]]
) -> None:
    for name, before in initial_arrays(weights.convolutions, probe().head, 1).items():
        if name.endswith("kernel"):
            moved = np.abs(whole[0].weights[name] - before).max() / np.sqrt((before**2).mean())
            assert 1e-4 < moved < 0.1, name


def leaving_at(what: str) -> Hooks:
    """Hooks of a worker that is asked to leave when it tells of `what`."""
    told: list[str] = []
    return Hooks(doing=told.append, leave=lambda: any(what in each for each in told))


@pytest.mark.parametrize(
    ("what", "step"), [("epoch 1, step 2 to", 2), ("validating epoch 1, 0 ", 3)]
)
def test_asked_to_leave_it_saves_within_the_epoch_and_the_rest_is_the_same(
    what: str,
    step: int,
    data_set: ShardIndex,
    weights: Weights,
    whole: tuple[TuneState, list[TuneState]],
) -> None:
    """Validation is given up; nothing of this would have been saved by the clock."""
    saved: list[TuneState] = []
    with pytest.raises(Leaving, match=f"after step {step}"):
        fit(data_set, weights, hooks=leaving_at(what), saved=saved)
    (state,) = saved
    assert (state.epoch, state.step, state.losses.size) == (0, step, step)
    again, _ = fit(data_set, weights, state)
    equals(again, whole[0])


def test_what_does_not_help_is_not_taken(data_set: ShardIndex, weights: Weights) -> None:
    """A rate that ruins the network; streamed, and stopped early."""
    final, _ = fit(
        data_set, weights, local_gb=0, learning_rate=3.0, warmup_epochs=0, epochs=9, patience=2
    )
    assert final.epoch < 9
    assert final.epoch - final.best_epoch == 2
    told = [final.head_alone, *final.history]
    assert final.best_loss == min(row["valid_loss"] for row in told)
    assert final.best_loss == told[final.best_epoch]["valid_loss"]


def test_a_batch_that_workers_cannot_share_is_refused() -> None:
    mixed = FineTuneSettings(batch_size=14, mixup=0.4)
    check_batch(mixed, examples=12, workers=2)
    check_batch(FineTuneSettings(batch_size=13), examples=99, workers=2)
    with pytest.raises(UserError, match=r"give a multiple of 4 with --fine_tune\.batch_size"):
        check_batch(mixed, examples=99, workers=2)
    with pytest.raises(UserError, match="give at least 2"):
        check_batch(FineTuneSettings(batch_size=1), examples=99, workers=2)


def tune_job(data_set: ShardIndex, weights: Weights, **more: Any) -> worker.TuneJob:
    return worker.TuneJob(
        settings=FineTuneSettings.model_validate(SETTINGS | {"epochs": 1, "learning_rate": 0.01}),
        class_names=data_set.class_names,
        class_weights="balanced",
        seed=0,
        save_every_s=0,
        identity={},
        index=data_set,
        weights=ray.put(weights.convolutions),
        probe=ray.put(probe()),
        precision="float32",
        image_size=SIZE,
        threads=1,
        **more,
    )


def run_job(job: worker.TuneJob, workers: int, folder: Path) -> tuple[worker.Tuned, int]:
    """(what it came to, images that were told of), on Ray Train."""
    rows: list[dict[str, float]] = []
    images: list[int] = []
    tuned, restarts = worker.fine_tune(
        job,
        Placement(workers, 0.75, False, str(folder), RestartPolicy(keep=9)),
        on_epoch=rows.append,
        on_images=images.append,
    )
    assert restarts == []
    assert [row["epoch"] for row in rows] == [1]
    return tuned, sum(images)


@pytest.mark.ray
def test_two_workers_take_the_steps_of_one_also_from_inside_an_epoch(
    local_ray: None, data_set: ShardIndex, weights: Weights, tmp_path: Path
) -> None:
    """One worker; two workers; and one that goes on from the second step of the two."""
    one, _ = fit(data_set, weights, epochs=1, learning_rate=0.01)
    job = tune_job(data_set, weights, save_every_steps=2)
    two, images = run_job(job, 2, tmp_path)
    assert images == 36
    folder = str(tmp_path / "fine_tune")
    third, second, *_ = checkpoint.names(folder)
    assert second.startswith("checkpoint_000000002")
    checkpoint.delete(storage.join(folder, third))
    resumed, images = run_job(job, 1, tmp_path)
    assert images == 36

    assert one.best_epoch == two.best_epoch == resumed.best_epoch == 1
    for made in (two, resumed):
        for name, (kernel, bias) in convolutions(one.best).items():
            close(made.convolutions[name][0], kernel)
            close(made.convolutions[name][1], bias)
            moved = np.abs(kernel - weights.convolutions[name][0]).max()
            assert moved > 1.5e-4, "nothing was learnt"
        for layer, expected in zip(made.head, finetune_state.head(one.best), strict=True):
            close(layer[0], expected[0])
            close(layer[1], expected[1])
        for name in ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy"):
            assert made.history[0][name] == pytest.approx(one.history[0][name], rel=1e-4)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to a hundred thousandth of their scale."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(scale, 1e-3))


@pytest.mark.ray
def test_a_run_publishes_what_was_fine_tuned(
    local_ray: None, data_set: ShardIndex, weights: Weights, tmp_path: Path
) -> None:
    """The published model gives the figures that the run tells, and says what it is."""
    run(
        TrainSettings.model_validate(
            {
                "shards": data_set.root,
                "out": str(tmp_path),
                "name": "tuned",
                "weights": "random",
                "image_size": SIZE,
                "views": 1,
                "precision": "float32",
                "head": {"units": [], "epochs": 1},
                # At a higher rate random weights lose by it.
                "fine_tune": {
                    **{"blocks": 1, "epochs": 2, "batch_size": 12, "learning_rate": 0.002},
                    **STRONG,
                },
            }
        )
    )
    folder = tmp_path / "tuned"
    told = storage.read_json(str(folder / "run.json"))["fine_tune"]
    assert told["published"]
    model = bundle.load(str(folder / "model"))
    assert model.description["fine_tune"]["best_epoch"] == told["best_epoch"]
    assert "fine-tuned with the head" in (folder / "model" / "MODEL_CARD.md").read_text()
    changed = {
        name
        for name, (kernel, _) in model.convolutions.items()
        if (kernel != weights.convolutions[name][0]).any()
    }
    assert changed == {name for name in model.convolutions if name.startswith("conv5")}
    tables = list(shards.row_groups(data_set.root, data_set.of_split("valid")[0]))
    images = [image for table in tables for image in table["image"].to_pylist()]
    labels = np.array([label for table in tables for label in table["label"].to_pylist()])
    pixels = np.stack([decode(image, SIZE).pixels for image in images])
    features = model.features(pixels, precision="float32")
    scores = metrics_scores.scores(
        tally(head_logits(model.head, features), labels), data_set.class_names
    )
    found, alone = (
        storage.read_json(str(folder / name))["valid"]["log_loss"]
        for name in ("metrics.json", "metrics_head.json")
    )
    assert scores["log_loss"] == pytest.approx(found, abs=1e-3)
    assert found < alone
    assert model.novelty is not None
    rows = (folder / "fine_tune.csv").read_text().splitlines()
    assert len(rows) == 3
    assert rows[0].startswith("epoch,step,learning_rate")
    for split in ("train", "valid"):
        assert test_tensorboard.written(folder, split, "fine_tune/loss") == [1, 2]
        assert test_tensorboard.written(folder, split, "loss") == [1]
    page = check((folder / "report.html").read_bytes())
    assert "Fine-tuning the last of 4 stages took validation accuracy from" in page.text
    assert f"in epoch {told['best_epoch']} of 2, which is published" in page.text
