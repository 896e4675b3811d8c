"""How sure a figure is: intervals that hold at any size, and whether two models differ.

A share of independent examples has the exact interval of Clopper and Pearson 1934
(`scores.exact_interval`). Whatever else, a figure of groups of examples, a mean of F1 or a
difference, is drawn again with weights from a Dirichlet distribution (the Bayesian bootstrap,
Rubin 1981) over the examples, or groups, and one more that nobody has seen: for the lower end it is
as bad as can be, for the upper end as good. For a share that is the interval of Clopper and Pearson
again, and for the mean of anything bounded it is Gaffke's bound (Gaffke 2005; Learned-Miller and
Thomas 2019, arXiv:1905.06208), which holds however few are seen and at 0 % and 100 % too; a
resample of what was seen can never say more than that.

All of it works on counts: examples of the same true class, predicted class and confidence are
alike, and their weights add up to one gamma variate. N examples, C classes, K kinds, R resamples.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from leafnet.metrics import calibration
from leafnet.metrics.scores import CALIBRATION_BINS, exact_interval, softmax

RESAMPLES = 2000
FEW_GROUPS = 20  # of fewer the interval holds, and is wide
_CELLS_AT_ONCE = 4_000_000  # of resamples x kinds, which bounds memory
_MAX_UNITS = 1000

Interval = tuple[float, float]


class Comparison(NamedTuple):
    """Two models on the same examples."""

    only_ours: int  # examples that the first has right and the second wrong
    only_theirs: int
    p_value: float  # McNemar's exact test, two-sided
    difference: float  # accuracy of the first minus that of the second
    interval: Interval  # of the difference


def intervals(
    logits: NDArray[np.float32],
    labels: NDArray[np.integer],
    *,
    groups: NDArray[np.integer] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:
    """95 % intervals of `accuracy`, `macro_f1` and `ece`.

    Class shares vary as they would in another test set. The unseen example is taken for one of the
    class that it moves the most. F1 of few examples is too low on average, and a resample's lower
    again by as much: the upper end makes up for both. A class without an example counts as 0 in
    the interval as in the figure. The calibration error of few examples is too large on average: it
    is at most the truth's and what chance gives a perfectly calibrated model together, so that the
    lower end is what is left of it, or the upper end reflected (the "basic" interval of Efron and
    Tibshirani 1993), whichever is lower. Confidences are rounded within a 150th.

    Args:
        logits: [N, C], N >= 1.
        labels: [N], class indices.
        groups: [N], such as the plant of each photograph: whole groups are resampled then, as
            examples of one are not independent.
        seed: of the resamples.
        resamples: R.
    """
    probabilities = softmax(logits)
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1).astype(np.float64)
    classes, levels = logits.shape[1], CALIBRATION_BINS * 10
    code = (labels.astype(np.int64) * classes + predicted) * levels
    code += calibration.confidence_levels(confidence)
    kinds, kind = np.unique(code, return_inverse=True)
    sure = np.bincount(kind, confidence) / np.bincount(kind)
    true, guessed = np.divmod(kinds // levels, classes)
    bins = calibration.level_bins(kinds % levels)
    right = true == guessed

    hits = _indicator(true, classes, right.astype(float))
    sizes = _indicator(true, classes) + _indicator(guessed, classes)
    gaps = _indicator(bins, CALIBRATION_BINS, right - sure)
    whole = np.bincount(kind)[None].astype(float)
    f1 = _MacroF1(whole @ hits, whole @ sizes, np.bincount(labels, minlength=classes) > 0)
    low, high, plain, errors = [], [], [], []
    step = {"groups": groups, "seed": seed, "resamples": resamples, "columns": classes}
    for counts, unseen in _resampled(kind, **step):
        drawn, size = counts @ hits, counts @ sizes
        plain.append(f1.of(drawn, size))
        low.append(f1.with_an_error(drawn, size, unseen))
        high.append(f1.with_a_hit(drawn, size, unseen))
        total = counts.sum(axis=1)
        errors.append((np.abs(counts @ gaps).sum(axis=1) + unseen) / (total + unseen))
    too_low = max(0.0, f1.estimate - float(np.concatenate(plain).mean()))
    error = float(np.abs(whole @ gaps).sum() / len(labels))
    by_chance = calibration.ece_if_calibrated(confidence, seed=seed)["high"]
    highest = float(np.quantile(np.concatenate(errors), 0.975))
    return {
        "accuracy": share(predicted == labels, groups=groups, seed=seed, resamples=resamples),
        "macro_f1": (
            float(np.quantile(np.concatenate(low), 0.025)),
            min(f1.highest, float(np.quantile(np.concatenate(high), 0.975)) + 2 * too_low),
        ),
        "ece": (
            max(0.0, min(error - by_chance, 2 * error - highest)),
            highest,
        ),
    }


class _MacroF1:
    """The mean of F1 over all classes, of weights [R, C] of hits and of labels and predictions."""

    def __init__(self, hits: Any, sizes: Any, present: NDArray[np.bool_]) -> None:
        self.estimate = float(self.of(hits, sizes)[0])
        self.highest = float(present.mean())
        f1 = 2 * hits[0] / np.maximum(sizes[0], 1)
        # Whose F1 one more error, or hit, moves the most.
        by_size = np.argsort(np.where(present, sizes[0], np.inf), kind="stable")
        self._smallest = by_size[:2]
        self._weakest = int(np.argmax(np.where(present, (1 - f1) / np.maximum(sizes[0], 1), -1)))

    def of(self, hits: Any, sizes: Any) -> NDArray[np.float64]:
        """[R]."""
        found: NDArray[np.float64] = (2 * hits / np.where(sizes > 0, sizes, 1)).mean(axis=1)
        return found

    def with_an_error(self, hits: Any, sizes: Any, weight: Any) -> NDArray[np.float64]:
        """[R], with one class taken for another, of `weight` [R] examples."""
        sizes = sizes.copy()
        sizes[:, self._smallest] += weight[:, None]
        return self.of(hits, sizes)

    def with_a_hit(self, hits: Any, sizes: Any, weight: Any) -> NDArray[np.float64]:
        """[R], with one example more that is right, of `weight` [R]."""
        hits, sizes = hits.copy(), sizes.copy()
        hits[:, self._weakest] += weight
        sizes[:, self._weakest] += 2 * weight
        return self.of(hits, sizes)


def share(
    right: NDArray[np.bool_],
    *,
    groups: NDArray[np.integer] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """The 95 % interval of the share of `right` [N], of groups [N] or of independent examples."""
    if groups is None or not len(right):
        return exact_interval(int(right.sum()), len(right))
    return _of_mean(right, groups=groups, seed=seed, resamples=resamples, lowest=0, tail=0.025)


def compare(
    ours: NDArray[np.bool_],
    theirs: NDArray[np.bool_],
    *,
    groups: NDArray[np.integer] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    tail: float = 0.025,
) -> Comparison:
    """Whether the first of two models is right more often, on the same N >= 1 examples.

    Args:
        ours: [N], examples that the first has right.
        theirs: [N], the same of the second.
        groups: as in `intervals`; the test itself takes examples as independent.
        seed: of the resamples.
        resamples: R.
        tail: share of test sets in which the truth is below the interval, and above it, at most.
    """
    gains = ours.astype(np.int64) - theirs
    only_ours, only_theirs = int((gains > 0).sum()), int((gains < 0).sum())
    return Comparison(
        only_ours,
        only_theirs,
        mcnemar(only_ours, only_theirs),
        (only_ours - only_theirs) / len(ours),
        _of_mean(gains, groups=groups, seed=seed, resamples=resamples, lowest=-1, tail=tail),
    )


def _of_mean(
    values: NDArray[Any],
    *,
    groups: NDArray[np.integer] | None,
    seed: int,
    resamples: int,
    lowest: int,
    tail: float,
) -> Interval:
    """Gaffke's interval for the mean of `values` [N], integers from `lowest` to 1."""
    kinds, kind = np.unique(values, return_inverse=True)
    low, high = [], []
    drawn = _resampled(kind, groups=groups, seed=seed, resamples=resamples, columns=1)
    for counts, unseen in drawn:
        total, sums = counts.sum(axis=1) + unseen, counts @ kinds
        low.append((sums + lowest * unseen) / total)
        high.append((sums + unseen) / total)
    return (
        float(np.quantile(np.concatenate(low), tail)),
        float(np.quantile(np.concatenate(high), 1 - tail)),
    )


