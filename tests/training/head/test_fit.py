import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chisquare
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from leafnet.core.errors import UserError
from leafnet.distributed import worker
from leafnet.distributed.worker import Hooks, Leaving, Place
from leafnet.features import moments as features_moments
from leafnet.features.cache import SplitFeatures
from leafnet.features.moments import statistics
from leafnet.models.classifier import fold_standardisation, head_logits, initial_head
from leafnet.training import loop
from leafnet.training.head import fit as head_fit
from leafnet.training.head import state as head_state
from leafnet.training.head.fit import TrainingData, epoch_views, fit_head
from leafnet.training.head.state import TrainState, load
from leafnet.training.loop import Clock, Saving
from leafnet.training.settings import HeadSettings

WIDTH, CLASSES = 16, 3


def made_data(examples: int = 90, views: int = 4, seed: int = 0) -> TrainingData:
    """Classes that a linear head can tell apart, off centre and of uneven scale."""
    generator = np.random.default_rng(seed)
    separation = np.random.default_rng(99).normal(size=(CLASSES, WIDTH))

    def split(count: int, k: int) -> SplitFeatures:
        labels = np.arange(count, dtype=np.int32) % CLASSES
        noise = generator.normal(size=(count, k, WIDTH))
        values = (separation[labels][:, None] + 0.7 * noise) * np.linspace(0.1, 3, WIDTH) + 5
        return SplitFeatures(values.astype(np.float16), labels)

    train, valid = split(examples, views), split(30, 1)
    mean, deviation = statistics(features_moments.moments(train.features))
    gather = head_fit.cached_views(train.features, seed=0)
    return TrainingData(gather, train.labels, valid, mean, deviation)


def fit(
    data: TrainingData,
    state: TrainState | None = None,
    *,
    every_steps: int | None = None,
    hooks: Hooks | None = None,
    saved: list[TrainState] | None = None,
    seed: int = 0,
    **settings: Any,
) -> tuple[TrainState, list[dict[str, float]], list[TrainState]]:
    rows: list[dict[str, float]] = []
    kept: list[TrainState] = [] if saved is None else saved

    def save(state: TrainState | None) -> None:
        assert state is not None
        kept.append(dataclasses.replace(state, history=list(state.history)))

    made = {"units": (8,), "epochs": 6, "batch_size": 16, "learning_rate": 0.01, **settings}
    final = fit_head(
        data,
        settings=HeadSettings(**made),
        num_classes=CLASSES,
        seed=seed,
        place=Place(0, 1),
        report=rows.append,
        saving=Saving(save, 0, every_steps),
        hooks=hooks,
        state=state,
    )
    return final, rows, kept


def plain_data(
    values: NDArray[np.float32], labels: list[int], valid: SplitFeatures | None = None
) -> TrainingData:
    """Features that are standardised already, the same in each epoch."""
    width = values.shape[1]
    none = SplitFeatures(np.empty((0, 1, width), np.float32), np.empty(0, np.int32))
    return TrainingData(
        lambda indices, epoch: values[indices],
        np.array(labels, np.int32),
        valid or none,
        np.zeros(width, np.float32),
        np.ones(width, np.float32),
    )


