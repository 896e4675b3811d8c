"""How much of what was photographed is of each class, corrected for the model's errors.

Counted labels mislead where classes are mistaken for each other: of a class that is rare tonight,
most of what is called so is something else. Here the shares are those under which the night's
probabilities are likeliest: expectation maximisation (Saerens, Latinne and Decaestecker 2002,
doi:10.1162/089976602753284446) on probabilities that were given a bias for each class on held-out
examples first, which made it the best of those compared by Alexandari et al. 2020,
arXiv:1901.06852. The interval is that of a normal approximation in the logarithms of the shares
(MacKay 1998, doi:10.1023/A:1007558615313), which holds the chance of the photographs and, by the
delta method, what the held-out examples leave open of the bias.

All of it takes photographs of one class to look like those of that class always did, and only the
shares to differ: where a night is unlike validation it does not hold. `python -m
tests.benchmarks.counts` compares it with counting and adjusted counting. N photographs, C classes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.special
from numpy.typing import NDArray

from leafnet.metrics.scores import softmax

Array = NDArray[np.float64]

# Added to the photographs of each class (Jeffreys 1946): no share is 0 for sure.
_PRIOR = 0.5

# Deviation of a class's bias before any example is seen. A temperature was fitted already, and what
# it leaves is small: without this, what a few hundred examples say of it costs more than it mends.
_BIAS = 0.5

_STEPS, _CLOSE = 500, 1e-7
_SMALLEST = 1e-12
_Z = 1.959964


class Bias(NamedTuple):
    """By how much the logarithm of each class's probability is off, and how well that is known."""

    shares: Array  # [C], of the classes among the held-out examples
    value: Array  # [C], added to logits
    covariance: Array  # [C, C], of `value`


class Shares(NamedTuple):
    """Shares of the classes, with 95 % intervals."""

    value: Array  # [C]
    low: Array  # [C]
    high: Array  # [C]
    deviation: Array  # [C], of the logarithm of value / (1 - value)


def fit_bias(logits: NDArray[np.float32], labels: NDArray[np.integer]) -> Bias:
    """The bias of calibrated `logits` [N, C] on held-out examples with `labels` [N], N >= 1.

    By Newton's method: the likeliest, with a normal prior on each class.
    """
    classes = logits.shape[1]
    counts = np.bincount(labels, minlength=classes).astype(float)
    value = np.zeros(classes)
    for _ in range(_STEPS):
        probabilities = softmax((logits + value).astype(np.float32)).astype(float)
        curved = _curvature(probabilities) + np.eye(classes) / _BIAS**2
        step = np.linalg.solve(curved, counts - probabilities.sum(axis=0) - value / _BIAS**2)
        value += np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-6:  # float32 has no more
            break
    shares = (counts + _PRIOR) / (counts + _PRIOR).sum()
    return Bias(shares, value, np.asarray(np.linalg.inv(curved), np.float64))


def document(bias: Bias) -> dict[str, Any]:
    """`bias`, ready for JSON."""
    return {name: array.tolist() for name, array in bias._asdict().items()}


def read_bias(stored: Mapping[str, Any]) -> Bias:
    """The bias that `document` made."""
    return Bias(*(np.array(stored[name], float) for name in Bias._fields))


def estimate(probabilities: NDArray[np.floating], bias: Bias) -> Shares:
    """The shares of the classes among what the photographs are a sample of.

    Args:
        probabilities: [N, C], of the model.
        bias: of the model.

    >>> bias = Bias(np.full(2, 0.5), np.zeros(2), np.zeros((2, 2)))
    >>> estimate(np.array([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 2), bias).value.round(3)  # 6.5 of 9
    array([0.722, 0.278])
    """
    logs = np.log(np.maximum(probabilities.astype(float), _SMALLEST)) + bias.value
    odds = np.exp(logs - logs.max(axis=1, keepdims=True)) / bias.shares
    count, classes = odds.shape
    total = count + _PRIOR * classes
    value = np.full(classes, 1 / classes)
    for _ in range(_STEPS):
        before = value
        joint = odds * value
        value = ((joint / joint.sum(axis=1, keepdims=True)).sum(axis=0) + _PRIOR) / total
        if np.abs(value - before).max() < _CLOSE:
            break
    joint = odds * value
    mixed = _curvature(joint / joint.sum(axis=1, keepdims=True))
    # Of the logarithms: shares of labels would be known so well, less what is mixed up.
    known = np.linalg.pinv(total * (np.diag(value) - np.outer(value, value)) - mixed)
    through = known @ mixed
    spread = known + through @ bias.covariance @ through.T
    others = np.maximum(1 - value, _SMALLEST)
    # Of log(value / (1 - value)): minus the share of each other class among the others.
    slope = -value / others[:, None]
    np.fill_diagonal(slope, 1.0)
    deviation = np.sqrt(np.maximum(np.einsum("ci,ij,cj->c", slope, spread, slope), 0))
    half = np.exp(_Z * deviation)
    return Shares(
        value, value / (value + others * half), value / (value + others / half), deviation
    )


def chance_of_change(tonight: Shares, before: Shares) -> Array:
    """How likely chance makes two nights differ as much, for each class: two-sided p-values [C].

    The bias, which both nights have in common, counts for both: the test errs to the safe side.
    """
    ours, theirs = (
        np.log(shares.value) - np.log(np.maximum(1 - shares.value, _SMALLEST))
        for shares in (tonight, before)
    )
    apart = np.hypot(tonight.deviation, before.deviation)
    chance: Array = scipy.special.erfc(
        np.abs(ours - theirs) / np.maximum(apart, _SMALLEST) / 2**0.5
    )
    return chance


def _curvature(probabilities: Array) -> Array:
    """The sum over rows p of diag(p) - p p', [C, C]."""
    curved: Array = np.diag(probabilities.sum(axis=0)) - probabilities.T @ probabilities
    return curved
