"""Whether one model is worse than another, from what both make of the same examples.

N examples, C classes. Shares are from 0 to 1, differences of accuracy in points (hundredths).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leafnet.metrics import intervals
from leafnet.metrics import scores as metrics_scores
from leafnet.metrics.calibration import confidence_levels, ece_if_calibrated, level_bins
from leafnet.metrics.intervals import units
from leafnet.metrics.rounding import apart
from leafnet.metrics.scores import CALIBRATION_BINS, softmax, tally

Logits = NDArray[np.float32]  # [N, C]
Labels = NDArray[np.int64]  # [N]
Outcome = Literal["better", "tie", "unclear", "worse"]
_RATE = 0.05  # of wrong answers that a check may give
_SLACK = 1e-9  # rounding must not decide where a figure and its limit are the same number
_AT_ONCE = 500  # draws


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
    """The difference of two accuracies and its 90 % interval [points]."""

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
    unclear: bool = False  # it did not pass, and may only be too little to tell


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
    candidate: NDArray[np.bool_],
    champion: NDArray[np.bool_],
    *,
    groups: NDArray[np.integer] | None = None,
    resamples: int,
    seed: int,
) -> Interval:
    """Accuracy of the candidate less that of the champion, with the interval that decides.

    In points; see `intervals.compare`. The truth is below the interval in 5 % of test sets at most,
    however few examples there are and however few differ, and above it in 5 %.

    Args:
        candidate: [N], N >= 1, whether it has the example right.
        champion: [N], likewise.
        groups: [N], of examples that are not independent; None: all are.
        resamples: how often the examples are drawn.
        seed: of the draws.

    >>> right = np.array([True, True, False])
    >>> found = accuracy_difference(right, right, resamples=1000, seed=0)
    >>> found.low < -50, found.difference, found.high > 50
    (True, 0.0, True)
    """
    found = intervals.compare(
        candidate, champion, groups=groups, seed=seed, resamples=resamples, tail=_RATE
    )
    low, high = found.interval
    return Interval(100 * found.difference, 100 * low, 100 * high)


def compare(
    candidate: Logits,
    champion: Logits | None,
    labels: Labels,
    *,
    class_names: Sequence[str],
    rule: Rule,
    groups: NDArray[np.integer] | None = None,
) -> Verdict:
    """Whether the candidate is better than the champion, as good, or worse, or it cannot be told.

    Worse: the interval of the difference in accuracy reaches below minus the margin, a class is
    found less often than its floor, or the calibration error rose by more than is allowed and than
    chance explains. Unclear: it is but the interval that fails, and the champion may be no better:
    the test split is too small to tell. As good (a tie): neither, but of an accuracy that is at
    most the champion's; a champion that gave way to such candidates again and again would lose up
    to the margin each time. Without a champion only the floors count, and who reaches them is
    better.

    A candidate that is worse by the margin or more passes in at most 5 % of test splits, and one
    that is calibrated as the champion is is refused for that in at most 5 %, whatever their size.

    Args:
        candidate: logits of the candidate.
        champion: logits of the champion for the same examples; None: there is none.
        labels: the true classes.
        class_names: in the order of the logits.
        rule: what the candidate has to reach.
        groups: [N], of examples that are not independent; None: all are.
    """
    mine = metrics_scores.scores(tally(candidate, labels), class_names)
    theirs = None
    if champion is not None:
        theirs = metrics_scores.scores(tally(champion, labels), class_names)
    checks = [Check("accuracy", mine["accuracy"], _of(theirs, "accuracy"), "", True, "")]
    difference = None
    if champion is not None:
        difference = accuracy_difference(
            candidate.argmax(axis=1) == labels,
            champion.argmax(axis=1) == labels,
            groups=groups,
            resamples=rule.resamples,
            seed=rule.seed,
        )
        checks.append(_lead(difference, rule.margin, len(labels)))
    checks += [
        _recall(name, mine["per_class"][name], theirs and theirs["per_class"][name], rule)
        for name in class_names
        if mine["per_class"][name]["support"]
    ]
    if theirs and champion is not None:
        by_chance = ece_rise_by_chance(candidate, champion, labels, groups=groups, rule=rule)
        checks.append(_calibration(mine["ece"], theirs["ece"], by_chance, rule.max_ece_rise))
    else:
        checks.append(Check("ECE", mine["ece"], None, "", True, ""))
    outcome: Outcome = "better"
    failed = [check for check in checks if not check.passed]
    if failed:
        outcome = "unclear" if all(check.unclear for check in failed) else "worse"
    elif difference is not None and difference.difference <= 0:
        outcome = "tie"
    return Verdict(outcome, tuple(checks), difference)


def _lead(difference: Interval, margin: float, examples: int) -> Check:
    interval = f"{difference.low:+.1f} to {difference.high:+.1f}"
    below, limit = apart(-difference.low, margin, ".1f")
    told = f"lead {difference.difference:+.1f}, 90 % interval {interval}"
    told = f"it may be {below} points less accurate than the champion, more than {limit} ({told})"
    unclear = difference.high >= 0
    if unclear:
        told = f"{examples:,} test photographs are too few to tell: {told}"
        slack = difference.difference + margin
        if slack > 0:
            # The interval's width falls with the root of the examples.
            wanted = examples * ((difference.difference - difference.low) / slack) ** 2
            told += f"; about {float(f'{wanted:.1g}'):,.0f} would tell, were the lead the same"
    return Check(
        "lead [points]",
        difference.difference,
        None,
        f"{interval}, over {0 - margin:+.1f}",
        difference.low >= -margin - _SLACK,
        told,
        unclear,
    )


def _recall(name: str, mine: Mapping[str, Any], theirs: Any, rule: Rule) -> Check:
    floor = rule.recall.get(name, rule.min_recall)
    found, wanted = apart(mine["recall"], floor)
    told = f"it finds {found} of {name}, wanted at least {wanted}"
    if mine["recall_high"] >= floor:
        told += (
            f" (of {mine['support']:,} photographs: 95 % interval {mine['recall_low']:.3f} to "
            f"{mine['recall_high']:.3f})"
        )
    return Check(
        f"recall of {name}",
        mine["recall"],
        theirs["recall"] if theirs else None,
        f"at least {floor:.3f}",
        mine["recall"] >= floor - _SLACK,
        told,
    )


def _calibration(mine: float, theirs: float, by_chance: float, max_rise: float) -> Check:
    limit = theirs + max(max_rise, by_chance)
    found, wanted = apart(mine, limit)
    by = f", {by_chance:.3f} more by chance" if by_chance > max_rise else ""
    told = f"its calibration error is {found}, wanted at most {wanted}"
    return Check("ECE", mine, theirs, f"at most {limit:.3f}{by}", mine <= limit + _SLACK, told)


def ece_rise_by_chance(
    candidate: Logits,
    champion: Logits,
    labels: Labels,
    *,
    groups: NDArray[np.integer] | None = None,
    rule: Rule,
) -> float:
    """The rise of the calibration error that equal models have in 5 % of test sets.

    A permutation test (Good 2005, "Permutation, parametric and bootstrap tests of hypotheses"): of
    two models that are equally calibrated either answer to an example could be that of the other,
    so they change places at random, in every example or group. One that is less sure of itself has
    the larger error by chance (`calibration.ece_if_calibrated`), and that is added.
    """
    gaps = np.stack([_gaps(logits, labels) for logits in (candidate, champion)])
    unit = units(len(labels), groups=groups, seed=rule.seed)
    whole = gaps.sum(axis=1)
    changed = np.zeros((int(unit.max()) + 1, CALIBRATION_BINS))
    np.add.at(changed, unit, gaps[1] - gaps[0])
    generator = np.random.default_rng(rule.seed)
    rises = []
    for start in range(0, rule.resamples, _AT_ONCE):
        size = min(_AT_ONCE, rule.resamples - start)
        moved = generator.integers(0, 2, (size, len(changed))).astype(np.float64) @ changed
        errors = [np.abs(whole[0] + moved).sum(axis=1), np.abs(whole[1] - moved).sum(axis=1)]
        rises.append((errors[0] - errors[1]) / len(labels))
    calibrated = [
        ece_if_calibrated(softmax(logits).max(axis=1), seed=rule.seed)["mean"]
        for logits in (candidate, champion)
    ]
    chance = float(np.quantile(np.concatenate(rises), 1 - _RATE, method="higher"))
    return chance + max(0.0, calibrated[0] - calibrated[1])


def _gaps(logits: Logits, labels: Labels) -> NDArray[np.float64]:
    """[N, bins], of each example whether it is right less its confidence, in its bin."""
    probabilities = softmax(logits)
    confidence = probabilities.max(axis=1).astype(np.float64)
    found = np.zeros((len(labels), CALIBRATION_BINS))
    bins = level_bins(confidence_levels(confidence))
    found[np.arange(len(labels)), bins] = (probabilities.argmax(axis=1) == labels) - confidence
    return found


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
