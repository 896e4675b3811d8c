"""The index of drift: what it says of chance, of a real shift, and what it is made of."""

import json

import numpy as np
import pytest
from scipy.stats import chi2

from leafnet.metrics import drift
from leafnet.metrics.drift import BINS, LARGE, Histogram, Shift, shift
from leafnet.metrics.thresholds import Outcomes
from tests.support.stored import outcomes


def stored(valid: Outcomes, name: str) -> Histogram:
    """The reference of a model, as it comes back from its description."""
    return drift.histogram(json.loads(json.dumps(drift.reference(valid)))[name])


def test_every_example_is_counted_once() -> None:
    _, valid = outcomes(300)
    for name in ("confidence", "novelty"):
        assert stored(valid, name).total == 300
    extreme = valid._replace(novelty=np.array([0, 1e9] * 150, np.float32))
    assert stored(extreme, "novelty").total == 300
    alike = valid._replace(novelty=np.full(300, 7, np.float32))
    assert stored(alike, "novelty").total == 300


@pytest.mark.parametrize("count", [5, 40, 300, 3000])
def test_chance_alone_is_no_shift(count: int) -> None:
    """Of 200 nights like the validation split, hardly one is called shifted."""
    _, valid = outcomes(300, seed=1000)
    expected = stored(valid, "novelty")
    found = [
        shift(expected, expected.counted(outcomes(count, seed=seed)[1].novelty))
        for seed in range(200)
    ]
    assert sum(each is not None and each.is_large for each in found) <= 2


@pytest.mark.parametrize("count", [60, 300, 3000])
def test_another_field_is_a_shift(count: int) -> None:
    _, valid = outcomes(300, seed=1000)
    expected = stored(valid, "novelty")
    found = shift(expected, expected.counted(outcomes(count, novelty=55.0)[1].novelty))
    assert found is not None
    assert found.is_large
    assert found.limit >= LARGE


