from collections.abc import Iterable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from leafnet.metrics import intervals
from leafnet.metrics.scores import exact_interval
from tests.metrics.test_calibration import simulated

Ints = NDArray[np.int64]


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
    assert intervals.mcnemar(only_ours, only_theirs) == pytest.approx(expected)


def held(found: Iterable[tuple[float, float]], truth: float) -> int:
    return sum(low - 1e-9 <= truth <= high + 1e-9 for low, high in found)


def enough(count: int, draws: int) -> bool:
    """False where an interval that holds in 93 % would do so this rarely once in a thousand."""
    return bool(binom.cdf(count, draws, 0.93) > 1e-3)


def answers(labels: Ints, predicted: Ints, classes: int) -> NDArray[np.float32]:
    return np.array(5 * np.eye(classes)[predicted], np.float32)


@pytest.mark.parametrize("examples", [10, 25, 100, 1000])
def test_the_interval_of_a_share_holds_in_93_of_100_draws(examples: int) -> None:
    """Exactly: every number of right examples with how often it comes."""
    right = np.arange(examples + 1)
    bounds = np.array([exact_interval(int(k), examples) for k in right])
    for truth in [0.5, 0.75, 0.9, 0.95, 0.98, 1 - 0.18 / examples, 1 - 0.02 / examples, 1.0]:
        inside = (bounds[:, 0] <= truth) & (truth <= bounds[:, 1])
        assert binom.pmf(right, examples, truth)[inside].sum() >= 0.95 - 1e-9, truth


@pytest.mark.parametrize("groups", [5, 8, 20])
@pytest.mark.parametrize("alike", [0.0, 0.3, 0.6, 1.0])
def test_the_interval_of_groups_holds_in_93_of_100_draws(groups: int, alike: float) -> None:
    """Plants of 1 to 39 photographs, which are right together as much as `alike` says."""
    generator = np.random.default_rng(groups)
    for truth in (0.5, 0.9, 0.97):
        found = []
        for seed in range(80):
            of_group = np.full(groups, truth)
            if alike == 1:
                of_group = (generator.random(groups) < truth).astype(float)
            elif alike:
                scale = 1 / alike - 1
                of_group = generator.beta(truth * scale, (1 - truth) * scale, groups)
            group = np.repeat(np.arange(groups), generator.integers(1, 40, groups))
            right = generator.random(len(group)) < of_group[group]
            found.append(intervals.share(right, groups=group, seed=seed, resamples=300))
        assert enough(held(found, truth), 80), truth


@pytest.mark.parametrize(
    ("examples", "recalls", "shares"),
    [
        (10, [0.9, 0.9], [1, 1]),
        (100, [0.5, 0.8, 0.99], [1, 1, 1]),
        (100, [0.95, 0.95], [97, 3]),
        (100, [0.99, 0.8], [97, 3]),
        (200, [0.95] * 20, [1] * 20),
        (1000, [0.8, 0.98, 0.98], [5, 50, 45]),
    ],
)
def test_the_interval_of_macro_f1_holds_in_93_of_100_draws(
    examples: int, recalls: list[float], shares: list[float]
) -> None:
    classes = len(recalls)
    table = np.full((classes, classes), np.nan)
    table[:] = ((1 - np.array(recalls)) / (classes - 1))[:, None]
    np.fill_diagonal(table, recalls)
    table *= (np.array(shares) / sum(shares))[:, None]
    truth = float((2 * table.diagonal() / (table.sum(axis=0) + table.sum(axis=1))).mean())
    generator, found = np.random.default_rng(1), []
    for seed in range(150):
        true, guessed = np.divmod(generator.choice(classes**2, examples, p=table.ravel()), classes)
        if len(np.unique(true)) == classes:
            logits = answers(true, guessed, classes)
            bounds = intervals.intervals(logits, true, seed=seed, resamples=300)
            found.append(bounds["macro_f1"])
    assert enough(held(found, truth), len(found))


@pytest.mark.parametrize("examples", [10, 100, 1000])
@pytest.mark.parametrize("too_sure", [0.0, 0.1, 0.3])
def test_the_interval_of_the_calibration_error_holds_in_93_of_100_draws(
    examples: int, too_sure: float
) -> None:
    """Of a model that is right less often than it says by `too_sure`, in every bin."""
    generator, found = np.random.default_rng(2), []
    for seed in range(80):
        confidence = np.clip(generator.beta(3, 1, examples) * 2 / 3 + 1 / 3, 0.34, 1 - 1e-6)
        confidence = np.maximum(confidence, too_sure + 0.05)
        labels = generator.integers(0, 3, examples)
        right = generator.random(examples) < confidence - too_sure
        table = np.repeat((1 - confidence)[:, None] / 2, 3, axis=1)
        table[np.arange(examples), np.where(right, labels, (labels + 1) % 3)] = confidence
        bounds = intervals.intervals(
            np.log(table).astype(np.float32), labels, seed=seed, resamples=200
        )
        found.append(bounds["ece"])
    assert enough(held(found, too_sure), 80)


@pytest.mark.parametrize("few", [3, 4])
def test_an_interval_of_macro_f1_tells_how_few_a_class_has(few: int) -> None:
    """All are right: what is not known of three is much, whatever the others are."""
    labels = np.repeat([0, 1], [100 - few, few])
    low, high = intervals.intervals(answers(labels, labels, 2), labels)["macro_f1"]
    # One unseen photograph of it taken for the other class: with recall r, F1 is 2r / (1 + r).
    recall = 0.025 ** (1 / few)
    assert low == pytest.approx((1 + 2 * recall / (1 + recall)) / 2, abs=0.03)
    assert high == 1


