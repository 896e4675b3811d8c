from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from leafnet.metrics import thresholds
from leafnet.metrics.thresholds import REVIEW_ALL, Outcomes, Review


def made(confidence: list[float], correct: list[bool], novelty: list[float]) -> Outcomes:
    return Outcomes(
        np.array(confidence, np.float32), np.array(correct), np.array(novelty, np.float32)
    )


@given(
    st.lists(st.tuples(st.sampled_from([0.4, 0.5, 0.7, 0.9, 1.0]), st.booleans()), min_size=1),
    st.sampled_from([0.5, 0.8, 0.95, 1.0]),
)
def test_threshold_is_the_lowest_that_reaches_the_target(
    examples: list[tuple[float, bool]], target: float
) -> None:
    confidence = np.array([c for c, _ in examples], np.float32)
    correct = np.array([right for _, right in examples])
    found = thresholds.confidence_threshold(confidence, correct, precision_target=target)
    reaching = [t for t in np.unique(confidence) if correct[confidence >= t].mean() >= target]
    if not reaching:
        assert found == REVIEW_ALL
        assert not (confidence >= found).any()
    else:
        np.testing.assert_array_equal(confidence >= found, confidence >= min(reaching))
        assert (found == 0.0) == (correct.mean() >= target)


def test_confidence_of_one_is_reviewed_where_no_threshold_is_good_enough() -> None:
    chosen = thresholds.choose(made([1.0, 1.0], [False, False], [1, 2]), precision_target=0.95)
    assert chosen.reason(1.0, 0.0) == "low-confidence: 1.000 is under 2.000"


@pytest.mark.parametrize("count", [1, 24, 100, 300])
def test_at_most_one_percent_of_validation_is_unlike_training(count: int) -> None:
    novelty = np.random.default_rng(0).lognormal(0, 2, count).astype(np.float32)
    outcomes = Outcomes(np.ones(count, np.float32), np.ones(count, bool), novelty)
    chosen = thresholds.choose(outcomes, precision_target=0.9)
    above = int((novelty > chosen.novelty).sum())
    assert above <= 0.01 * count
    assert above >= 0.01 * count - 1


def test_effect_counts_each_reason_and_the_rest() -> None:
    outcomes = made([0.9, 0.5, 0.9, 0.6, 0.9], [True, False, False, False, True], [1, 1, 9, 9, 1])
    found = thresholds.effect(outcomes, Review(confidence=0.8, precision_target=0.9, novelty=5.0))
    assert found == {
        "examples": 5,
        "share_reviewed": pytest.approx(0.6),
        "share_low_confidence": pytest.approx(0.4),
        "share_unlike": pytest.approx(0.4),
        "accuracy": 1.0,
    }


def test_effect_of_reviewing_everything_has_no_accuracy() -> None:
    found = thresholds.effect(made([0.9], [True], [1]), Review(REVIEW_ALL, 0.9, 5.0))
    assert found["accuracy"] is None
    assert found["share_reviewed"] == 1.0


@pytest.mark.parametrize(
    ("confidence", "novelty", "expected"),
    [
        (0.8, 20.0, None),
        (0.79, 20.0, "low-confidence: 0.790 is under 0.800"),
        (0.8, 20.5, "unlike-training: novelty 20.5 is over 20"),
        (
            0.1,
            99.0,
            "unlike-training: novelty 99 is over 20; low-confidence: 0.100 is under 0.800",
        ),
    ],
)
def test_reasons(confidence: float, novelty: float, expected: Any) -> None:
    assert Review(0.8, 0.95, 20.0).reason(confidence, novelty) == expected


def test_what_is_on_a_threshold_is_not_for_review() -> None:
    outcomes = made([0.5, 0.75, 0.75, 0.9], [True, True, False, True], [5, 5, 6, 4])
    found = thresholds.effect(outcomes, Review(confidence=0.75, precision_target=0.9, novelty=5.0))
    assert found == {
        "examples": 4,
        "share_reviewed": 0.5,
        "share_low_confidence": 0.25,
        "share_unlike": 0.25,
        "accuracy": 1.0,
    }


