"""Probabilities that mean what they say: one temperature for all logits, fitted on validation.

Dividing logits by a temperature changes no prediction and no order of confidence among them, only
how sure they sound (Guo et al. 2017, arXiv:1706.04599, section 4.2). Being one factor, it is
folded into the head's last layer when a model is published, and no reader has to know of it. N
examples, C classes.
"""

import numpy as np
from numpy.typing import NDArray

from leafnet.metrics.scores import CALIBRATION_BINS

# What a search for a temperature looks at; beyond these a model has other troubles.
_LOWEST, _HIGHEST = 0.05, 20.0
# More examples than these, evenly from all, do not move a single number.
_SAMPLE = 100_000
# Confidences are told apart this finely inside a bin, where they are counted and not kept.
_LEVELS_PER_BIN = 10


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.integer]) -> float:
    """The temperature with the lowest log loss on these examples, which must be some.

    As if there were one more example whose label was drawn at random (Platt 1999's correction of
    the targets): where every example is right, the log loss alone would ask for a temperature of
    0, which is certainty.

    Args:
        logits: [N, C], N >= 1.
        labels: [N], class indices.

    >>> fit_temperature(np.float32([[4, 0]] * 3 + [[0, 4]]), np.array([0, 0, 0, 0])) > 2
    True
    """
    # Half a second of the start of every job that may need it.
    import scipy.optimize
    import scipy.special

    if not len(labels):
        raise ValueError("no examples to fit a temperature on")
    rows = np.arange(0, len(labels), -(-len(labels) // _SAMPLE))
    chosen = logits[rows].astype(np.float64)
    spread = 1.0 / (len(rows) + 1)
    of_label = chosen[np.arange(len(rows)), labels[rows]]
    wanted = float(((1 - spread) * of_label + spread * chosen.mean(axis=1)).mean())

    def log_loss(log_temperature: float) -> float:
        factor = float(np.exp(-log_temperature))
        return float(scipy.special.logsumexp(factor * chosen, axis=1).mean()) - factor * wanted

    found = scipy.optimize.minimize_scalar(
        log_loss, bounds=(np.log(_LOWEST), np.log(_HIGHEST)), method="bounded"
    )
    return float(np.exp(found.x))


def selective_accuracy(
    confidence: NDArray[np.floating], correct: NDArray[np.bool_], *, coverage: float = 0.9
) -> float:
    """Accuracy of the share `coverage` of the examples that the model is most confident of.

    Of examples with the same confidence at the border, which count is left to chance, and the
    result is what that gives on average (El-Yaniv and Wiener 2010, on selective classification).

    Args:
        confidence: [N], N >= 1.
        correct: [N].
        coverage: share in (0, 1]; examples are rounded up.

    >>> selective_accuracy(np.array([0.9, 0.8, 0.5]), np.array([True, True, False]), coverage=0.6)
    1.0
    """
    count = int(np.ceil(coverage * len(confidence) - 1e-9))
    threshold = np.sort(confidence)[::-1][count - 1]
    above, tied = confidence > threshold, confidence == threshold
    right = correct[above].sum() + (count - above.sum()) * correct[tied].mean()
    return float(right / count)


def confidence_levels(confidence: NDArray[np.floating]) -> NDArray[np.int64]:
    """The fine level [N] of each confidence; `levels // 10` is its bin in `scores.Tally`."""
    levels = CALIBRATION_BINS * _LEVELS_PER_BIN
    found: NDArray[np.int64] = np.ceil(confidence * levels).astype(np.int64) - 1
    return found.clip(0, levels - 1)


def level_bins(levels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The calibration bin of each fine level."""
    return levels // _LEVELS_PER_BIN


def ece_if_calibrated(
    confidence: NDArray[np.floating], *, seed: int = 0, draws: int = 1000
) -> dict[str, float]:
    """The calibration error that chance gives a perfectly calibrated model of these confidences.

    Of a few hundred examples it is far from 0, so a measured error says little without it
    (consistency sampling: Bröcker and Smith 2007, doi:10.1175/WAF993.1).

    Args:
        confidence: [N], N >= 1.
        seed: of the draws.
        draws: sets of labels drawn.

    Returns:
        `mean`, and `high`, under which 95 % of the draws are.
    """
    levels, place, counts = np.unique(
        confidence_levels(confidence), return_inverse=True, return_counts=True
    )
    mean = np.bincount(place, confidence) / counts
    right = np.random.default_rng(seed).binomial(counts, np.clip(mean, 0, 1), (draws, len(levels)))
    bins = np.zeros((len(levels), CALIBRATION_BINS))
    bins[np.arange(len(levels)), level_bins(levels)] = 1
    errors = np.abs((right - counts * mean) @ bins).sum(axis=1) / len(confidence)
    return {"mean": float(errors.mean()), "high": float(np.quantile(errors, 0.95))}
