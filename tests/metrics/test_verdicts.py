"""One verdict of several photographs, that are as much alike as they were drawn."""

import numpy as np
import pytest
from numpy.typing import NDArray

from leafnet.metrics import verdicts
from leafnet.metrics.scores import softmax

CENTRES = np.array([[0, 0], [2.8, 0], [1.4, 2.42]])  # nine in ten are told apart
EQUAL = np.full(3, 1 / 3)


def photographs(
    units: int, each: int, alike: float, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Probabilities [N, 3], units [N] and the class of each unit; `alike` is what they share."""
    labels = rng.integers(0, 3, units)
    shared = rng.standard_normal((units, 1, 2)) * np.sqrt(alike)
    own = rng.standard_normal((units, each, 2)) * np.sqrt(1 - alike)
    seen = (CENTRES[labels][:, None] + shared + own).reshape(-1, 2)
    logits = -0.5 * ((seen[:, None] - CENTRES) ** 2).sum(axis=-1)
    return softmax(logits.astype(np.float32)), np.repeat(np.arange(units), each), labels


@pytest.mark.parametrize("alike", [0.0, 0.3, 0.6, 1.0])
def test_what_photographs_of_a_unit_share_is_measured(alike: float) -> None:
    probabilities, units, _ = photographs(400, 6, alike, np.random.default_rng(0))
    assert verdicts.likeness(probabilities, units) == pytest.approx(alike, abs=0.1)


def test_six_photographs_are_right_more_often_and_as_sure_as_they_may_be() -> None:
    rng = np.random.default_rng(1)
    probabilities, units, labels = photographs(2000, 6, 0.3, rng)
    alike = verdicts.likeness(probabilities, units)
    found = verdicts.combine(probabilities, units, likeness=alike, shares=EQUAL).probabilities
    one = (probabilities.argmax(axis=1) == labels[units]).mean()
    right = found.argmax(axis=1) == labels
    assert 0.84 < one < 0.9
    assert right.mean() > one + 0.04
    assert abs(found.max(axis=1).mean() - right.mean()) < 0.03
    # Taken as independent they would be far surer than they may be.
    naive = verdicts.combine(probabilities, units, likeness=0.0, shares=EQUAL).probabilities
    assert naive.max(axis=1).mean() - right.mean() > 0.01


def test_independent_photographs_are_nearly_always_right() -> None:
    rng = np.random.default_rng(2)
    probabilities, units, labels = photographs(500, 6, 0.0, rng)
    alike = verdicts.likeness(probabilities, units)
    found = verdicts.combine(probabilities, units, likeness=alike, shares=EQUAL)
    assert (found.probabilities.argmax(axis=1) == labels).mean() > 0.98
    assert found.photographs.tolist() == [6] * 500


def test_copies_count_once() -> None:
    one = np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]])
    copies, units = one.repeat(5, axis=0), np.arange(2).repeat(5)
    alike = verdicts.likeness(
        np.tile(copies, (20, 1)), (units + 2 * np.arange(20)[:, None]).ravel()
    )
    assert alike == 1.0
    found = verdicts.combine(copies, units, likeness=alike, shares=EQUAL).probabilities
    assert found == pytest.approx(one)


def test_few_units_count_as_more_alike() -> None:
    rng = np.random.default_rng(3)
    few, many = (
        np.mean([verdicts.likeness(*photographs(count, 3, 0.2, rng)[:2]) for _ in range(40)])
        for count in (8, 200)
    )
    assert few > many + 0.05
    assert verdicts.likeness(EQUAL[None], np.array([0])) == 1.0
    assert verdicts.likeness(np.eye(3), np.arange(3)) == 1.0


def test_unequal_shares_count_once_and_not_with_every_photograph() -> None:
    shares = np.array([0.8, 0.1, 0.1])
    # Each photograph says nothing, so that only the shares are left.
    found = verdicts.combine(
        shares[None].repeat(6, axis=0), np.zeros(6, int), likeness=0.0, shares=shares
    )
    assert found.probabilities[0] == pytest.approx(shares)
