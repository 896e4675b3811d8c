"""The index of drift: what it says of chance, of a real shift, and what it is made of."""

import json

import numpy as np
import pytest

from leafnet import drift
from leafnet.drift import BINS, LARGE, Histogram, shift
from leafnet.review import Outcomes
from tests.stored import outcomes


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
