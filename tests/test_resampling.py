import numpy as np
import pytest
from sklearn.metrics import f1_score

from leafnet import metrics, resampling
from tests.test_calibration import ece, simulated


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
    assert resampling.mcnemar(only_ours, only_theirs) == pytest.approx(expected)


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
        found = resampling.intervals(
            population[0][part], population[1][part], seed=seed, resamples=200
        )
        for name, (low, high) in found.items():
            held[name] += low <= truth[name] <= high
    for name, count in held.items():
        assert count / 100 > 0.87, (name, count)


def test_intervals_are_those_of_resampling_one_by_one() -> None:
    logits, labels = simulated(150, times=1.5, classes=3)
    found = resampling.intervals(logits, labels)
    generator, values = np.random.default_rng(7), []
    for _ in range(1500):
        rows = generator.integers(0, 150, 150)
        scores = metrics.scores(metrics.tally(logits[rows], labels[rows]), "abc")
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
    assert resampling.intervals(logits, labels) == resampling.intervals(logits, labels)
    other = resampling.intervals(logits, labels, seed=1)
    assert other["accuracy"] != resampling.intervals(logits, labels)["accuracy"]


def test_ten_photographs_of_each_plant_say_no_more_than_one() -> None:
    logits, labels = simulated(200, times=1.0)
    alone = resampling.intervals(logits, labels)["accuracy"]
    tenfold = np.repeat(logits, 10, axis=0), np.repeat(labels, 10)
    naive = resampling.intervals(*tenfold)["accuracy"]
    grouped = resampling.intervals(*tenfold, groups=np.repeat(np.arange(200), 10))["accuracy"]
    assert np.ptp(naive) < 0.4 * np.ptp(alone)
    np.testing.assert_allclose(grouped, alone, atol=0.01)


def test_comparison_by_hand() -> None:
    ours = np.repeat([True, True, False, False], [60, 20, 5, 15])
    theirs = np.repeat([True, False, True, False], [60, 20, 5, 15])
    found = resampling.compare(ours, theirs)
    assert (found.only_ours, found.only_theirs) == (20, 5)
    assert found.difference == pytest.approx(0.15)
    assert found.p_value == resampling.mcnemar(20, 5)
    # The deviation of a paired difference: sqrt((b + c - (b - c)^2 / n)) / n.
    half = 1.96 * np.sqrt(25 - 15**2 / 100) / 100
    np.testing.assert_allclose(found.interval, [0.15 - half, 0.15 + half], atol=0.015)
    same = resampling.compare(ours, ours)
    assert (same.p_value, same.difference, same.interval) == (1.0, 0.0, (0.0, 0.0))


def test_one_example_is_enough() -> None:
    found = resampling.intervals(np.array([[1, 0]], np.float32), np.array([0]))
    assert found["accuracy"] == (1.0, 1.0)
