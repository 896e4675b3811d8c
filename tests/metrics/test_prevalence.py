"""Shares corrected for errors, on photographs drawn from classes that overlap."""

import json
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from leafnet.metrics import prevalence
from leafnet.metrics.prevalence import Bias
from leafnet.metrics.scores import softmax

CENTRES = np.array([[0, 0], [2.8, 0], [1.4, 2.42]])  # nine in ten are told apart

EXACT = Bias(np.full(3, 1 / 3), np.zeros(3), np.zeros((3, 3)))


class Drawn(NamedTuple):
    """Photographs, and what a model that knows the classes says of them."""

    logits: NDArray[np.float32]  # [N, 3], for equal shares
    labels: NDArray[np.int64]


def draw(counts: NDArray[np.int64], rng: np.random.Generator) -> Drawn:
    labels = np.repeat(np.arange(3), counts)
    seen = CENTRES[labels] + rng.standard_normal((len(labels), 2))
    logits = -0.5 * ((seen[:, None] - CENTRES) ** 2).sum(axis=-1)
    return Drawn(logits.astype(np.float32), labels)


def night(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Shares from 5 to 60 %, and how many of 50 to 500 photographs each class has."""
    while True:
        shares = rng.dirichlet(np.full(3, 1.5))
        if shares.min() >= 0.05 and shares.max() <= 0.6:
            return shares, rng.multinomial(int(rng.integers(50, 501)), shares)


def test_the_interval_covers_and_the_share_is_nearer_than_counting() -> None:
    rng = np.random.default_rng(0)
    covered, errors, counted = [], [], []
    for _ in range(400):
        held_out = draw(np.full(3, 100), rng)
        bias = prevalence.fit_bias(held_out.logits, held_out.labels)
        shares, counts = night(rng)
        probabilities = softmax(draw(counts, rng).logits)
        found = prevalence.estimate(probabilities, bias)
        covered.append((found.low <= shares) & (shares <= found.high))
        happened = counts / counts.sum()
        errors.append(np.abs(found.value - happened).mean())
        labels = np.bincount(probabilities.argmax(axis=1), minlength=3)
        counted.append(np.abs(labels / counts.sum() - happened).mean())
    # A little too often: this model has no bias, and the interval leaves room for one.
    assert 0.93 <= np.mean(covered) <= 0.985
    # Half would be as good as who knows the true shares and the model's errors to the last digit.
    assert np.mean(errors) < 0.85 * np.mean(counted)


def test_many_photographs_leave_the_model_s_errors_and_no_more() -> None:
    rng = np.random.default_rng(1)
    shares = np.array([0.05, 0.35, 0.6])
    probabilities = softmax(draw((40_000 * shares).astype(int), rng).logits)
    found = prevalence.estimate(probabilities, EXACT)
    assert found.value == pytest.approx(shares.tolist(), abs=0.006)
    counted = np.bincount(probabilities.argmax(axis=1), minlength=3) / 40_000
    assert abs(counted - shares).max() > 0.02
    held_out = draw(np.full(3, 100), rng)
    covariance = prevalence.fit_bias(held_out.logits, held_out.labels).covariance
    unsure = prevalence.estimate(probabilities, EXACT._replace(covariance=covariance))
    assert unsure.value == pytest.approx(found.value)
    assert ((unsure.high - unsure.low) > 1.5 * (found.high - found.low)).all()


def test_a_bias_is_found_and_taken_off() -> None:
    rng = np.random.default_rng(2)
    off = np.array([0.6, 0, -0.6], np.float32)
    held_out = draw(np.full(3, 4000), rng)
    bias = prevalence.fit_bias(held_out.logits + off, held_out.labels)
    assert bias.value - bias.value.mean() == pytest.approx(-off, abs=0.08)
    tonight = draw(np.array([500, 3500, 6000]), rng)
    found = prevalence.estimate(softmax(tonight.logits + off), bias)
    assert found.value == pytest.approx([0.05, 0.35, 0.6], abs=0.02)
    wrong = prevalence.estimate(softmax(tonight.logits + off), EXACT)
    assert abs(wrong.value - found.value).max() > 0.03


def test_unequal_held_out_shares_are_the_ones_probabilities_are_of() -> None:
    rng = np.random.default_rng(3)
    held_out = draw(np.array([600, 200, 200]), rng)
    natural = np.log(np.array([0.6, 0.2, 0.2], np.float32))
    bias = prevalence.fit_bias(held_out.logits + natural, held_out.labels)
    assert bias.shares == pytest.approx([0.6, 0.2, 0.2], abs=0.001)
    tonight = draw(np.array([2000, 2000, 6000]), rng)
    found = prevalence.estimate(softmax(tonight.logits + natural), bias)
    assert found.value == pytest.approx([0.2, 0.2, 0.6], abs=0.03)


def test_a_few_photographs_of_one_class_leave_room_for_the_others() -> None:
    found = prevalence.estimate(np.array([[0.998, 0.001, 0.001]] * 5), EXACT)
    assert found.value[0] == pytest.approx(5.5 / 6.5, abs=0.01)
    assert found.high[1] > 0.15
    assert found.low[0] < 0.85
    assert found.value.sum() == pytest.approx(1)


@pytest.mark.parametrize("classes", [1, 2, 38])
def test_certain_answers_are_counted(classes: int) -> None:
    counts = np.arange(1, classes + 1) * 40
    probabilities = np.repeat(np.eye(classes), counts, axis=0)
    bias = Bias(np.full(classes, 1 / classes), np.zeros(classes), np.zeros((classes, classes)))
    found = prevalence.estimate(probabilities, bias)
    assert found.value == pytest.approx((counts + 0.5) / (counts.sum() + 0.5 * classes))
    assert (found.low <= found.value).all()
    assert (found.value <= found.high + 1e-9).all()
    if classes == 2:  # 40 of 120, by the score interval
        assert (found.low[0], found.high[0]) == pytest.approx((0.255, 0.422), abs=0.01)


def test_a_change_is_told_where_there_is_one_and_seldom_else() -> None:
    rng = np.random.default_rng(4)
    changed: dict[str, list[bool]] = {"none": [], "twenty": []}
    for _ in range(100):
        before = draw(rng.multinomial(200, [0.2, 0.3, 0.5]), rng)
        for name, shares in (("none", [0.2, 0.3, 0.5]), ("twenty", [0.4, 0.2, 0.4])):
            tonight = draw(rng.multinomial(200, shares), rng)
            one, other = (
                prevalence.estimate(softmax(drawn.logits), EXACT) for drawn in (tonight, before)
            )
            changed[name].append(bool(prevalence.chance_of_change(one, other)[0] < 0.05))
    assert np.mean(changed["none"]) <= 0.1
    assert np.mean(changed["twenty"]) > 0.9


def test_a_bias_is_stored_and_read() -> None:
    rng = np.random.default_rng(5)
    bias = prevalence.fit_bias(*draw(np.array([5, 9, 0]), rng))
    assert np.isfinite(bias.covariance).all()
    again = prevalence.read_bias(json.loads(json.dumps(prevalence.document(bias))))
    for ours, theirs in zip(bias, again, strict=True):
        assert np.array_equal(ours, theirs)