def test_few_photographs_need_a_larger_shift() -> None:
    expected = Histogram(0.0, 1.0, np.full(BINS, 10))
    half = expected._replace(counts=np.repeat([10, 5], BINS // 2))
    few = expected._replace(counts=np.repeat([1, 0], BINS // 2))
    limits = [found.limit for found in (shift(expected, half), shift(expected, few)) if found]
    assert len(limits) == 2
    assert limits[1] > limits[0]


def test_nothing_to_compare() -> None:
    some, none = Histogram(0.0, 1.0, np.full(BINS, 10)), Histogram(0.0, 1.0, np.zeros(BINS, int))
    one_group = Histogram(0.0, 1.0, np.eye(BINS, dtype=int)[0] * 50)
    assert shift(some, none) is None
    assert shift(none, some) is None
    assert shift(one_group, some) is None


def test_values_without_a_number_are_left_out_and_the_median_is_in_the_middle() -> None:
    bins = Histogram(0.0, 10.0, np.zeros(BINS, np.int64))
    found = bins.counted(np.array([np.nan, 1.0, 2.0, 3.0, np.inf, -np.inf]))
    assert found.total == 5
    assert found.median() == pytest.approx(2.0, abs=0.25)


def test_the_index_and_its_limit_by_hand() -> None:
    expected = Histogram(0.0, 1.0, np.array([5, 15]))
    found = shift(expected, expected._replace(counts=np.array([4, 4])))
    assert found is not None
    # (1/2 - 1/4) ln 2 + (1/2 - 3/4) ln(2/3) = ln(3) / 4.
    assert found.psi == pytest.approx(np.log(3) / 4)
    # Chi-squared of one degree of freedom is over 13.070 three times in ten thousand.
    assert found.limit == pytest.approx(13.0704 * (1 / 20 + 1 / 8), rel=1e-5)
    assert not found.is_large


@pytest.mark.parametrize(("reference", "night"), [(30, 3000), (3000, 30)])
def test_the_limit_is_chi_squared_of_both_sizes(reference: int, night: int) -> None:
    expected = Histogram(0.0, 1.0, np.full(6, reference // 6))
    found = shift(expected, expected._replace(counts=np.full(6, night // 6)))
    assert found is not None
    assert found.limit == pytest.approx(chi2.isf(0.0003, df=5) * (1 / reference + 1 / night))


def test_many_photographs_have_the_usual_limit() -> None:
    expected = Histogram(0.0, 1.0, np.full(6, 1000))
    found = shift(expected, expected._replace(counts=np.full(6, 2000)))
    assert found == (0.0, 0.25)
    assert not Shift(0.25, 0.25).is_large
    assert Shift(0.2501, 0.25).is_large


def test_a_group_without_a_photograph_had_half_of_one() -> None:
    expected = Histogram(0.0, 1.0, np.array([50, 50]))
    found = shift(expected, expected._replace(counts=np.array([0, 10])))
    assert found is not None
    assert found.psi == pytest.approx((0.05 - 0.5) * np.log(0.1) + (1 - 0.5) * np.log(2))


def test_the_index_is_of_groups_of_bins() -> None:
    # Four, four and two of fifty are 8 %, 8 % and 4 %: the last belong to the group before them.
    expected = Histogram(0.0, 1.0, np.array([20, 20, 4, 4, 2]))
    assert drift._groups(expected.counts / 50) == [0, 1, 2, 3]
    found = shift(expected, expected._replace(counts=np.array([10, 10, 10, 3, 7])))
    assert found is not None
    p, q = np.array([10, 10, 10, 10]) / 40, np.array([20, 20, 4, 6]) / 50
    assert found.psi == pytest.approx(((p - q) * np.log(p / q)).sum())
    assert found.limit == pytest.approx(chi2.isf(0.0003, df=3) * (1 / 50 + 1 / 40))


def test_groups_are_of_eight_hundredths_at_least() -> None:
    assert drift._groups(np.array([0.03, 0.04, 0.02, 0.01, 0.9])) == [0, 3]
    assert drift._groups(np.array([0.079, 0.92, 0.001])) == [0]
    assert drift._groups(np.array([0.08, 0.92])) == [0, 1]
    assert drift._groups(np.array([0.05])) == [0]
    assert drift._groups(np.array([0.5, 0.0, 0.5])) == [0, 1]


def test_values_on_an_edge_belong_to_the_bin_above_it_and_those_outside_to_the_outer() -> None:
    bins = Histogram(2.0, 6.0, np.zeros(8, np.int64))
    found = bins.counted(np.array([-1.0, 2.0, 2.5, 3.99, 4.0, 5.999, 6.0, 9.0, np.nan]))
    assert found.counts.tolist() == [2, 1, 0, 1, 1, 0, 0, 3]
    assert (found.low, found.high, found.total) == (2.0, 6.0, 8)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([1, 1, 0, 0], 10.5), ([1, 0, 3, 0], 12.5), ([0, 0, 0, 2], 13.5), ([2, 1, 1, 1], 11.5)],
)
def test_the_median_is_the_middle_of_its_bin(counts: list[int], expected: float) -> None:
    assert Histogram(10.0, 14.0, np.array(counts)).median() == expected


def test_the_reference_reaches_beyond_validation() -> None:
    novelty = np.arange(101, dtype=np.float32) + 10  # 99 % are at most 109
    confidence = np.asarray((np.arange(101) + 0.5) / 101, np.float32)
    found = drift.reference(Outcomes(confidence, np.ones(101, bool), novelty))
    assert (found["novelty"]["low"], found["novelty"]["high"]) == pytest.approx(
        (10 - 0.25 * 99, 109 + 1.25 * 99)
    )
    assert (found["confidence"]["low"], found["confidence"]["high"]) == (0.0, 1.0)
    edges = np.linspace(10 - 0.25 * 99, 109 + 1.25 * 99, 41)
    assert found["novelty"]["counts"] == np.histogram(novelty, edges)[0].tolist()
    assert found["confidence"]["counts"] == np.histogram(confidence, 40, (0, 1))[0].tolist()


@pytest.mark.parametrize(("value", "spread"), [(7.0, 7e-6), (0.25, 1e-6)])
def test_photographs_that_are_all_alike_have_bins_of_some_width(
    value: float, spread: float
) -> None:
    valid = Outcomes(np.ones(9, np.float32), np.ones(9, bool), np.full(9, value, np.float32))
    found = drift.reference(valid)["novelty"]
    assert found["high"] - found["low"] == pytest.approx(1.5 * spread, rel=1e-6)
    assert found["low"] == pytest.approx(value - 0.25 * spread, abs=1e-9)