def test_a_class_without_an_example_bounds_macro_f1() -> None:
    labels = np.arange(60) % 2
    low, high = intervals.intervals(answers(labels, labels, 3), labels)["macro_f1"]
    assert low > 0.55
    assert high == pytest.approx(2 / 3)


def test_many_groups_are_put_together_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    right, groups = generator.random(4000) < 0.8, np.repeat(np.arange(2000), 2)
    whole = intervals.share(right, groups=groups)
    monkeypatch.setattr(intervals, "_MAX_UNITS", 10_000)
    np.testing.assert_allclose(whole, intervals.share(right, groups=groups), atol=0.006)


def test_the_same_seed_gives_the_same_interval() -> None:
    logits, labels = simulated(100, times=1.0)
    assert intervals.intervals(logits, labels) == intervals.intervals(logits, labels)
    other = intervals.intervals(logits, labels, seed=1)
    assert other["macro_f1"] != intervals.intervals(logits, labels)["macro_f1"]


def test_ten_photographs_of_each_plant_say_no_more_than_one() -> None:
    logits, labels = simulated(200, times=1.0)
    alone = intervals.intervals(logits, labels)["accuracy"]
    tenfold = np.repeat(logits, 10, axis=0), np.repeat(labels, 10)
    naive = intervals.intervals(*tenfold)["accuracy"]
    grouped = intervals.intervals(*tenfold, groups=np.repeat(np.arange(200), 10))["accuracy"]
    assert np.ptp(naive) < 0.4 * np.ptp(alone)
    np.testing.assert_allclose(grouped, alone, atol=0.015)


def test_comparison_by_hand() -> None:
    ours = np.repeat([True, True, False, False], [60, 20, 5, 15])
    theirs = np.repeat([True, False, True, False], [60, 20, 5, 15])
    found = intervals.compare(ours, theirs)
    assert (found.only_ours, found.only_theirs) == (20, 5)
    assert found.difference == pytest.approx(0.15)
    assert found.p_value == intervals.mcnemar(20, 5)
    # The deviation of a paired difference: sqrt((b + c - (b - c)^2 / n)) / n.
    half = 1.96 * np.sqrt(25 - 15**2 / 100) / 100
    np.testing.assert_allclose(found.interval, [0.15 - half, 0.15 + half], atol=0.025)
    same = intervals.compare(ours, ours)
    assert (same.p_value, same.difference) == (1.0, 0.0)


def test_one_example_is_enough() -> None:
    found = intervals.intervals(np.array([[1, 0]], np.float32), np.array([0]))
    assert found["accuracy"] == pytest.approx((0.025, 1.0))


def test_a_share_of_groups_of_one_is_a_share() -> None:
    """Gaffke's bound is that of Clopper and Pearson where all values are 0 or 1."""
    right = np.arange(40) < 33
    found = intervals.share(right, groups=np.arange(40), resamples=20_000)
    np.testing.assert_allclose(found, exact_interval(33, 40), atol=0.004)


def test_a_difference_where_no_example_differs() -> None:
    """A share of 1 - 0.025 ** (1 / 20) may, unseen, be right with one model alone."""
    right = np.ones(20, bool)
    found = intervals.compare(right, right, resamples=20_000)
    unseen = 1 - 0.025 ** (1 / 20)
    assert found.interval == pytest.approx((-unseen, unseen), abs=0.006)
    one_sided = intervals.compare(right, right, resamples=20_000, tail=0.05).interval
    assert one_sided[0] == pytest.approx(-(1 - 0.05 ** (1 / 20)), abs=0.006)


def test_a_calibration_error_beyond_chance_has_a_lowest() -> None:
    """All are called certain and a third is wrong: the error is the share that is wrong."""
    logits = np.tile(np.array([[50, 0]], np.float32), (300, 1))
    labels = (np.arange(300) % 3 == 0).astype(int)
    found = intervals.intervals(logits, labels)
    low, high = exact_interval(100, 300)
    assert found["ece"] == pytest.approx((low, high), abs=0.01)


@pytest.mark.parametrize("grouped", [False, True])
def test_resamples_are_the_same_a_few_at_a_time(
    grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, groups = np.arange(20) % 3, np.arange(20) // 4 if grouped else None

    def sizes() -> list[int]:
        drawn = intervals._resampled(kind, groups=groups, seed=0, resamples=50, columns=4)
        return [len(counts) for counts, _ in drawn]

    wide = 5 if grouped else 4  # groups, or what is made of kinds
    assert sizes() == [50]
    monkeypatch.setattr(intervals, "_CELLS_AT_ONCE", 60)
    assert sizes() == [60 // wide] * (50 // (60 // wide)) + [50 % (60 // wide)]


def test_defaults_are_two_thousand_resamples_from_seed_0() -> None:
    logits, labels = simulated(60, times=1.0)
    whole = intervals.intervals(logits, labels)
    assert intervals.RESAMPLES == 2000
    assert whole == intervals.intervals(logits, labels, seed=0, resamples=2000)
    assert whole != intervals.intervals(logits, labels, resamples=1000)
    ours, theirs = labels < 2, logits.argmax(axis=1) == labels
    paired = intervals.compare(ours, theirs)
    assert paired == intervals.compare(ours, theirs, seed=0, resamples=2000)
    assert paired.interval != intervals.compare(ours, theirs, seed=1).interval
    assert paired.interval != intervals.compare(ours, theirs, resamples=20).interval


def test_a_comparison_by_groups_draws_groups() -> None:
    # Of forty plants one model has all of half, and the other all of the others.
    ours = np.arange(400) < 200
    alone = intervals.compare(ours, ~ours)
    found = intervals.compare(ours, ~ours, groups=np.arange(400) // 10)
    assert found.difference == alone.difference == 0
    assert np.ptp(found.interval) > 2.5 * np.ptp(alone.interval)
