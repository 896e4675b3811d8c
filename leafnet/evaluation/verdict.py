"""Whether one model is worse than another, from what both make of the same examples.

N examples, C classes. Shares are from 0 to 1, differences of accuracy in points (hundredths).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leafnet.metrics import bootstrap
from leafnet.metrics import scores as metrics_scores
from leafnet.metrics.scores import tally

Logits = NDArray[np.float32]  # [N, C]
Labels = NDArray[np.int64]  # [N]
Outcome = Literal["better", "tie", "worse"]


@dataclass(frozen=True)
class Rule:
    """What a candidate has to reach."""

    margin: float  # points
    min_recall: float  # of every class
    recall: Mapping[str, float]  # of some classes, in place of that
    max_ece_rise: float
    resamples: int
    seed: int


class Interval(NamedTuple):
    """The difference of two accuracies and its 95 % interval [points]."""

    difference: float
    low: float
    high: float


class Check(NamedTuple):
    """One line of the comparison."""

    name: str
    candidate: float
    champion: float | None  # None: there is no champion
    wanted: str
    passed: bool
    told: str  # what is wrong if it did not pass


@dataclass(frozen=True)
class Verdict:
    """How a comparison came out."""

    outcome: Outcome
    checks: tuple[Check, ...]
    difference: Interval | None  # candidate less champion; None: there is no champion

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that make it worse."""
        return tuple(check for check in self.checks if not check.passed)


def accuracy_difference(
    candidate: NDArray[np.bool_], champion: NDArray[np.bool_], *, resamples: int, seed: int
) -> Interval:
    """Accuracy of the candidate less that of the champion, with a paired bootstrap interval.

    In points; see `bootstrap.compare`. It takes the examples as independent: photographs of the
    same plant make the true uncertainty larger.

    Args:
        candidate: [N], N >= 1, whether it has the example right.
        champion: [N], likewise.
        resamples: how often the examples are drawn.
        seed: of the draws.

    >>> right = np.array([True, True, False])
    >>> accuracy_difference(right, right, resamples=100, seed=0)
    Interval(difference=0.0, low=0.0, high=0.0)
    """
    found = bootstrap.compare(candidate, champion, seed=seed, resamples=resamples)
    low, high = found.interval
    return Interval(100 * found.difference, 100 * low, 100 * high)


def compare(
    candidate: Logits,
    champion: Logits | None,
    labels: Labels,
    *,
    class_names: Sequence[str],
    rule: Rule,
) -> Verdict:
    """Whether the candidate is better than the champion, as good, or worse.

    Worse: the interval of the difference in accuracy reaches below minus the margin, a class is
    found less often than its floor, or the calibration error rose too much. As good (a tie): not
    worse, but of an accuracy that is at most the champion's; a champion that gave way to such
    candidates again and again would lose up to the margin each time. Without a champion only the
    floors count, and who reaches them is better.

    Args:
        candidate: logits of the candidate.
        champion: logits of the champion for the same examples; None: there is none.
        labels: the true classes.
        class_names: in the order of the logits.
        rule: what the candidate has to reach.
    """
    mine = metrics_scores.scores(tally(candidate, labels), class_names)
    theirs = None
    if champion is not None:
        theirs = metrics_scores.scores(tally(champion, labels), class_names)
    checks = [Check("accuracy", mine["accuracy"], _of(theirs, "accuracy"), "", True, "")]
    difference = None
    # Rounding must not decide where a figure and its limit are the same number.
    slack = 1e-9
    if champion is not None:
        difference = accuracy_difference(
            candidate.argmax(axis=1) == labels,
            champion.argmax(axis=1) == labels,
            resamples=rule.resamples,
            seed=rule.seed,
        )
        interval = f"{difference.low:+.1f} to {difference.high:+.1f}"
        checks.append(
            Check(
                "lead [points]",
                difference.difference,
                None,
                f"{interval}, over {0 - rule.margin:+.1f}",
                difference.low >= -rule.margin - slack,
                f"it may be {-difference.low:.1f} points less accurate than the champion, more "
                f"than {rule.margin:g} (lead {difference.difference:+.1f}, 95 % interval "
                f"{interval})",
            )
        )
    for name in class_names:
        found, floor = mine["per_class"][name], rule.recall.get(name, rule.min_recall)
        if not found["support"]:
            continue
        checks.append(
            Check(
                f"recall of {name}",
                found["recall"],
                theirs["per_class"][name]["recall"] if theirs else None,
                f"at least {floor:.3f}",
                found["recall"] >= floor - slack,
                f"it finds {found['recall']:.3f} of {name}, wanted at least {floor:.3f}",
            )
        )
    if theirs:
        limit = theirs["ece"] + rule.max_ece_rise
        told = f"its calibration error is {mine['ece']:.3f}, wanted at most {limit:.3f}"
        passed = mine["ece"] <= limit + slack
        checks.append(
            Check("ECE", mine["ece"], theirs["ece"], f"at most {limit:.3f}", passed, told)
        )
    else:
        checks.append(Check("ECE", mine["ece"], None, "", True, ""))
    outcome: Outcome = "better"
    if not all(check.passed for check in checks):
        outcome = "worse"
    elif difference is not None and difference.difference <= 0:
        outcome = "tie"
    return Verdict(outcome, tuple(checks), difference)


def _of(scores: dict[str, Any] | None, name: str) -> float | None:
    return float(scores[name]) if scores else None


def document(verdict: Verdict) -> dict[str, Any]:
    """A verdict, ready for JSON."""
    found = verdict.difference
    return {
        "outcome": verdict.outcome,
        "difference_points": found._asdict() if found else None,
        "checks": [check._asdict() for check in verdict.checks],
    }
