"""How right a night was, on nights whose answers are drawn."""

import numpy as np
import pytest

from leafnet.metrics.estimate import audited, expected
from leafnet.metrics.scores import scores, softmax, tally


def confident(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn by their probabilities: calibrated to the last digit."""
    logits = (3 * rng.standard_normal((count, 3))).astype(np.float32)
    chance = rng.random((count, 1))
    labels = (softmax(logits).astype(float).cumsum(axis=1) < chance).sum(axis=1).clip(0, 2)
    return logits, labels


def test_the_expected_accuracy_covers_that_of_the_night() -> None:
    rng = np.random.default_rng(0)
    covered, errors = [], []
    for _ in range(500):
        calibration = scores(tally(*confident(300, rng)), "abc")["calibration"]
        logits, labels = confident(int(rng.integers(50, 501)), rng)
        sure = softmax(logits).max(axis=1).astype(float)
        found = expected(len(sure), sure.sum(), (sure**2).sum(), calibration)
        assert found is not None
        right = (logits.argmax(axis=1) == labels).mean()
        covered.append(found.low <= right <= found.high)
        errors.append(found.value - right)
    assert 0.93 <= np.mean(covered) <= 0.995
    assert abs(np.mean(errors)) < 0.005


def test_a_model_that_is_surer_than_right_is_not_taken_at_its_word() -> None:
    told = [{"confidence": 0.95, "accuracy": 0.75, "count": 400}]
    found = expected(400, 380.0, 361.0, told)
    assert found is not None
    assert found.value == pytest.approx(0.95)
    assert found.low < 0.78
    assert found.high == pytest.approx(0.95 + 1.96 * np.sqrt(19 / 400**2 + 0.75 * 0.25 / 400))


@pytest.mark.parametrize(("count", "told"), [(0, [{"count": 9}]), (9, [])])
def test_nothing_is_expected_of_nothing(count: int, told: list[dict[str, float]]) -> None:
    assert expected(count, 0.9 * count, 0.81 * count, told) is None


@pytest.mark.parametrize("looked", [20, 50])
@pytest.mark.parametrize("accuracy", [0.7, 0.9, 0.95, 0.99])
def test_an_audit_covers_and_is_right_on_average(looked: int, accuracy: float) -> None:
    total, chosen = 500, 40
    rng = np.random.default_rng(1)
    right = np.arange(total) < round(accuracy * total)
    # Chosen for their doubts: most of them are wrong.
    order = np.argsort(right + 0.3 * rng.random(total))
    doubtful, rest = order[:chosen], order[chosen:]
    known = int(right[doubtful].sum())
    covered, values = [], []
    draws = [int(right[rng.choice(rest, looked, replace=False)].sum()) for _ in range(1500)]
    for of_draw, times in zip(*np.unique(draws, return_counts=True), strict=True):
        found = audited(int(of_draw), looked, total, chosen_right=known, chosen=chosen)
        assert found is not None
        covered += [found.low - 1e-9 <= right.mean() <= found.high + 1e-9] * times
        values += [found.value] * times
    assert np.mean(covered) >= 0.94
    assert np.mean(values) == pytest.approx(right.mean(), abs=0.006)


def test_ends_of_an_audit() -> None:
    assert audited(0, 0, 10) is None
    assert audited(0, 0, 10, chosen_right=5, chosen=9) is None
    everything = audited(0, 0, 9, chosen_right=6, chosen=9)
    assert everything == (6 / 9, 6 / 9, 6 / 9)
    assert audited(7, 10, 10) == (0.7, 0.7, 0.7)
    # All of 20 were right: 1 - 0.025^(1/20) could be wrong, of so many that none is left out.
    found = audited(20, 20, 1_000_000)
    assert found is not None
    assert found.high == 1.0
    assert found.low == pytest.approx(0.025 ** (1 / 20), abs=1e-4)
    with pytest.raises(ValueError, match="21 right of 20"):
        audited(21, 20, 100)
