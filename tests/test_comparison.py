import numpy as np
import pytest
from numpy.typing import NDArray

from leafnet import comparison
from leafnet.comparison import Rule, Verdict

NAMES = ("a", "b", "c")
LABELS = np.arange(300) % 3


def logits(wrong: int, *, sure: float = 5.0, first: int = 0) -> NDArray[np.float32]:
    """Logits for LABELS of which `wrong`, from `first` on, are of the next class."""
    predicted = LABELS.copy()
    predicted[first : first + wrong] = (predicted[first : first + wrong] + 1) % 3
    return np.array(sure * np.eye(3)[predicted], np.float32)


def judged(
    candidate: NDArray[np.float32], champion: NDArray[np.float32] | None, **changes: object
) -> Verdict:
    values = {
        "margin": 1.0,
        "min_recall": 0.5,
        "recall": {},
        "max_ece_rise": 0.02,
        "resamples": 2000,
        "seed": 0,
    }
    rule = Rule(**(values | changes))  # type: ignore[arg-type]
    return comparison.compare(candidate, champion, LABELS, class_names=NAMES, rule=rule)


def names(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.failed]


def test_better_worse_and_a_tie() -> None:
    champion = logits(30)
    assert judged(logits(0), champion).outcome == "better"
    assert judged(champion, champion).outcome == "tie"
    # Fifteen more are wrong and no other is right.
    worse = judged(logits(45), champion)
    assert (worse.outcome, names(worse)) == ("worse", ["lead [points]", "ECE"])
    # The one that is right instead of another does not make it better, nor surely not worse.
    assert judged(logits(30, first=1), champion).outcome == "tie"
    # As many right, but others: too little is known to call it not worse by a point.
    assert names(judged(logits(30, first=150), champion)) == ["lead [points]"]
    assert judged(logits(30, first=150), champion, margin=10.0).outcome == "tie"


def test_a_class_below_its_floor() -> None:
    champion = logits(150)
    few = logits(0)
    few[LABELS == 2, :] = few[LABELS == 1][:1]  # no example of c is found
    assert names(judged(few, champion)) == ["recall of c"]
    assert judged(few, champion, recall={"c": 0.0}).outcome == "better"
    assert names(judged(logits(3), champion, recall={"b": 1.0})) == ["recall of b"]
    assert judged(few, None).outcome == "worse"
    assert judged(logits(0), None).outcome == "better"


def test_a_calibration_that_got_worse() -> None:
    unsure = logits(0, sure=1.0)  # right, and says 58 %
    assert names(judged(unsure, logits(10))) == ["ECE"]
    assert judged(unsure, logits(10), max_ece_rise=0.5).outcome == "better"


def test_interval_is_that_of_resampling_pairs() -> None:
    """Against the plain bootstrap, which draws examples and not counts of them."""
    generator = np.random.default_rng(1)
    candidate, champion = generator.random(200) < 0.8, generator.random(200) < 0.7
    found = comparison.accuracy_difference(candidate, champion, resamples=20_000, seed=0)
    drawn = generator.integers(0, 200, (20_000, 200))
    plain = 100 * (candidate[drawn].mean(axis=1) - champion[drawn].mean(axis=1))
    assert found.difference == pytest.approx(100 * (candidate.mean() - champion.mean()))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), 0.02)
