import itertools

import numpy as np
import pytest
import scipy.special
from numpy.typing import NDArray

from leafnet.metrics import calibration, scores, thresholds
from leafnet.models import classifier
from leafnet.models.classifier import head_logits, initial_head


def simulated(
    count: int, *, times: float, classes: int = 4, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits that are `times` too large, and labels drawn from what they should be."""
    generator = np.random.default_rng(seed)
    logits = (2 * generator.normal(size=(count, classes))).astype(np.float32)
    drawn = generator.random((count, 1))
    labels = (scores.softmax(logits).cumsum(axis=1) < drawn).sum(axis=1).clip(0, classes - 1)
    return logits * np.float32(times), labels


def ece(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    names = [str(i) for i in range(logits.shape[1])]
    return float(scores.scores(scores.tally(logits, labels), names)["ece"])


@pytest.mark.parametrize("times", [0.3, 1.0, 2.5])
def test_the_temperature_is_found_and_calibrates_other_examples(times: float) -> None:
    logits, labels = simulated(20_000, times=times)
    found = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(times, rel=0.04)
    others = simulated(20_000, times=times, seed=1)
    assert ece(others[0] / np.float32(found), others[1]) < 0.02
    if times != 1.0:
        assert ece(*others) > 0.1


def test_validation_without_a_mistake_does_not_make_the_model_certain() -> None:
    logits = np.array([[3, 0], [0, 3]] * 20, np.float32)
    labels = np.array([0, 1] * 20)
    found = calibration.fit_temperature(logits, labels)
    certain = scores.softmax(logits / np.float32(found)).max()
    # Platt's target for the right class after 40 examples without a mistake is (40 + 1/2) / 41.
    assert certain == pytest.approx(40.5 / 41, abs=1e-3)
    with pytest.raises(ValueError, match="no examples to fit a temperature on"):
        calibration.fit_temperature(logits[:0], labels[:0])


@pytest.mark.parametrize("units", [(), (8,)])
def test_a_folded_temperature_divides_the_logits(units: tuple[int, ...]) -> None:
    head = [(kernel, bias + 0.5) for kernel, bias in initial_head(units, 3, inputs=6, seed=0)]
    features = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    folded = classifier.fold_temperature(head, 2.5)
    np.testing.assert_allclose(
        head_logits(folded, features), head_logits(head, features) / 2.5, rtol=1e-5
    )


def test_selective_accuracy_by_hand() -> None:
    confidence = np.array([0.9, 0.8, 0.8, 0.8, 0.6])
    correct = np.array([True, True, False, False, False])
    # Two of five: the surest, and one of three of which one is right.
    found = calibration.selective_accuracy(confidence, correct, coverage=0.4)
    assert found == pytest.approx((1 + 1 / 3) / 2)
    assert calibration.selective_accuracy(confidence, correct, coverage=1.0) == 0.4
    assert calibration.selective_accuracy(confidence[:1], correct[:1]) == 1.0


def test_levels_are_inside_the_bins_of_the_tally() -> None:
    confidence = np.random.default_rng(0).uniform(0.5, 1.0, 5000)
    logits = np.log(np.stack([confidence, 1 - confidence], axis=1)).astype(np.float32)
    counted = scores.tally(logits, np.zeros(5000, np.int64)).bin_count
    bins = calibration.level_bins(calibration.confidence_levels(scores.softmax(logits)[:, 0]))
    np.testing.assert_array_equal(np.bincount(bins, minlength=15), counted)


def test_what_chance_gives_a_calibrated_model() -> None:
    """Of 300 sets of labels that confidences themselves drew, as many are under `high`."""
    measured, logits = [], simulated(300, times=1.0)[0]
    confidence = scores.softmax(logits).max(axis=1)
    told = calibration.ece_if_calibrated(confidence)
    generator = np.random.default_rng(1)
    for _ in range(300):
        wrong = (generator.random(300) > confidence).astype(int)
        measured.append(ece(logits, (logits.argmax(axis=1) + wrong) % 4))
    assert np.mean(measured) == pytest.approx(told["mean"], rel=0.05)
    assert np.mean(np.array(measured) <= told["high"]) == pytest.approx(0.95, abs=0.035)


def test_review_thresholds_of_calibrated_confidence_mean_what_they_say() -> None:
    """At a target of 90 %, the threshold on calibrated confidences is one that 90 % pass."""
    logits, labels = simulated(20_000, times=3.0)
    calibrated = logits / np.float32(calibration.fit_temperature(logits, labels))
    chosen = thresholds.choose(
        thresholds.outcomes(calibrated, labels, np.zeros(20_000, np.float32)), precision_target=0.9
    )
    fresh, fresh_labels = simulated(20_000, times=3.0, seed=1)
    outcomes = thresholds.outcomes(
        fresh / np.float32(3.0), fresh_labels, np.zeros(20_000, np.float32)
    )
    trusted = outcomes.confidence >= chosen.confidence
    assert outcomes.correct[trusted].mean() == pytest.approx(0.9, abs=0.01)
    assert outcomes.confidence[trusted].mean() == pytest.approx(0.9, abs=0.01)


def platt_log_loss(
    logits: NDArray[np.float32], labels: NDArray[np.int64], temperature: float
) -> float:
    """Mean loss with one more example beside these N, of which every class has a share."""
    count, classes = logits.shape
    targets = (count * np.eye(classes)[labels] + 1 / classes) / (count + 1)
    losses = -scipy.special.log_softmax(logits.astype(np.float64) / temperature, axis=1)
    return float((targets * losses).sum(axis=1).mean())


@pytest.mark.parametrize("wrong", [0, 2])
def test_the_temperature_has_the_lowest_loss_of_all(wrong: int) -> None:
    logits = np.array([[4, 1, 0], [0, 2, 1], [3, 0, 2.5], [0, 1, 5], [1, 6, 0]], np.float32)
    labels = logits.argmax(axis=1)
    labels[:wrong] = 2
    tried = np.geomspace(0.05, 20, 1001)  # six thousandths apart
    best = tried[np.argmin([platt_log_loss(logits, labels, each) for each in tried])]
    assert calibration.fit_temperature(logits, labels) == pytest.approx(best, rel=6e-3)


def test_temperatures_end_at_a_twentieth_and_at_twenty() -> None:
    labels = np.arange(3000) % 3
    shy = (np.eye(3)[labels] * 0.001).astype(np.float32)
    assert calibration.fit_temperature(shy, labels) == pytest.approx(0.05, rel=1e-3)
    assert calibration.fit_temperature(shy * 1e5, (labels + 1) % 3) == pytest.approx(20, rel=1e-3)


@pytest.mark.parametrize("count", [100, 101, 250])
def test_the_temperature_is_that_of_examples_evenly_from_all(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = simulated(count, times=1.0)
    logits[: count // 2] *= 5  # the first are far too sure of themselves
    stride = {100: 1, 101: 2, 250: 3}[count]
    expected = calibration.fit_temperature(logits[::stride], labels[::stride])
    monkeypatch.setattr(calibration, "_SAMPLE", 100)
    assert calibration.fit_temperature(logits, labels) == expected


def test_of_more_than_a_hundred_thousand_examples_every_second_is_looked_at() -> None:
    logits, labels = simulated(100_001, times=1.0, classes=2)
    logits[1::2] *= 9
    assert calibration.fit_temperature(logits, labels) == pytest.approx(1.0, rel=0.04)


def test_selective_accuracy_rounds_examples_up_and_takes_nine_tenths() -> None:
    confidence = np.linspace(1.0, 0.5, 100)
    correct = np.arange(100) < 55
    # 0.55 x 100 is a little more than 55 in binary fractions.
    assert calibration.selective_accuracy(confidence, correct, coverage=0.55) == 1.0
    found = calibration.selective_accuracy(confidence, correct, coverage=0.551)
    assert found == pytest.approx(55 / 56)
    assert calibration.selective_accuracy(confidence, correct) == pytest.approx(55 / 90)


def test_levels_by_hand() -> None:
    confidence = np.array([0.0, 1 / 300, 1 / 150, 1 / 149, 0.5, 0.502, 0.99, 0.999, 1.0])
    levels = calibration.confidence_levels(confidence)
    assert levels.tolist() == [0, 0, 0, 1, 74, 75, 148, 149, 149]
    assert calibration.level_bins(levels).tolist() == [0, 0, 0, 0, 7, 7, 14, 14, 14]


@pytest.mark.parametrize(
    "confidence", [[0.75], [0.97], [0.75, 0.75], [0.74, 0.79], [0.5, 0.75, 0.55, 0.98], [1.0, 1.0]]
)
def test_the_error_by_chance_is_that_of_all_sets_of_labels(confidence: list[float]) -> None:
    """Each set of labels with its probability, instead of some that are drawn."""
    told = calibration.ece_if_calibrated(np.array(confidence), draws=40_000)
    sure = np.array(confidence)
    bins = np.ceil(sure * 15).astype(int)
    errors, chances = [], []
    for right in itertools.product([0, 1], repeat=len(confidence)):
        gaps = np.bincount(bins, np.array(right) - sure)
        errors.append(np.abs(gaps).sum() / len(sure))
        chances.append(np.where(right, sure, 1 - sure).prod())
    assert told["mean"] == pytest.approx(np.dot(errors, chances), abs=0.006)
    order = np.argsort(errors)
    high = np.array(errors)[order][np.searchsorted(np.cumsum(np.array(chances)[order]), 0.95)]
    assert told["high"] == pytest.approx(high)


def test_the_error_by_chance_is_of_a_thousand_draws_from_seed_0() -> None:
    confidence = np.linspace(0.4, 1.0, 30)
    found = calibration.ece_if_calibrated(confidence)
    assert found == calibration.ece_if_calibrated(confidence, seed=0, draws=1000)
    assert found != calibration.ece_if_calibrated(confidence, seed=1)
    assert found != calibration.ece_if_calibrated(confidence, draws=2000)