def mcnemar(only_ours: int, only_theirs: int) -> float:
    """Two-sided p-value that two models are right equally often, exact.

    McNemar 1947, "Note on the sampling error of the difference between correlated proportions",
    Psychometrika 12:153-157, with the binomial distribution in place of chi-squared: of the
    examples that exactly one of them has right, either has half.

    >>> mcnemar(0, 0), mcnemar(5, 0), mcnemar(9, 1)  # 2 / 2^5, and 2 (1 + 10) / 2^10
    (1.0, 0.0625, 0.021484375)
    """
    # Half a second of the start of every job that may need it.
    import scipy.stats

    decided = only_ours + only_theirs
    if not decided:
        return 1.0
    return float(scipy.stats.binomtest(min(only_ours, only_theirs), decided, 0.5).pvalue)


def _resampled(
    kind: NDArray[np.integer],
    *,
    groups: NDArray[np.integer] | None,
    seed: int,
    resamples: int,
    columns: int,
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(weights [R', K] of each kind, weight [R'] of the unseen), some resamples at a time.

    A weight is a sum of standard exponential variates, one for each example or each example's
    group; what is unseen is one example, or a group of the mean size. `columns` is the width of
    what the caller makes of the weights.
    """
    generator = np.random.default_rng(seed)
    counts = np.bincount(kind).astype(np.float64)
    shapes, made, unit_size = counts, None, 1.0
    if groups is not None:
        unit = units(len(kind), groups=groups, seed=seed)
        shapes = np.ones(int(unit.max()) + 1)
        ones = np.ones(len(kind))
        made = scipy.sparse.csr_array((ones, (unit, kind)), shape=(len(shapes), len(counts)))
        unit_size = len(kind) / len(shapes)
    step = max(1, _CELLS_AT_ONCE // max(len(shapes), len(counts), columns))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        weights = generator.standard_gamma(shapes, (size, len(shapes)))
        unseen = unit_size * generator.standard_exponential(size)
        yield weights if made is None else weights @ made, unseen


def units(examples: int, *, groups: NDArray[np.integer] | None, seed: int) -> NDArray[np.int64]:
    """What is drawn together, [N] numbers from 0: groups, or examples, or at most 1,000 of both.

    More are put together by chance, which leaves them independent of each other and bounds time.
    """
    alone = np.arange(examples) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(alone.max()) + 1
    shuffled: NDArray[np.int64] = np.random.default_rng(seed).permutation(count)[alone]
    return shuffled % _MAX_UNITS


def _indicator(
    column: NDArray[np.integer], columns: int, values: NDArray[np.floating] | None = None
) -> Any:
    """A sparse [K, columns] with `values` (none: 1) in the `column` of each row."""
    rows = np.arange(len(column))
    given = np.ones(len(column)) if values is None else values
    return scipy.sparse.csr_array((given, (rows, column)), shape=(len(column), columns))
