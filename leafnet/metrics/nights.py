"""Whether a night is unlike those before it, by more than chance and than nights differ anyway.

The shares of a night are taken as beta-binomial, and the numbers as negative binomial: a mean, and
how much more nights differ than chance makes them. Of the two parameters all that the nights before
leave possible are tried, and the one under which tonight is least odd gives the p-value (Berger and
Boos 1994, "P values maximized over a confidence set for the nuisance parameter", J. Am. Stat.
Assoc. 89:1012-1016), which is what seven nights can prove and no more. The set is that of the
likelihood ratio, with a penalty for nights that differ wildly. What is watched on one night shares
one rate of false alarms (Bonferroni).
"""

from collections.abc import Sequence

import numpy as np
import scipy.special
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Of nights that are like those before at most this share is called unusual in anything.
RATE = 0.007

# Logarithms of the likelihood ratio to the best, of what is still possible.
_POSSIBLE = 4.6

# Correlation of the photographs of a night, and by how much larger ones are held for unlikely.
_CORRELATIONS = np.array([1e-4, 0.003, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7])
_USUAL = 0.05

# Steps from the mean of the nights on the scale of logits or logarithms.
_STEPS = np.unique(np.concatenate([np.linspace(-2.5, 2.5, 21), np.linspace(-0.5, 0.5, 21)]))

# A night of more photographs is no better known: nights differ more than that.
_MOST = 2000


def share_differs(count: int, total: int, past: Sequence[tuple[int, int]]) -> float:
    """p-value that tonight's share is one of those of the nights before, two-sided.

    Args:
        count: photographs of some kind tonight.
        total: photographs tonight, some.
        past: (count, total) of two nights or more, each of some photographs.

    >>> share_differs(0, 12, [(1, 12)] * 7) > 0.1, share_differs(12, 12, [(1, 12)] * 7) < 1e-4
    (True, True)
    """
    counts, totals = (np.array(column, np.float64) for column in zip(*past, strict=True))
    centre = scipy.special.logit((counts.sum() + 0.5) / (totals.sum() + 1))
    means = scipy.special.expit(centre + _STEPS)[:, None, None]
    scale = (1 / _CORRELATIONS - 1)[:, None]
    a, b = means * scale, (1 - means) * scale
    beta = scipy.special.betaln
    fit = (beta(a + counts, b + totals - counts) - beta(a, b)).sum(axis=-1)
    possible = _possible(fit)
    a, b = a[..., 0][possible], b[..., 0][possible]
    if total > _MOST:
        count, total = round(count / total * _MOST), _MOST
    kinds = np.arange(total + 1)
    ways = -np.log(total + 1) - beta(kinds + 1, total - kinds + 1)
    mass = np.exp(ways + beta(a[:, None] + kinds, b[:, None] + total - kinds) - beta(a, b)[:, None])
    below, above = mass[:, : count + 1].sum(axis=1), mass[:, count:].sum(axis=1)
    return float(min(1.0, 2 * np.minimum(below, above).max()))


def number_falls(count: int, past: Sequence[int]) -> float:
    """p-value that so few photographs come on a night like the two or more before.

    >>> number_falls(3, [5, 4, 6, 5, 5, 4, 7]) > 0.1, number_falls(3, [90, 80, 95, 88] * 2) < 1e-3
    (True, True)
    """
    counts = np.array(past, np.float64)
    means = (counts.mean() + 0.5 / len(past)) * np.exp(_STEPS)[:, None, None]
    shape = (1 / _CORRELATIONS)[:, None]
    fit = scipy.special.gammaln(shape + counts) - scipy.special.gammaln(shape)
    fit = (
        fit
        + shape * np.log(shape / (shape + means))
        + scipy.special.xlogy(counts, means / (shape + means))
    ).sum(axis=-1)
    possible = _possible(fit)
    shapes = np.broadcast_to(shape[None, :, 0], possible.shape)[possible]
    chosen = np.broadcast_to(means[..., 0], possible.shape)[possible]
    return float(scipy.special.betainc(shapes, count + 1, shapes / (shapes + chosen)).max())


def _possible(fit: Array) -> NDArray[np.bool_]:
    """Of log likelihoods [steps, correlations] those that the nights leave possible."""
    judged = fit - _CORRELATIONS / _USUAL
    found: NDArray[np.bool_] = judged >= judged.max() - _POSSIBLE
    return found
