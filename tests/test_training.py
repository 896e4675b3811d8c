import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leafnet import checkpoint, features, training
from leafnet.checkpoint import TrainState
from leafnet.classifier import fold_standardisation, head_logits
from leafnet.config import HeadSettings
from leafnet.errors import UserError
from leafnet.features import SplitFeatures
from leafnet.training import Clock, Hooks, Leaving, Place, Saving, TrainingData

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
    mean, deviation = features.statistics(features.moments(train.features))
    gather = training.cached_views(train.features, seed=0)
    return TrainingData(gather, train.labels, valid, mean, deviation)


def fit(
    data: TrainingData,
    state: TrainState | None = None,
    *,
    every_steps: int | None = None,
    hooks: Hooks | None = None,
    saved: list[TrainState] | None = None,
    **settings: Any,
) -> tuple[TrainState, list[dict[str, float]], list[TrainState]]:
    rows: list[dict[str, float]] = []
    kept: list[TrainState] = [] if saved is None else saved

    def save(state: TrainState | None) -> None:
        assert state is not None
        kept.append(dataclasses.replace(state, history=list(state.history)))

    made = {"units": (8,), "epochs": 6, "batch_size": 16, "learning_rate": 0.01, **settings}
    final = training.fit_head(
        data,
        settings=HeadSettings(**made),
        num_classes=CLASSES,
        seed=0,
        place=Place(0, 1),
        report=rows.append,
        saving=Saving(save, 0, every_steps),
        hooks=hooks,
        state=state,
    )
    return final, rows, kept


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 32, 33])
def test_even_split_covers_everything_once(count: int, workers: int) -> None:
    spans = [training.even_split(count, Place(rank, workers)) for rank in range(workers)]
    assert [i for start, stop in spans for i in range(start, stop)] == list(range(count))
    sizes = [stop - start for start, stop in spans]
    assert max(sizes) - min(sizes) <= 1


def test_order_is_a_permutation_for_each_epoch() -> None:
    first, again, next_epoch, other_seed = (
        training.epoch_order(50, seed=seed, epoch=epoch)
        for seed, epoch in [(0, 0), (0, 0), (0, 1), (1, 0)]
    )
    assert sorted(first) == list(range(50))
    np.testing.assert_array_equal(first, again)
    assert (first != next_epoch).any()
    assert (first != other_seed).any()


def test_an_epoch_takes_one_view_of_each_example() -> None:
    values = np.arange(6 * 4).reshape(6, 4, 1).astype(np.float16)
    gather = training.cached_views(values, seed=3)
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
    checkpoint.save(tmp_path, saved[stopped_after - 1], identity=identity)
    state = checkpoint.load(tmp_path, identity=identity)
    assert state.epoch == stopped_after
    resumed, rows, _ = fit(data, state, dropout=0.3, units=(8, 8))
    assert [row["epoch"] for row in rows] == list(range(stopped_after + 1, 7))
    assert resumed.history == whole.history
    for (kernel, bias), (other_kernel, other_bias) in zip(resumed.head, whole.head, strict=True):
        np.testing.assert_array_equal(kernel, other_kernel)
        np.testing.assert_array_equal(bias, other_bias)


@pytest.mark.parametrize("stopped_after", [1, 7, 12, 29])
def test_interrupted_at_any_step_equals_uninterrupted(tmp_path: Path, stopped_after: int) -> None:
    """Six epochs of five steps, saved after each step; bit for bit, history and best as well."""
    data, identity = made_data(), {"data": "abc"}
    more: dict[str, Any] = {"dropout": 0.3, "units": (8, 8), "patience": 5}
    whole, _, _ = fit(data, **more)
    _, _, saved = fit(data, every_steps=1, **more)
    assert [state.step for state in saved] == list(range(1, 31))
    checkpoint.save(tmp_path, saved[stopped_after - 1], identity=identity)
    state = checkpoint.load(tmp_path, identity=identity)
    assert (state.epoch, state.step) == (stopped_after // 5, stopped_after)
    assert state.losses.size == stopped_after % 5
    resumed, _, _ = fit(data, state, **more)
    assert resumed.history == whole.history
    assert (resumed.best_epoch, resumed.best_loss) == (whole.best_epoch, whole.best_loss)
    for name in ("head", "best_head"):
        for layer, other in zip(getattr(resumed, name), getattr(whole, name), strict=True):
            for array, other_array in zip(layer, other, strict=True):
                np.testing.assert_array_equal(array, other_array)
    for array, other_array in zip(resumed.optimizer, whole.optimizer, strict=True):
        np.testing.assert_array_equal(array, other_array)


def test_asked_to_leave_it_saves_and_stops_and_the_rest_is_the_same() -> None:
    data = made_data()
    whole, _, _ = fit(data)
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

    training.fit_head(
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


def test_a_finished_fit_does_nothing() -> None:
    data = made_data()
    whole, _, _ = fit(data)
    again, rows, _ = fit(data, whole)
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
    mean, deviation = features.statistics(features.moments(values))
    nothing = SplitFeatures(values[:0], labels[:0])
    gather = training.cached_views(values, seed=0)
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
    assert final.best_epoch == 3
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
        training.fit_head(
            made_data(),
            settings=HeadSettings(batch_size=2),
            num_classes=CLASSES,
            seed=0,
            place=Place(0, 3),
            report=lambda row: None,
        )


def test_smoothing_and_wide_and_linear_heads_run() -> None:
    for settings in ({"label_smoothing": 0.1}, {"units": ()}, {"units": (8, 4), "dropout": 0.0}):
        _, rows, _ = fit(made_data(), epochs=2, **settings)
        assert np.isfinite(rows[-1]["train_loss"])