def start_from(
    head: Sequence[tuple[NDArray[Any], NDArray[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let fits begin with `head` instead of random kernels."""
    exact = [(kernel.astype(np.float32), bias.astype(np.float32)) for kernel, bias in head]
    monkeypatch.setattr(head_fit, "initial_head", lambda *args, **more: exact)


@pytest.fixture(scope="module")
def whole() -> TrainState:
    """The end of six epochs, saved after each."""
    return fit(made_data())[0]


# So small a rate changes no float32 weight.
STILL: dict[str, Any] = {"learning_rate": 1e-30, "warmup_epochs": 0.0, "label_smoothing": 0.0}


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.exp(logits).sum(axis=1, keepdims=True)
    return logits - np.log(total)


def test_a_fit_is_adamw_on_the_smoothed_and_weighted_loss() -> None:
    """Three epochs of four steps, in numpy: AdamW as Loshchilov and Hutter (2019) write it."""
    generator = np.random.default_rng(5)
    values = generator.normal(2, 3, (35, 6)).astype(np.float32)
    labels = np.repeat([0, 1, 2], [20, 10, 5])
    mean = np.array([1, 2, 3, 4, 1, 2], np.float32)
    deviation = np.array([1, 2, 3, 4, 5, 6], np.float32)
    data = dataclasses.replace(plain_data(values, list(labels)), mean=mean, deviation=deviation)
    peak, decay = 0.05, 0.5
    final, rows, saved = fit(
        data,
        every_steps=3,  # so that an epoch is taken in more than one piece
        epochs=3,
        batch_size=8,
        learning_rate=peak,
        warmup_epochs=0.5,
        weight_decay=decay,
        label_smoothing=0.3,
        class_weights="balanced",
    )
    # Two steps of warm-up from 0, then half a cosine over the ten that are left.
    rates = [0, peak / 2, *(peak * (1 + np.cos(np.pi * k / 10)) / 2 for k in range(10))]
    weights = np.array([35 / (3 * 20), 35 / (3 * 10), 35 / (3 * 5)])
    head = initial_head((8,), 3, inputs=6, seed=0)
    theta = [array.astype(np.float64) for layer in head for array in layer]
    first = [np.zeros_like(array) for array in theta]
    second = [np.zeros_like(array) for array in theta]
    losses, right = [], []
    for step, rate in enumerate(rates):
        order = loop.epoch_order(35, seed=0, epoch=step // 4)
        batch = order[step % 4 * 8 : step % 4 * 8 + 8]
        x, y = (values[batch] - mean) / deviation, labels[batch]
        hidden = np.maximum(x @ theta[0] + theta[1], 0)
        logs = log_softmax(hidden @ theta[2] + theta[3])
        targets = np.where(np.eye(3)[y] == 1, 0.7 + 0.1, 0.1)
        losses.append(np.mean(weights[y] * -(targets * logs).sum(axis=1)))
        right.append(np.mean(logs.argmax(axis=1) == y))
        back = (np.exp(logs) - targets) * weights[y][:, None] / 8
        below = back @ theta[2].T * (hidden > 0)
        gradients = [x.T @ below, below.sum(axis=0), hidden.T @ back, back.sum(axis=0)]
        for i, gradient in enumerate(gradients):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            corrected = second[i] / (1 - 0.999 ** (step + 1))
            adam = first[i] / (1 - 0.9 ** (step + 1)) / (np.sqrt(corrected) + 1e-7)
            theta[i] = theta[i] - rate * adam - (rate * decay * theta[i] if i % 2 == 0 else 0)
    found = [array for layer in final.head for array in layer]
    for array, expected in zip(found, theta, strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-3, atol=1e-4)
    for name, of_steps in (("train_loss", losses), ("train_accuracy", right)):
        means = np.reshape(of_steps, (3, 4)).mean(axis=1)
        np.testing.assert_allclose([row[name] for row in rows], means, rtol=1e-4)
    np.testing.assert_allclose([row["learning_rate"] for row in rows], rates[3::4], rtol=1e-4)
    assert [state.step for state in saved] == [3, 4, 6, 8, 9, 12]
    assert (saved[0].best_epoch, saved[0].best_loss) == (0, np.inf)  # within the first epoch


@pytest.mark.parametrize(
    ("epochs", "warmup", "shares"),
    [
        # The last steps of the epochs, 4, 9 and 14 of 15.
        (3, 1.0, [4 / 5, (1 + np.cos(np.pi * 4 / 10)) / 2, (1 + np.cos(np.pi * 9 / 10)) / 2]),
        (1, 0.0, [(1 + np.cos(np.pi * 4 / 5)) / 2]),
        (1, 0.6, [(1 + np.cos(np.pi * 1 / 2)) / 2]),  # 3 of 5 steps
        (1, 9.0, [1.0]),  # longer than the fit: the peak is reached at its last step
    ],
)
def test_the_rate_rises_to_its_peak_and_falls_as_a_cosine(
    epochs: int, warmup: float, shares: list[float]
) -> None:
    """Goyal et al. (2017), 2.2, then Loshchilov and Hutter (2017), equation 5, to 0."""
    data = plain_data(np.ones((5, 2), np.float32), [0, 1, 2, 0, 1])
    more: dict[str, Any] = {"batch_size": 1, "units": (), "epochs": epochs}
    _, rows, _ = fit(data, warmup_epochs=warmup, learning_rate=0.02, **more)
    found = [row["learning_rate"] for row in rows]
    np.testing.assert_allclose(found, [0.02 * share for share in shares], rtol=1e-5)


def test_weight_decay_shrinks_kernels_and_leaves_biases_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All hidden units are off, so that no kernel and no hidden bias has a gradient."""
    hidden = (np.arange(1, 7).reshape(2, 3), np.array([-1, -2, -3]))
    last = (np.arange(-4, 5).reshape(3, 3), np.array([10, 10, 10]))
    start_from([hidden, last], monkeypatch)
    data = plain_data(np.zeros((3, 2), np.float32), [0, 1, 2])
    settings = {**STILL, "learning_rate": 0.1, "weight_decay": 0.5, "units": (3,)}
    final, _, _ = fit(data, epochs=1, batch_size=3, **settings)
    for (kernel, bias), (old_kernel, old_bias) in zip(final.head, [hidden, last], strict=True):
        np.testing.assert_allclose(kernel, old_kernel * (1 - 0.1 * 0.5), rtol=1e-6)
        # The share of three equal logits is not 1/3 to the last digit, which Adam makes much of.
        np.testing.assert_allclose(bias, old_bias, rtol=1e-3)


def test_label_smoothing_spreads_its_share_over_all_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 0.3 each of three classes gets 0.1: targets of 0.8, 0.1 and 0.1."""
    start_from([(np.zeros((2, 3)), np.log([1 / 2, 1 / 4, 1 / 4]))], monkeypatch)
    data = plain_data(np.ones((3, 2), np.float32), [0, 0, 1])
    settings = {**STILL, "label_smoothing": 0.3, "units": ()}
    _, rows, _ = fit(data, epochs=1, batch_size=3, **settings)
    of_0 = 0.8 * np.log(2) + (0.1 + 0.1) * np.log(4)
    of_1 = 0.1 * np.log(2) + (0.8 + 0.1) * np.log(4)
    assert rows[0]["train_loss"] == pytest.approx((2 * of_0 + of_1) / 3, rel=1e-6)
    assert rows[0]["train_accuracy"] == pytest.approx(2 / 3)


def test_validation_has_neither_smoothing_nor_weights_nor_dropout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two examples of four are of the class that the head gives 1/2, in blocks of three."""
    monkeypatch.setattr(head_fit, "BLOCK", 3)
    head = [
        (np.zeros((2, 1)), np.array([1])),
        (np.log([[1 / 2, 1 / 4, 1 / 4]]), np.array([0, 0, 0])),
    ]
    start_from(head, monkeypatch)
    valid = SplitFeatures(np.ones((4, 1, 2), np.float16), np.array([0, 1, 2, 0], np.int32))
    data = plain_data(np.ones((4, 2), np.float32), [0, 0, 0, 1], valid)
    settings = {**STILL, "label_smoothing": 0.5, "class_weights": "balanced", "dropout": 0.9}
    final, rows, _ = fit(data, epochs=1, units=(1,), **settings)
    assert rows[0]["valid_loss"] == pytest.approx((2 * np.log(2) + 2 * np.log(4)) / 4, rel=1e-6)
    assert rows[0]["valid_accuracy"] == 0.5
    assert final.best_loss == rows[0]["valid_loss"]


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = np.array([2, 0, 0, 0, 1, 0, 2], np.int32)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(loop.balanced_weights(labels, 3), expected, rtol=1e-6)
    # A fourth class without examples has some weight that is never used.
    weights = loop.balanced_weights(labels, 4)
    np.testing.assert_allclose(weights[:3], expected * 3 / 4, rtol=1e-6)
    assert weights.shape == (4,)
    assert np.isfinite(weights).all()


def masks(saved: list[TrainState], units: int) -> NDArray[np.float64]:
    """The factor of dropout [step, unit, example] of two examples, of class 0 and 1 of 3.

    With hidden units of 1 and probabilities of 1/3, the gradient of a kernel [unit, class] is the
    factor times (1/3 - 1 in the example's class) / 2, and Adam's first moment takes a tenth of it.
    """
    moments = [
        next(array for array in state.optimizer if array.shape == (units, 3)) for state in saved
    ]
    before = [np.zeros((units, 3)), *moments]
    gradients = [(new - 0.9 * old) / 0.1 for old, new in itertools.pairwise(before)]
    return np.array([2 * (each[:, 2:] - each[:, :2]) for each in gradients])


def test_dropout_drops_its_share_and_scales_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Srivastava et al. (2014), inverted: a unit is 0 or 1 / (1 - share), and 1 on the average."""
    units = 3000
    head = [(np.zeros((1, units)), np.ones(units)), (np.zeros((units, 3)), np.zeros(3))]
    start_from(head, monkeypatch)
    data = plain_data(np.ones((2, 1), np.float32), [0, 1])
    settings = {**STILL, "dropout": 0.3, "units": (units,), "epochs": 2, "batch_size": 2}
    _, _, saved = fit(data, every_steps=1, **settings)
    found = masks(saved, units)
    kept = found > 0.5
    np.testing.assert_allclose(found, np.where(kept, 1 / 0.7, 0), atol=1e-4)
    assert (~kept).mean() == pytest.approx(0.3, abs=0.02)  # 12,000 draws: 0.004 is one deviation
    assert found.mean() == pytest.approx(1, abs=0.03)
    # Other units in each example and each step: alike in 0.7^2 + 0.3^2 of the cases.
    assert (kept[0, :, 0] == kept[0, :, 1]).mean() == pytest.approx(0.58, abs=0.05)
    assert (kept[0] == kept[1]).mean() == pytest.approx(0.58, abs=0.05)


def test_each_hidden_layer_drops_units_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient between two layers is the outer product of what they keep."""
    head = [
        (np.zeros((1, 400)), np.ones(400)),
        (np.zeros((400, 400)), np.ones(400)),
        (np.tile([[1, 0, 0]], (400, 1)) / 1000, np.zeros(3)),
    ]
    start_from(head, monkeypatch)
    data = plain_data(np.ones((1, 1), np.float32), [0])
    settings = {**STILL, "dropout": 0.5, "units": (400, 400), "epochs": 1}
    _, _, saved = fit(data, every_steps=1, **settings)
    moment = next(array for array in saved[0].optimizer if array.shape == (400, 400))
    first, second = (moment != 0).any(axis=1), (moment != 0).any(axis=0)
    np.testing.assert_array_equal(moment != 0, np.outer(first, second))
    assert (first == second).mean() == pytest.approx(0.5, abs=0.1)


def test_streams_of_order_and_views_have_nothing_in_common(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each seed and epoch begins with random bits of its own, for the order and for the views."""
    begun: list[int] = []
    default_rng = np.random.default_rng

    def noted(seed: list[int]) -> np.random.Generator:
        generator = default_rng(seed)
        begun.append(generator.bit_generator.state["state"]["state"])
        return generator

    monkeypatch.setattr(np.random, "default_rng", noted)
    for seed, epoch in itertools.product(range(3), range(3)):
        loop.epoch_order(5, seed=seed, epoch=epoch)
        epoch_views(5, 2, seed=seed, epoch=epoch)
    assert len(begun) == len(set(begun)) == 18


def test_views_are_drawn_equally_often() -> None:
    views = epoch_views(4000, 4, seed=0, epoch=3)
    assert chisquare(np.bincount(views)).pvalue > 0.001
    assert views.shape == (4000,)
    assert set(views) == {0, 1, 2, 3}


def test_steps_are_whole_batches_and_one_at_the_least() -> None:
    assert loop.Steps.of(90, 16, 4).per_epoch == 5
    assert loop.Steps.of(96, 16, 4).per_epoch == 6
    assert loop.Steps.of(9, 16, 4).per_epoch == 1


def test_the_parts_of_two_workers_make_up_the_whole() -> None:
    """Of a batch of 5 and a validation split of 7, without the other worker to sum with."""
    valid = SplitFeatures(made_data().valid.features[:7], made_data().valid.labels[:7])
    data = dataclasses.replace(made_data(), valid=valid)
    rows: dict[str, dict[str, float]] = {}
    given: dict[str, list[bool]] = {}
    for name, place in {"0/2": Place(0, 2), "1/2": Place(1, 2), "0/1": Place(0, 1)}.items():
        given[name] = []

        def save(state: TrainState | None, given: list[bool] = given[name]) -> None:
            given.append(state is not None)

        fit_head(
            data,
            settings=HeadSettings(units=(8,), epochs=1, batch_size=5, dropout=0.5, **STILL),
            num_classes=CLASSES,
            seed=0,
            place=place,
            report=lambda row, name=name: rows.update({name: row}),  # type: ignore[misc]
            saving=Saving(save, 0),
        )
    for key in ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy"):
        parts = [rows["0/2"][key], rows["1/2"][key]]
        assert sum(parts) == pytest.approx(rows["0/1"][key], rel=1e-5)
        assert min(parts) > 0
    assert given == {"0/2": [True], "1/2": [False], "0/1": [True]}  # rank 0 has the state


class SlowClock:
    """Takes the place of `time`; only what a test lets pass goes by."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowClock:
    clock = SlowClock()
    monkeypatch.setattr(loop, "time", clock)
    return clock


def test_pieces_take_a_second_and_saving_two_percent_of_the_time(slow: SlowClock) -> None:
    """A step takes 0.25 s and a state 1 s to save: the next within the epoch is due 50 s later."""
    data = plain_data(np.ones((400, 2), np.float32), [i % 3 for i in range(400)])

    def gather(indices: NDArray[np.int64], epoch: int) -> NDArray[np.floating]:
        slow.now += 0.25 * indices.size
        return data.gather(indices, epoch)

    saved: list[int] = []
    told: list[str] = []
    started: list[float] = []

    def save(state: TrainState | None) -> None:
        assert state is not None
        saved.append(state.step)
        slow.now += 1.0

    fit_head(
        dataclasses.replace(data, gather=gather),
        settings=HeadSettings(units=(), epochs=1, batch_size=1),
        num_classes=3,
        seed=0,
        place=Place(0, 1),
        report=lambda row: None,
        saving=Saving(save, 1.0),
        hooks=Hooks(doing=told.append, started=lambda: started.append(slow.now)),
    )
    steps = [what for what in told if what.startswith("training")]
    assert steps[0] == "training, epoch 1, step 1 to 8"  # before it is known how long one takes
    assert steps[1] == "training, epoch 1, step 9 to 12"
    assert started[0] == 1002.0
    assert saved == [8, 8 + 50 * 4, 400]


def test_a_piece_ends_with_memory_with_the_epoch_and_with_a_state_to_save() -> None:
    clock = Clock(None, steps=20, first=6)
    assert clock.piece(0, 0, most=100) == 6
    assert clock.piece(0, 0, most=4) == 4
    assert clock.piece(17, 0, most=100) == 3
    assert clock.piece(57, 2, most=100) == 3
    clock.took(0.1)
    assert clock.piece(20, 1, most=100) == 10
    clock.took(7.0)
    assert clock.piece(20, 1, most=100) == 1
    clock = Clock(Saving[TrainState](lambda state: None, 0, every_steps=7), steps=20, first=6)
    assert [clock.piece(step, 0, most=100) for step in (0, 5, 7, 10, 18)] == [6, 2, 6, 4, 2]


def test_the_features_of_a_piece_fit_into_their_share_of_memory(
    slow: SlowClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of four float32 a step are 32 bytes; room for three steps, which take no time."""
    monkeypatch.setattr(head_fit, "_PIECE_BYTES", 3 * 32 + 31)
    data = plain_data(np.ones((16, 4), np.float32), [i % 3 for i in range(16)])
    told: list[str] = []
    fit(data, epochs=1, batch_size=2, units=(), hooks=Hooks(doing=told.append))
    steps = [what.split("step ")[1] for what in told if what.startswith("training")]
    assert steps == ["1 to 3", "4 to 6", "7 to 8"]


def test_sixteen_mebibytes_of_features_are_read_at_a_time(slow: SlowClock) -> None:
    """Sixteen rows of 16,384 float32 a step are one; the first piece is short in any case."""
    values = np.broadcast_to(np.float32(0), (40 * 16, 16_384))
    data = plain_data(values, [i % 3 for i in range(40 * 16)])
    told: list[str] = []
    fit(data, epochs=1, batch_size=16, units=(), hooks=Hooks(doing=told.append))
    steps = [what.split("step ")[1] for what in told if what.startswith("training")]
    assert steps == ["1 to 8", "9 to 24", "25 to 40"]


def test_a_step_takes_what_it_does_in_the_mean_of_the_workers(
    slow: SlowClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that take 0.25 s each, pieces of a second are four steps."""
    data = plain_data(np.ones((40, 2), np.float32), [i % 3 for i in range(40)])
    monkeypatch.setattr(loop.Workers, "sum", lambda workers, values: 2 * values)

    def gather(indices: NDArray[np.int64], epoch: int) -> NDArray[np.floating]:
        slow.now += 0.25 * indices.size
        return data.gather(indices, epoch)

    told: list[str] = []
    fit_head(
        dataclasses.replace(data, gather=gather),
        settings=HeadSettings(units=(), epochs=1, batch_size=2),
        num_classes=3,
        seed=0,
        place=Place(0, 2),
        report=lambda row: None,
        hooks=Hooks(doing=told.append),
    )
    steps = [what.split("step ")[1] for what in told if what.startswith("training")]
    assert steps == ["1 to 8", "9 to 12", "13 to 16", "17 to 20"]


def test_a_head_that_is_certain_and_right_has_nothing_to_learn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_from([(np.zeros((2, 3)), np.array([1000, 0, 0]))], monkeypatch)
    data = plain_data(np.zeros((4, 2), np.float32), [0, 0, 0, 0])
    final, rows, _ = fit(data, epochs=1, batch_size=4, **{**STILL, "units": ()})
    assert (rows[0]["train_loss"], rows[0]["train_accuracy"]) == (0, 1)
    np.testing.assert_array_equal(final.head[0][1], [1000, 0, 0])


def test_a_state_is_due_at_its_age_and_at_its_step(slow: SlowClock) -> None:
    def clock(every_s: float, every_steps: int | None = None, ready: bool = True) -> Clock:
        return Clock(Saving[TrainState](lambda state: None, every_s, every_steps, lambda: ready), 9)

    none, each_epoch, aged, stepped = Clock(None, 9), clock(0), clock(10), clock(0, every_steps=4)
    late, unready = clock(10), clock(0, every_steps=4, ready=False)
    late.saved(0.3)  # two percent of 15 s
    assert each_epoch.due(9, ends=True)
    assert stepped.due(8, ends=False)
    assert not stepped.due(7, ends=False)
    assert not aged.due(9, ends=True)
    slow.now += 10
    assert aged.due(9, ends=True)
    assert aged.due(5, ends=False)
    assert late.due(9, ends=True)
    assert not late.due(5, ends=False)
    assert not each_epoch.due(5, ends=False)
    assert not none.due(9, ends=True)
    assert not unready.due(8, ends=True)
    slow.now += 5.1
    assert late.due(5, ends=False)


def test_patience_counts_epochs_without_an_improvement() -> None:
    """The weights stay as they are, and so does the loss: the first epoch is the best."""
    final, rows, _ = fit(made_data(), epochs=9, patience=2, **STILL)
    assert (final.best_epoch, final.epoch) == (1, 3)
    assert len({row["valid_loss"] for row in rows}) == 1
    assert final.best_loss == rows[0]["valid_loss"]


def test_the_best_head_is_that_of_the_epoch_with_the_lowest_validation_loss() -> None:
    """Labels of noise: the loss on others rises soon."""
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 3, 60).tolist()
    values = generator.normal(size=(60, 16)).astype(np.float32)
    valid = SplitFeatures(values[:20, None].astype(np.float16), np.array(labels[20:40], np.int32))
    data = plain_data(values, labels, valid)
    final, rows, saved = fit(data, epochs=8, learning_rate=0.1, warmup_epochs=0.0)
    losses = [row["valid_loss"] for row in rows]
    assert final.best_epoch == 1 + int(np.argmin(losses)) < 8
    logs = log_softmax(head_logits(final.best_head, valid.features[:, 0]).astype(np.float64))
    assert log_loss(labels[20:40], np.exp(logs)) == pytest.approx(min(losses), rel=1e-5)
    for left, right in zip(final.best_head, saved[final.best_epoch - 1].head, strict=True):
        np.testing.assert_array_equal(left[0], right[0])


def test_another_seed_begins_and_goes_on_differently(
    whole: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, _, _ = fit(made_data(), seed=1)
    assert (other.head[0][0] != whole.head[0][0]).mean() > 0.99
    start_from(whole.head, monkeypatch)  # the same weights: order and dropout differ
    heads = [fit(made_data(), epochs=1, seed=seed)[0].head[0][0] for seed in (0, 1)]
    assert (heads[0] != heads[1]).mean() > 0.99


def test_unsaved_fits_end_with_the_last_head_too(whole: TrainState) -> None:
    unsaved = fit_head(
        made_data(),
        settings=HeadSettings(units=(8,), epochs=6, batch_size=16, learning_rate=0.01),
        num_classes=CLASSES,
        seed=0,
        place=Place(0, 1),
        report=lambda row: None,
    )
    for layer, other in zip(unsaved.head, whole.head, strict=True):
        np.testing.assert_array_equal(layer[0], other[0])
    for array, other_array in zip(unsaved.optimizer, whole.optimizer, strict=True):
        np.testing.assert_array_equal(array, other_array)


def test_asked_to_leave_at_its_last_step_a_fit_ends_as_always() -> None:
    final, rows, _ = fit(made_data(), epochs=1, hooks=Hooks(leave=lambda: True))
    assert final.epoch == len(rows) == 1


def test_steps_without_a_finite_loss_are_told() -> None:
    losses = np.array([0.5, np.nan, 0.5, -np.inf, 0.5])
    with pytest.raises(UserError) as caught:
        loop.refuse_non_finite(losses, first_step=20, epoch=4, mend="--rate")
    assert str(caught.value) == (
        "the training loss is not finite in epoch 5, at 2 steps from 21 to 23; lower --rate"
    )
    with pytest.raises(UserError, match="at step 8; lower"):
        loop.refuse_non_finite(np.array([np.inf]), first_step=8, epoch=4, mend="--rate")
    loop.refuse_non_finite(losses[[0, 2]], first_step=0, epoch=0, mend="--rate")


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 32, 33])
def test_even_split_covers_everything_once(count: int, workers: int) -> None:
    spans = [worker.even_split(count, Place(rank, workers)) for rank in range(workers)]
    assert [i for start, stop in spans for i in range(start, stop)] == list(range(count))
    sizes = [stop - start for start, stop in spans]
    assert max(sizes) - min(sizes) <= 1


def test_order_is_a_permutation_for_each_epoch() -> None:
    first, again, next_epoch, other_seed = (
        loop.epoch_order(50, seed=seed, epoch=epoch)
        for seed, epoch in [(0, 0), (0, 0), (0, 1), (1, 0)]
    )
    assert sorted(first) == list(range(50))
    np.testing.assert_array_equal(first, again)
    assert (first != next_epoch).any()
    assert (first != other_seed).any()


def test_an_epoch_takes_one_view_of_each_example() -> None:
    values = np.arange(6 * 4).reshape(6, 4, 1).astype(np.float16)
    gather = head_fit.cached_views(values, seed=3)
    indices = np.array([5, 0, 5, 2])
    taken = gather(indices, 7)[:, 0]
    np.testing.assert_array_equal(taken // 4, indices)
    assert taken[0] == taken[2]
    seen = {tuple(gather(np.arange(6), epoch)[:, 0] % 4) for epoch in range(20)}
    assert len(seen) > 10


def test_head_learns_and_keeps_the_best() -> None:
    final, rows, saved = fit(made_data(), epochs=12)
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert rows[-1]["step"] == 12 * (90 // 16)
    assert rows[-1]["valid_accuracy"] > 0.9
    best = min(rows, key=lambda row: row["valid_loss"])
    assert final.best_epoch == best["epoch"]
    assert final.best_loss == best["valid_loss"]
    assert final.history == rows
    assert len(saved) == 12


def test_history_is_what_the_head_does() -> None:
    """The validation loss of the last epoch, computed again with numpy from the folded head."""
    data = made_data()
    final, rows, _ = fit(data, dropout=0.3)
    head = fold_standardisation(final.head, mean=data.mean, deviation=data.deviation)
    logits = head_logits(head, data.valid.features[:, 0]).astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    loss = -log_probabilities[np.arange(30), data.valid.labels].mean()
    assert rows[-1]["valid_loss"] == pytest.approx(loss, rel=1e-4)
    accuracy = (logits.argmax(axis=1) == data.valid.labels).mean()
    assert rows[-1]["valid_accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("stopped_after", [1, 4])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, stopped_after: int) -> None:
    data, identity = made_data(), {"data": "abc"}
    whole, _, saved = fit(data, dropout=0.3, units=(8, 8))
    head_state.save(tmp_path, saved[stopped_after - 1], identity=identity)
    state = load(tmp_path, identity=identity)
    assert state.epoch == stopped_after
    resumed, rows, _ = fit(data, state, dropout=0.3, units=(8, 8))
    assert [row["epoch"] for row in rows] == list(range(stopped_after + 1, 7))
    assert resumed.history == whole.history
    for (kernel, bias), (other_kernel, other_bias) in zip(resumed.head, whole.head, strict=True):
        np.testing.assert_array_equal(kernel, other_kernel)
        np.testing.assert_array_equal(bias, other_bias)


DROPPING: dict[str, Any] = {"dropout": 0.3, "units": (8, 8), "patience": 5}


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[TrainState, list[TrainState]]:
    """The end of six epochs of five steps, and the states of the same saved after each step."""
    whole, _, _ = fit(made_data(), **DROPPING)
    _, _, saved = fit(made_data(), every_steps=1, **DROPPING)
    return whole, saved


@pytest.mark.parametrize("stopped_after", [1, 7, 12, 29])
def test_interrupted_at_any_step_equals_uninterrupted(
    tmp_path: Path, stopped_after: int, uninterrupted: tuple[TrainState, list[TrainState]]
) -> None:
    """Bit for bit, history and best as well."""
    data, identity = made_data(), {"data": "abc"}
    whole, saved = uninterrupted
    assert [state.step for state in saved] == list(range(1, 31))
    head_state.save(tmp_path, saved[stopped_after - 1], identity=identity)
    state = load(tmp_path, identity=identity)
    assert (state.epoch, state.step) == (stopped_after // 5, stopped_after)
    assert state.losses.size == stopped_after % 5
    resumed, _, _ = fit(data, state, **DROPPING)
    assert resumed.history == whole.history
    assert (resumed.best_epoch, resumed.best_loss) == (whole.best_epoch, whole.best_loss)
    for name in ("head", "best_head"):
        for layer, other in zip(getattr(resumed, name), getattr(whole, name), strict=True):
            for array, other_array in zip(layer, other, strict=True):
                np.testing.assert_array_equal(array, other_array)
    for array, other_array in zip(resumed.optimizer, whole.optimizer, strict=True):
        np.testing.assert_array_equal(array, other_array)


def test_asked_to_leave_it_saves_and_stops_and_the_rest_is_the_same(whole: TrainState) -> None:
    data = made_data()
    told: list[str] = []
    hooks = Hooks(doing=told.append, leave=lambda: any("to 8" in what for what in told))
    saved: list[TrainState] = []
    with pytest.raises(Leaving):
        fit(data, every_steps=4, hooks=hooks, saved=saved)
    assert saved[-1].step == 8
    resumed, _, _ = fit(data, saved[-1])
    np.testing.assert_array_equal(resumed.head[0][0], whole.head[0][0])


def test_a_state_is_left_out_while_the_last_is_on_its_way() -> None:
    data = made_data()
    kept: list[int] = []

    def save(state: TrainState | None) -> None:
        assert state is not None
        kept.append(state.step)

    fit_head(
        data,
        settings=HeadSettings(units=(), epochs=2, batch_size=16),
        num_classes=CLASSES,
        seed=0,
        place=Place(0, 1),
        report=lambda row: None,
        saving=Saving(save, 0, 1, ready=lambda: not kept),
    )
    assert kept == [1, 10]


def test_within_an_epoch_little_time_goes_into_saving() -> None:
    """A state that takes half a second to save is saved every 25 s, and after each epoch."""
    clock = Clock(Saving[TrainState](lambda state: None, 0.01), steps=10)
    time.sleep(0.02)
    assert clock.due(4, ends=False)
    clock.saved(0.5)
    time.sleep(0.02)
    assert not clock.due(8, ends=False)
    assert clock.due(10, ends=True)


def test_a_finished_fit_does_nothing(whole: TrainState) -> None:
    again, rows, _ = fit(made_data(), whole)
    assert rows == []
    assert again is whole


def test_patience_stops_early() -> None:
    data = made_data()
    final, rows, _ = fit(data, epochs=200, patience=3, learning_rate=0.05)
    assert len(rows) < 200
    assert final.epoch == final.best_epoch + 3


def test_balanced_weights_raise_the_recall_of_a_rare_class() -> None:
    """Of two classes that overlap, one is nine times as frequent."""
    generator = np.random.default_rng(0)
    labels = (np.arange(200) % 10 == 0).astype(np.int32)
    values = generator.normal(size=(200, 1, WIDTH)) + labels[:, None, None] * 0.3
    values = values.astype(np.float16)
    mean, deviation = statistics(features_moments.moments(values))
    nothing = SplitFeatures(values[:0], labels[:0])
    gather = head_fit.cached_views(values, seed=0)
    recall = {}
    for weights in ("none", "balanced"):
        data = TrainingData(gather, labels, nothing, mean, deviation)
        final, _, _ = fit(data, class_weights=weights, units=(), epochs=20)
        head = fold_standardisation(final.best_head, mean=mean, deviation=deviation)
        predicted = head_logits(head, values[:, 0]).argmax(axis=1)
        recall[weights] = (predicted[labels == 1] == 1).mean()
    assert recall["balanced"] > recall["none"] + 0.2


def test_without_validation_the_last_epoch_is_kept() -> None:
    data = made_data()
    data = dataclasses.replace(
        data, valid=SplitFeatures(data.valid.features[:0], data.valid.labels[:0])
    )
    final, rows, _ = fit(data, epochs=3)
    assert (final.best_epoch, final.best_loss) == (3, np.inf)
    assert "valid_loss" not in rows[0]


def test_loss_that_is_not_finite_stops_with_its_steps() -> None:
    data = made_data()

    def poisoned(indices: np.ndarray, epoch: int) -> np.ndarray:
        values = np.array(data.gather(indices, epoch))
        if epoch == 2:
            values[20] = np.nan  # the second batch of 16
        return values

    with pytest.raises(UserError, match="not finite in epoch 3, at step 11") as caught:
        fit(dataclasses.replace(data, gather=poisoned))
    assert caught.value.reason == "loss-not-finite"


def test_fewer_examples_than_a_batch() -> None:
    _, rows, _ = fit(made_data(examples=9), epochs=2, batch_size=64)
    assert rows[-1]["step"] == 2


def test_batch_smaller_than_the_workers_is_refused() -> None:
    with pytest.raises(UserError, match="batch of 2 cannot be shared out among 3 workers"):
        fit_head(
            made_data(),
            settings=HeadSettings(batch_size=2),
            num_classes=CLASSES,
            seed=0,
            place=Place(0, 3),
            report=lambda row: None,
        )
