"""Whether tonight's photographs are like those that the model was validated on, in one number.

The population stability index compares shares of groups: the sum of (p - q) * ln(p / q). It is
0 for equal shares; over 0.1 is commonly called a small shift and over 0.25 a large one (Siddiqi
2006, "Credit Risk Scorecards"). By chance alone it is about (k - 1) * (1 / n + 1 / m) for k groups
of n and m examples, and above a quantile of chi-squared times the last factor as rarely as that
says (Yurdakul 2018, "Statistical properties of population stability index").
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.special
from numpy.typing import NDArray

from leafnet.metrics.thresholds import Outcomes

BINS = 40
LARGE = 0.25
# Three nights in ten thousand are called shifted when they are not, in confidence or in novelty.
_CHANCE = 0.0003
# Smaller groups of the reference make the index a matter of chance.
_GROUP_SHARE = 0.08


class Histogram(NamedTuple):
    """Counts in bins of equal width from `low` to `high`; the outer two are open to the outside."""

    low: float
    high: float
    counts: NDArray[np.int64]

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    def median(self) -> float:
        """The value that half of the counted are under, to a bin's width."""
        place = int(np.searchsorted(np.cumsum(self.counts), 0.5 * self.total))
        return self.low + (place + 0.5) * (self.high - self.low) / len(self.counts)

    def counted(self, values: NDArray[np.floating]) -> "Histogram":
        """`values` in the same bins; NaN is left out.

        >>> Histogram(0.0, 1.0, np.zeros(2, np.int64)).counted(np.array([-3, 0.5, 0.9])).counts
        array([1, 2])
        """
        bins = len(self.counts)
        finite = values[~np.isnan(values)].astype(np.float64)
        # The width is that of bins, so that a value on an edge belongs to the bin above it.
        place = np.floor((finite - self.low) * (bins / (self.high - self.low)))
        counts = np.bincount(np.clip(place, 0, bins - 1).astype(int), minlength=bins)
        return self._replace(counts=counts.astype(np.int64))


def reference(valid: Outcomes) -> dict[str, Any]:
    """Histograms of confidence and novelty of the validation split, ready for JSON."""
    none = np.zeros(BINS, np.int64)
    novelty = valid.novelty.astype(np.float64)
    low, high = float(novelty.min()), float(np.quantile(novelty, 0.99))
    # Room for photographs that are less like the training photographs than any of validation.
    spread = max(high - low, 1e-6 * max(high, 1.0))
    made = {
        "confidence": Histogram(0.0, 1.0, none).counted(valid.confidence),
        "novelty": Histogram(low - 0.25 * spread, high + 1.25 * spread, none).counted(novelty),
    }
    return {
        name: {"low": found.low, "high": found.high, "counts": found.counts.tolist()}
        for name, found in made.items()
    }


def histogram(document: dict[str, Any]) -> Histogram:
    """A histogram of `reference` as it was stored."""
    counts = np.array(document["counts"], np.int64)
    return Histogram(document["low"], document["high"], counts)


class Shift(NamedTuple):
    """How far two histograms are apart."""

    psi: float  # population stability index
    limit: float  # above it the two differ by more than chance and than what is usual

    @property
    def is_large(self) -> bool:
        """True where a person should know of it."""
        return self.psi > self.limit


def shift(expected: Histogram, found: Histogram) -> Shift | None:
    """How far `found` is from `expected`; None: there is nothing to compare.

    >>> same = Histogram(0.0, 1.0, np.array([10, 20, 30, 40]))
    >>> shift(same, same).psi
    0.0
    """
    if not expected.total or not found.total:
        return None
    starts = _groups(expected.counts / expected.total)
    if len(starts) < 2:
        return None
    q = np.add.reduceat(expected.counts, starts) / expected.total
    p = np.add.reduceat(found.counts, starts) / found.total
    # Of none there could have been half a photograph.
    p = np.maximum(p, 0.5 / found.total)
    quantile = float(scipy.special.chdtri(len(starts) - 1, _CHANCE))
    return Shift(
        psi=float(((p - q) * np.log(p / q)).sum()),
        limit=max(LARGE, quantile * (1 / expected.total + 1 / found.total)),
    )


def _groups(shares: NDArray[np.float64]) -> list[int]:
    """First bins of runs of bins, each with a share worth comparing.

    >>> _groups(np.array([0.0, 0.05, 0.05, 0.5, 0.4, 0.0]))
    [0, 3, 4]
    """
    starts, inside = [0], 0.0
    for place, share in enumerate(shares):
        if inside >= _GROUP_SHARE:
            starts.append(place)
            inside = 0.0
        inside += share
    if inside < _GROUP_SHARE and len(starts) > 1:
        starts.pop()
    return starts
