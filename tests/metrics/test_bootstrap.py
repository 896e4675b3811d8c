import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom
from sklearn.metrics import f1_score

from leafnet.metrics import bootstrap, calibration
from leafnet.metrics import scores as metrics_scores
from leafnet.metrics.scores import softmax, tally
from tests.metrics.test_calibration import ece, simulated


@pytest.mark.parametrize(
    ("only_ours", "only_theirs", "expected"),
    [
        (1, 6, 2 * (1 + 7) / 2**7),
        (6, 1, 2 * (1 + 7) / 2**7),
        (10, 3, 2 * (1 + 13 + 78 + 286) / 2**13),
        (4, 4, 1.0),
        (1, 0, 1.0),
    ],
)
def test_mcnemar_by_hand(only_ours: int, only_theirs: int, expected: float) -> None:
    assert bootstrap.mcnemar(only_ours, only_theirs) == pytest.approx(expected)


@pytest.mark.parametrize("times", [1.0, 2.0])
def test_intervals_hold_the_truth_as_often_as_they_say(times: float) -> None:
    """Of 100 test sets of 300 examples from a population whose figures are known."""
    population = simulated(400_000, times=times, classes=3)
    predicted = population[0].argmax(axis=1)
    truth = {
        "accuracy": (predicted == population[1]).mean(),
        "macro_f1": f1_score(population[1], predicted, average="macro"),
        "ece": ece(*population) if times > 1 else 0.0,
    }
    held = dict.fromkeys(truth, 0)
    for seed in range(100):
        part = slice(300 * seed, 300 * (seed + 1))
        found = bootstrap.intervals(
            population[0][part], population[1][part], seed=seed, resamples=200
        )
        for name, (low, high) in found.items():
            held[name] += low <= truth[name] <= high
    for name, count in held.items():
        assert count / 100 > 0.87, (name, count)