def test_the_accuracy_of_an_effect_is_that_of_what_is_not_reviewed() -> None:
    outcomes = made([0.9] * 5, [True, False, False, True, False], [1, 1, 1, 9, 9])
    found = thresholds.effect(outcomes, Review(confidence=0.8, precision_target=0.9, novelty=5.0))
    assert found["accuracy"] == pytest.approx(1 / 3)


def test_outcomes_by_hand() -> None:
    logits = np.log(np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]], np.float32))
    found = thresholds.outcomes(logits, np.array([1, 1, 2]), np.array([7, 3, 5], np.float32))
    np.testing.assert_allclose(found.confidence, [0.5, 0.6, 0.7], rtol=1e-6)
    assert found.correct.tolist() == [True, False, True]
    assert found.novelty.tolist() == [7, 3, 5]


def test_chosen_thresholds_by_hand() -> None:
    outcomes = made([0.4, 0.6, 0.8], [False, True, True], [3, 9, 1])
    found = thresholds.choose(outcomes, precision_target=0.9)
    assert found == Review(confidence=float(np.float32(0.6)), precision_target=0.9, novelty=9.0)
    # Two of three are right in all, and that is enough.
    assert thresholds.choose(outcomes, precision_target=0.66).confidence == 0.0


@pytest.mark.parametrize(
    ("count", "above"), [(30, 0), (99, 0), (101, 0), (199, 1), (250, 1), (1000, 9)]
)
def test_the_threshold_of_novelty_has_a_hundredth_of_new_ones_above(count: int, above: int) -> None:
    novelty = np.random.default_rng(0).permutation(count).astype(np.float32)
    outcomes = Outcomes(np.ones(count, np.float32), np.ones(count, bool), novelty)
    assert thresholds.choose(outcomes, precision_target=0.9).novelty == count - 1 - above


def simulated(generator: np.random.Generator, count: int) -> Outcomes:
    """A model that is right as often as its confidence says; precision over t is (1 + t) / 2."""
    confidence = generator.random(count)
    return Outcomes(
        confidence.astype(np.float32),
        generator.random(count) < confidence,
        generator.random(count).astype(np.float32),
    )


@pytest.mark.parametrize("examples", [60, 300, 2000])
def test_a_guaranteed_precision_holds_on_others_as_often_as_it_says(examples: int) -> None:
    generator = np.random.default_rng(examples)
    missed = {None: 0, 0.9: 0}
    for _ in range(150):
        valid = simulated(generator, examples)
        for guarantee in missed:
            chosen = thresholds.choose(valid, precision_target=0.95, guarantee=guarantee)
            missed[guarantee] += (1 + chosen.confidence) / 2 < 0.95
    assert binom.sf(missed[0.9] - 1, 150, 0.1) > 1e-3
    assert missed[None] > 40, "which is why it is said"


@pytest.mark.parametrize("examples", [30, 101, 150, 1000])
def test_the_share_of_new_photographs_over_the_novelty_is_as_stated(examples: int) -> None:
    generator, draws = np.random.default_rng(examples), 2000
    _, stated = thresholds.novelty_rank(examples)
    assert stated <= max(0.01, 1 / (examples + 1)) + 1e-12
    over = [
        1 - thresholds.choose(simulated(generator, examples), precision_target=0.5).novelty
        for _ in range(draws)
    ]
    assert np.mean(over) == pytest.approx(stated, abs=4 * np.std(over) / np.sqrt(draws))


def test_a_reason_does_not_contradict_itself_by_rounding() -> None:
    review = Review(confidence=0.99996, precision_target=0.95, novelty=31.2599)
    assert review.reason(0.99958, 31.2604) == (
        "unlike-training: novelty 31.2604 is over 31.2599; low-confidence: 0.9996 is under 1.0000"
    )
