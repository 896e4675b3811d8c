"""When a person should look at a photograph instead of the model's answer being taken."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from leafnet.metrics.rounding import apart
from leafnet.metrics.scores import softmax

# Threshold of confidence above every confidence.
REVIEW_ALL = 2.0
# Share of photographs like those of validation that may lie above the threshold of novelty.
_UNLIKE = 0.01

# Thresholds of confidence that are tried where one is to hold on others too.
_TRIED = 10


@dataclass(frozen=True)
class Review:
    """Thresholds, chosen on the validation split."""

    confidence: float  # reviewed below it; REVIEW_ALL: always
    precision_target: float  # accuracy wanted of the predictions that are not reviewed
    novelty: float  # reviewed above it

    def reason(self, confidence: float, novelty: float) -> str | None:
        """Why a person should look at a photograph; None: nobody has to.

        >>> review = Review(confidence=0.8, precision_target=0.95, novelty=20.0)
        >>> review.reason(0.41, 12.0)
        'low-confidence: 0.410 is under 0.800'
        >>> review.reason(0.8, 20.0)
        """
        told = []
        if novelty > self.novelty:
            told.append(
                "unlike-training: novelty {} is over {}".format(
                    *apart(novelty, self.novelty, ".4g")
                )
            )
        if confidence < self.confidence:
            told.append(
                "low-confidence: {} is under {}".format(*apart(confidence, self.confidence))
            )
        return "; ".join(told) or None


class Judged(NamedTuple):
    """What a model says of B photographs."""

    failed: NDArray[np.bool_]  # [B], the network gave no finite numbers
    probabilities: NDArray[np.float32]  # [B, C], 0 where failed
    label: NDArray[np.int64]  # [B], class of the highest probability
    confidence: NDArray[np.float32]  # [B], its probability
    novelty: NDArray[np.float32]  # [B], NaN where failed or without such a measure
    reasons: list[str | None]  # B, why it failed or why a person should look; None: neither


def judge(
    logits: NDArray[np.float32], novelty: NDArray[np.float32] | None, review: Review | None
) -> Judged:
    """Judge photographs by their logits [B, C] and novelty [B].

    Args:
        logits: of the network.
        novelty: None: the model has no such measure.
        review: thresholds; None: the model has none.
    """
    failed = np.logical_not(np.isfinite(logits).all(axis=1))
    probabilities = np.zeros(logits.shape, np.float32)
    if not failed.all():
        probabilities[~failed] = softmax(logits[~failed])
    label = probabilities.argmax(axis=1)
    confidence = probabilities[np.arange(len(label)), label]
    distances = np.full(len(label), np.nan, np.float32)
    if novelty is not None:
        distances[~failed] = novelty[~failed]
    reasons = [
        review.reason(sure, far) if review else None
        for sure, far in zip(confidence.tolist(), distances.tolist(), strict=True)
    ]
    for i in np.flatnonzero(failed):
        reasons[i] = "not-finite: the network gave no number for it"
    return Judged(failed, probabilities, label, confidence, distances, reasons)


class Outcomes(NamedTuple):
    """What a model makes of each of N examples."""

    confidence: NDArray[np.float32]  # [N], of the predicted class
    correct: NDArray[np.bool_]  # [N]
    novelty: NDArray[np.float32]  # [N]


def outcomes(
    logits: NDArray[np.float32], labels: NDArray[Any], novelty: NDArray[np.float32]
) -> Outcomes:
    """What `logits` [N, C] and distances `novelty` [N] come to, with the true `labels` [N]."""
    probabilities = softmax(logits)
    predicted = probabilities.argmax(axis=1)
    return Outcomes(probabilities[np.arange(len(labels)), predicted], predicted == labels, novelty)


def choose(valid: Outcomes, *, precision_target: float, guarantee: float | None = None) -> Review:
    """Thresholds from the validation split, which must have examples.

    That of novelty is `novelty_rank`'s. That of confidence is `confidence_threshold`'s, or, with a
    `guarantee`, `guaranteed_threshold`'s.
    """
    threshold = confidence_threshold if guarantee is None else guaranteed_threshold
    more = {} if guarantee is None else {"guarantee": guarantee}
    rank, _ = novelty_rank(len(valid.novelty))
    return Review(
        confidence=threshold(
            valid.confidence, valid.correct, precision_target=precision_target, **more
        ),
        precision_target=precision_target,
        novelty=float(np.sort(valid.novelty)[rank - 1]),
    )


def novelty_rank(examples: int) -> tuple[int, float]:
    """Which distance of so many is the threshold, the smallest being 1, and the share above it.

    The share is that of new photographs like the examples, on average: 1 % or, where fewer than 99
    examples cannot tell so little, one in as many and one more (split conformal prediction: Vovk et
    al. 2005, "Algorithmic Learning in a Random World", proposition 2.2).

    >>> novelty_rank(30)[0], round(novelty_rank(30)[1], 3), novelty_rank(999)
    (30, 0.032, (990, 0.01))
    """
    rank = min(examples, math.ceil((examples + 1) * (1 - _UNLIKE) - 1e-9))
    return rank, (examples + 1 - rank) / (examples + 1)


def confidence_threshold(
    confidence: NDArray[np.float32], correct: NDArray[np.bool_], *, precision_target: float
) -> float:
    """The lowest threshold at which the predictions that are trusted are right often enough.

    It is the smallest t among `confidence` such that at least the share `precision_target` of the
    examples with confidence >= t is correct; 0.0 when all examples together are that good, and
    `REVIEW_ALL` when no t is. A threshold chosen so holds on these examples; on others like them
    the share is about as often below the target as above it.

    Args:
        confidence: [N], N >= 1.
        correct: [N].
        precision_target: share in (0, 1].

    >>> confidence = np.float32([0.5, 0.75, 0.75, 1.0])
    >>> confidence_threshold(confidence, np.array([False, True, True, True]), precision_target=0.9)
    0.75
    >>> confidence_threshold(confidence, np.array([True, False, True, True]), precision_target=0.9)
    1.0
    >>> confidence_threshold(confidence, np.array([True, True, True, False]), precision_target=0.7)
    0.0
    >>> confidence_threshold(confidence, np.array([True, True, True, False]), precision_target=0.9)
    2.0
    """
    order = np.argsort(-confidence, kind="stable")
    confidence, correct = confidence[order], correct[order]
    precision = np.cumsum(correct) / np.arange(1, len(correct) + 1)
    # Examples of one confidence are above a threshold all together or not at all.
    last_of_its_value = np.append(confidence[1:] != confidence[:-1], True)
    enough = np.flatnonzero(last_of_its_value & (precision >= precision_target))
    if not enough.size:
        return REVIEW_ALL
    return 0.0 if enough[-1] == len(correct) - 1 else float(confidence[enough[-1]])


def guaranteed_threshold(
    confidence: NDArray[np.float32],
    correct: NDArray[np.bool_],
    *,
    precision_target: float,
    guarantee: float,
) -> float:
    """The lowest of ten thresholds at which `precision_target` holds on other examples too.

    The thresholds leave a tenth, two tenths … of the examples on their trusted side. Of each the
    exact one-sided bound of Clopper and Pearson is taken, and what it may err is shared among the
    ten (Bonferroni, as in "Learn then Test": Angelopoulos et al. 2021, arXiv:2110.01052, section
    2.3): with at least the probability `guarantee` over the draw of these examples, of others like
    them the share `precision_target` of those that are trusted is right, or none is trusted.

    Args:
        confidence: [N], N >= 1.
        correct: [N].
        precision_target: share in (0, 1].
        guarantee: probability in (0, 1).

    >>> sure = np.linspace(0.5, 1, 1000, dtype=np.float32)
    >>> round(guaranteed_threshold(sure, sure > 0.6, precision_target=0.95, guarantee=0.9), 2)
    0.6
    >>> guaranteed_threshold(sure[:20], sure[:20] > 0, precision_target=0.95, guarantee=0.9)
    2.0
    """
    ordered = np.sort(confidence)[::-1]
    ranks = np.unique(np.ceil(np.arange(1, _TRIED + 1) * len(ordered) / _TRIED).astype(int))
    for rank in ranks[::-1]:
        trusted = confidence >= ordered[rank - 1]
        count, right = int(trusted.sum()), int(correct[trusted].sum())
        allowed = (1 - guarantee) / _TRIED
        low = betaincinv(right, count - right + 1, allowed) if right else 0.0
        if low >= precision_target:
            return 0.0 if count == len(ordered) else float(ordered[rank - 1])
    return REVIEW_ALL


def effect(outcomes: Outcomes, review: Review) -> dict[str, Any]:
    """What `review` does to a split, ready for JSON.

    `accuracy` is that of the predictions nobody has to look at, None where there is none.
    """
    low = outcomes.confidence < review.confidence
    unlike = outcomes.novelty > review.novelty
    trusted = ~(low | unlike)
    return {
        "examples": len(low),
        "share_reviewed": float((~trusted).mean()),
        "share_low_confidence": float(low.mean()),
        "share_unlike": float(unlike.mean()),
        "accuracy": float(outcomes.correct[trusted].mean()) if trusted.any() else None,
    }


def describe(effect: dict[str, Any]) -> str:
    """A line about an `effect`.

    >>> describe({"share_reviewed": 0.25, "accuracy": 0.971, "examples": 300})
    '25.0 % of 300 photographs are for review, 97.1 % of the others are right'
    >>> describe({"share_reviewed": 1.0, "accuracy": None, "examples": 24})
    '100.0 % of 24 photographs are for review'
    """
    line = f"{effect['share_reviewed']:.1%} of {effect['examples']:,} photographs are for review"
    if effect["accuracy"] is not None:
        line += f", {effect['accuracy']:.1%} of the others are right"
    return line.replace("%", " %")
