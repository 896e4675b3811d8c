"""One verdict of several photographs of the same thing, such as a plant.

Photographs of one plant are not independent: the same light and the same odd leaf mislead the
model each time. How much alike they are is measured on the units themselves, and so many
photographs count for fewer. N photographs, U units, C classes.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

# A model's probabilities are not known better than this.
_SMALLEST = 1e-4


def likeness(probabilities: NDArray[np.floating], units: Ints) -> float:
    """How much alike photographs of one unit are, 0 (independent) to 1 (copies), on the safe side.

    The intraclass correlation of the logarithms of probabilities (Donner 1986, "A review of
    inference procedures for the intraclass correlation coefficient", doi:10.2307/1403259; the
    analysis-of-variance estimate), around the mean of the units with the same verdict, since that
    they have one class in common is no likeness; plus its standard error, so that few units count
    as more alike. 1 where no unit has two photographs.

    Args:
        probabilities: [N, C].
        units: [N], 0 to U - 1, each of which occurs.
    """
    logs = _logs(probabilities)
    counts = np.bincount(units).astype(float)
    means = _sums(logs, units) / counts[:, None]
    _, group = np.unique(means.argmax(axis=1), return_inverse=True)
    degrees, inside = len(counts) - (group.max() + 1), len(logs) - len(counts)
    if degrees < 1 or inside < 1:
        return 1.0
    of_group = _sums(counts[:, None] * means, group) / np.bincount(group, counts)[:, None]
    between = (counts @ (means - of_group[group]) ** 2).sum() / degrees
    within = ((logs - means[units]) ** 2).sum() / inside
    size = (len(logs) - (counts**2).sum() / len(logs)) / max(len(counts) - 1, 1)
    if between + within == 0:
        return 1.0
    found = float((between - within) / (between + (size - 1) * within))
    inflated = (1 - found) * (1 + (size - 1) * found)
    error = np.sqrt(2 * inflated**2 / (size * max(size - 1, 1e-9) * degrees))
    return float(np.clip(found + error, 0.0, 1.0))


class Verdicts(NamedTuple):
    """What is said of each unit."""

    probabilities: Array  # [U, C]
    photographs: Ints  # [U]


def combine(
    probabilities: NDArray[np.floating], units: Ints, *, likeness: float, shares: Array
) -> Verdicts:
    """Probabilities of each unit.

    The mean of the logarithms over those of the shares, times the number of independent photographs
    that so many like ones come to, n / (1 + (n - 1) likeness): the design effect of Kish 1965,
    "Survey Sampling", 5.4.

    Args:
        probabilities: [N, C].
        units: [N], 0 to U - 1, each of which occurs.
        likeness: of photographs of one unit.
        shares: [C], of the classes where the probabilities were calibrated.

    >>> twice, half = np.array([[0.8, 0.2]] * 2), np.full(2, 0.5)
    >>> for alike in (0.0, 1.0):
    ...     combine(twice, np.zeros(2, int), likeness=alike, shares=half).probabilities.round(3)
    array([[0.941, 0.059]])
    array([[0.8, 0.2]])
    """
    counts = np.bincount(units)
    prior = np.log(shares)
    sums = _sums(_logs(probabilities) - prior, units) / (1 + (counts - 1) * likeness)[:, None]
    odds = np.exp(sums + prior - (sums + prior).max(axis=1, keepdims=True))
    return Verdicts(odds / odds.sum(axis=1, keepdims=True), counts)


def _logs(probabilities: NDArray[np.floating]) -> Array:
    logs: Array = np.log(np.maximum(probabilities.astype(np.float64), _SMALLEST))
    return logs


def _sums(values: Array, of: Ints) -> Array:
    """The sum over the rows of `values` [N, C] of each group of `of` [N]."""
    return np.stack([np.bincount(of, column) for column in values.T], axis=1)
