"""How sure a figure is: bootstrap intervals, and whether two models differ.

All of it works on counts. Examples of the same true class, predicted class and confidence are
alike for every figure, so resampling them is one multinomial draw over the kinds that occur, and
2,000 resamples of a million examples take as long as those of a thousand. N examples, C classes,
K kinds, R resamples.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from leafnet.metrics import calibration
from leafnet.metrics.scores import CALIBRATION_BINS, softmax

RESAMPLES = 2000
_CELLS_AT_ONCE = 4_000_000  # of resamples x kinds, which bounds memory
_TAILS = (0.025, 0.975)

Interval = tuple[float, float]


class Comparison(NamedTuple):
    """Two models on the same examples."""

    only_ours: int  # examples that the first has right and the second wrong
    only_theirs: int
    p_value: float  # McNemar's exact test, two-sided
    difference: float  # accuracy of the first minus that of the second
    interval: Interval  # of the difference, 95 %


def intervals(
    logits: NDArray[np.float32],
    labels: NDArray[np.integer],
    *,
    groups: NDArray[np.integer] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:
    """95 % bootstrap intervals of `accuracy`, `macro_f1` and `ece` (Efron and Tibshirani 1993).

    Plain resampling of examples, so class shares vary as they would in another test set. The
    interval is that of percentiles; only the calibration error's is reflected at the estimate
    (their "basic" interval), because a resample's is on average larger than what it is drawn from
    by as much as that is larger than the truth; it holds the estimate all the same, and begins at 0
    where chance gives a perfectly calibrated model as much. Confidences are rounded within a 150th,
    which moves the calibration error by far less than its interval.

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
    support, named = _indicator(true, classes), _indicator(guessed, classes)
    gaps = _indicator(bins, CALIBRATION_BINS, right - sure)
    found: dict[str, list[NDArray[np.float64]]] = {"accuracy": [], "macro_f1": [], "ece": []}

    def measure(counts: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        of_class = counts @ hits
        f1 = 2 * of_class / np.maximum(counts @ support + counts @ named, 1)
        total = counts.sum(axis=1)
        return {
            "accuracy": of_class.sum(axis=1) / total,
            "macro_f1": f1.mean(axis=1),
            "ece": np.abs(counts @ gaps).sum(axis=1) / total,
        }

    for counts in _resampled(kind, groups=groups, seed=seed, resamples=resamples):
        for name, values in measure(counts).items():
            found[name].append(values)
    result = {name: _percentiles(np.concatenate(parts)) for name, parts in found.items()}
    whole = float(measure(np.bincount(kind)[None].astype(float))["ece"][0])
    low, high = result["ece"]
    by_chance = calibration.ece_if_calibrated(confidence, seed=seed)["high"]
    lowest = 0.0 if whole <= by_chance else max(0.0, 2 * whole - high)
    result["ece"] = (lowest, max(whole, 2 * whole - low))
    return result


def compare(
    ours: NDArray[np.bool_],
    theirs: NDArray[np.bool_],
    *,
    groups: NDArray[np.integer] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Whether the first of two models is right more often, on the same N >= 1 examples.

    Args:
        ours: [N], examples that the first has right.
        theirs: [N], the same of the second.
        groups: as in `intervals`; the test itself takes examples as independent.
        seed: of the resamples.
        resamples: R.
    """
    kinds, kind = np.unique(2 * ours + theirs, return_inverse=True)
    gains = kinds // 2 - kinds % 2
    differences = [
        (counts @ gains) / counts.sum(axis=1)
        for counts in _resampled(kind, groups=groups, seed=seed, resamples=resamples)
    ]
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    return Comparison(
        only_ours,
        only_theirs,
        mcnemar(only_ours, only_theirs),
        (only_ours - only_theirs) / len(ours),
        _percentiles(np.concatenate(differences)),
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
    kind: NDArray[np.integer], *, groups: NDArray[np.integer] | None, seed: int, resamples: int
) -> Iterator[NDArray[np.float64]]:
    """The counts [R', K] of each kind in resamples of the examples, some resamples at a time."""
    generator = np.random.default_rng(seed)
    counts = np.bincount(kind)
    if groups is None:
        drawn, shares, made = len(kind), counts / len(kind), None
    else:
        _, group = np.unique(groups, return_inverse=True)
        drawn = int(group.max()) + 1
        shares = np.full(drawn, 1 / drawn)
        ones = np.ones(len(kind))
        made = scipy.sparse.csr_array((ones, (group, kind)), shape=(drawn, len(counts)))
    step = max(1, _CELLS_AT_ONCE // max(len(shares), len(counts)))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        weights = generator.multinomial(drawn, shares, size).astype(np.float64)
        yield weights if made is None else weights @ made


def _indicator(
    column: NDArray[np.integer], columns: int, values: NDArray[np.floating] | None = None
) -> Any:
    """A sparse [K, columns] with `values` (none: 1) in the `column` of each row."""
    rows = np.arange(len(column))
    given = np.ones(len(column)) if values is None else values
    return scipy.sparse.csr_array((given, (rows, column)), shape=(len(column), columns))


def _percentiles(values: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values, _TAILS)
    return float(low), float(high)