def test_intervals_are_those_of_resampling_one_by_one() -> None:
    logits, labels = simulated(150, times=1.5, classes=3)
    found = bootstrap.intervals(logits, labels)
    generator, values = np.random.default_rng(7), []
    for _ in range(1500):
        rows = generator.integers(0, 150, 150)
        scores = metrics_scores.scores(tally(logits[rows], labels[rows]), "abc")
        values.append([scores[name] for name in ("accuracy", "macro_f1", "ece")])
    plain = np.quantile(values, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(found["accuracy"], plain[:, 0], atol=0.01)
    np.testing.assert_allclose(found["macro_f1"], plain[:, 1], atol=0.01)
    reflected = 2 * ece(logits, labels) - plain[::-1, 2]
    np.testing.assert_allclose(
        found["ece"], [max(reflected[0], 0), max(reflected[1], ece(logits, labels))], atol=0.01
    )


def test_the_same_seed_gives_the_same_interval() -> None:
    logits, labels = simulated(100, times=1.0)
    assert bootstrap.intervals(logits, labels) == bootstrap.intervals(logits, labels)
    other = bootstrap.intervals(logits, labels, seed=1)
    assert other["accuracy"] != bootstrap.intervals(logits, labels)["accuracy"]


def test_ten_photographs_of_each_plant_say_no_more_than_one() -> None:
    logits, labels = simulated(200, times=1.0)
    alone = bootstrap.intervals(logits, labels)["accuracy"]
    tenfold = np.repeat(logits, 10, axis=0), np.repeat(labels, 10)
    naive = bootstrap.intervals(*tenfold)["accuracy"]
    grouped = bootstrap.intervals(*tenfold, groups=np.repeat(np.arange(200), 10))["accuracy"]
    assert np.ptp(naive) < 0.4 * np.ptp(alone)
    np.testing.assert_allclose(grouped, alone, atol=0.01)


def test_comparison_by_hand() -> None:
    ours = np.repeat([True, True, False, False], [60, 20, 5, 15])
    theirs = np.repeat([True, False, True, False], [60, 20, 5, 15])
    found = bootstrap.compare(ours, theirs)
    assert (found.only_ours, found.only_theirs) == (20, 5)
    assert found.difference == pytest.approx(0.15)
    assert found.p_value == bootstrap.mcnemar(20, 5)
    # The deviation of a paired difference: sqrt((b + c - (b - c)^2 / n)) / n.
    half = 1.96 * np.sqrt(25 - 15**2 / 100) / 100
    np.testing.assert_allclose(found.interval, [0.15 - half, 0.15 + half], atol=0.015)
    same = bootstrap.compare(ours, ours)
    assert (same.p_value, same.difference, same.interval) == (1.0, 0.0, (0.0, 0.0))


def test_one_example_is_enough() -> None:
    found = bootstrap.intervals(np.array([[1, 0]], np.float32), np.array([0]))
    assert found["accuracy"] == (1.0, 1.0)


def counted(
    kind: NDArray[np.int64], groups: NDArray[np.int64] | None = None, resamples: int = 4000
) -> NDArray[np.float64]:
    drawn = bootstrap._resampled(kind, groups=groups, seed=0, resamples=resamples)
    return np.concatenate(list(drawn))


def test_a_resample_is_as_many_examples_with_the_shares_of_all() -> None:
    found = counted(np.repeat([0, 1, 2], [50, 30, 20]))
    assert found.shape == (4000, 3)
    assert (found.sum(axis=1) == 100).all()
    np.testing.assert_allclose(found.mean(axis=0), [50, 30, 20], atol=0.4)
    # Of a multinomial: n p (1 - p), and -n p q between two.
    covariance = [[25, -15, -10], [-15, 21, -6], [-10, -6, 16]]
    np.testing.assert_allclose(np.cov(found.T), covariance, atol=1.5)


def test_a_resample_of_groups_is_as_many_groups() -> None:
    kind = np.array([0, 0, 1, 1, 1, 2])
    groups = np.array([7, 7, 7, 3, 3, 9])
    found = counted(kind, groups)
    # Three draws of: two of kind 0 and one of 1; two of 1; one of 2.
    possible = {
        tuple(np.sum(drawn, axis=0))
        for drawn in itertools.product([(2, 1, 0), (0, 2, 0), (0, 0, 1)], repeat=3)
    }
    assert {tuple(row) for row in found.astype(int).tolist()} == possible
    np.testing.assert_allclose(found.mean(axis=0), [2, 3, 1], atol=0.1)


@pytest.mark.parametrize("grouped", [False, True])
def test_resamples_are_the_same_a_few_at_a_time(
    grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, groups = np.arange(20) % 3, np.arange(20) // 4 if grouped else None
    whole = counted(kind, groups, resamples=50)
    for cells in (1, 37, 60):
        monkeypatch.setattr(bootstrap, "_CELLS_AT_ONCE", cells)
        np.testing.assert_array_equal(counted(kind, groups, resamples=50), whole)
    wide = 5 if grouped else 3  # groups, or kinds
    sizes = [len(part) for part in bootstrap._resampled(kind, groups=groups, seed=0, resamples=50)]
    assert sizes == [60 // wide] * (50 // (60 // wide)) + [50 % (60 // wide)]


def test_intervals_of_few_examples_are_those_of_all_resamples() -> None:
    """Of four examples, each of the 4^4 resamples as often as any other."""
    logits = np.array([[3, 0, 0], [0, 1, 0], [0, 2, 0], [0, 0, 1]], np.float32)
    labels = np.array([0, 1, 0, 1])
    sure = softmax(logits).max(axis=1).astype(float)
    values = []
    for rows in itertools.product(range(4), repeat=4):
        drawn, predicted = labels[list(rows)], logits.argmax(axis=1)[list(rows)]
        right = (drawn == predicted).astype(float)
        gaps = np.bincount(np.ceil(sure[list(rows)] * 15).astype(int), right - sure[list(rows)])
        f1 = [
            2 * (right * (drawn == c)).sum() / max((drawn == c).sum() + (predicted == c).sum(), 1)
            for c in range(3)
        ]
        values.append([right.mean(), np.mean(f1), np.abs(gaps).sum() / 4])
    # A step function's quantile: the resamples nearby are of the same value.
    plain = np.quantile(values, [0.025, 0.975], axis=0)
    found = bootstrap.intervals(logits, labels, resamples=20_000)
    assert found["accuracy"] == pytest.approx(tuple(plain[:, 0]))
    np.testing.assert_allclose(found["macro_f1"], plain[:, 1], atol=0.02)
    estimate = ece(logits, labels)
    by_chance = calibration.ece_if_calibrated(sure)["high"]
    assert estimate < by_chance
    high = max(estimate, 2 * estimate - plain[0, 2])
    assert found["ece"] == pytest.approx((0.0, high), abs=0.01)


def test_a_calibration_error_beyond_chance_has_a_lowest() -> None:
    """All are called certain and a third is wrong: the error is the share that is wrong."""
    logits = np.tile(np.array([[50, 0]], np.float32), (300, 1))
    labels = (np.arange(300) % 3 == 0).astype(int)
    found = bootstrap.intervals(logits, labels)
    low, high = binom.ppf([0.025, 0.975], 300, 1 / 3) / 300
    assert found["accuracy"] == pytest.approx((1 - high, 1 - low), abs=0.0067)
    assert found["ece"] == pytest.approx((2 / 3 - high, 2 / 3 - low), abs=0.0067)


def test_defaults_are_two_thousand_resamples_from_seed_0() -> None:
    logits, labels = simulated(60, times=1.0)
    whole = bootstrap.intervals(logits, labels)
    assert bootstrap.RESAMPLES == 2000
    assert whole == bootstrap.intervals(logits, labels, seed=0, resamples=2000)
    assert whole != bootstrap.intervals(logits, labels, resamples=1000)
    ours, theirs = labels < 2, logits.argmax(axis=1) == labels
    paired = bootstrap.compare(ours, theirs)
    assert paired == bootstrap.compare(ours, theirs, seed=0, resamples=2000)
    assert paired.interval != bootstrap.compare(ours, theirs, seed=1).interval
    assert paired.interval != bootstrap.compare(ours, theirs, resamples=20).interval


def test_a_comparison_by_groups_draws_groups() -> None:
    # Of two plants one model has all of the first right, and the other all of the second.
    ours = np.array([True, True, True, False])
    found = bootstrap.compare(ours, ~ours, groups=np.array([5, 5, 5, 2]))
    assert found.difference == 0.5
    assert found.interval == (-1.0, 1.0)
    alike = bootstrap.compare(ours, ~ours, groups=np.array([1, 2, 2, 1]))
    assert alike.interval[0] == 0.0, "either plant alone has one of two, or two of two"
