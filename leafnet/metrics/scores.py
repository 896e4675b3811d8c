"""Scores of a classifier: counts that add over batches and workers, and one division at the end.

A `Tally` is as large as the pairs of classes that occur, and no larger for more images. B batch,
C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.special import betaincinv

from leafnet.metrics.mistakes import confused_pairs, most_confused

MAX_CONFUSION = 200  # classes of which a document has the whole matrix

CALIBRATION_BINS = 15  # as Guo et al. 2017, section 5


@dataclass(frozen=True)
class Tally:
    """What was counted over some examples; add those of batches and workers.

    Bin b of the three last holds the examples whose top probability is in (b, b + 1] / bins.
    """

    confusion: Any  # sparse [C, C] int64, row = true class, column = predicted class
    log_loss_sum: float  # natural logarithm, summed over the examples
    bin_count: NDArray[np.int64]  # [bins], examples
    bin_correct: NDArray[np.int64]  # [bins], examples predicted right
    bin_confidence: NDArray[np.float64]  # [bins], sum of the top probabilities

    def __post_init__(self) -> None:
        object.__setattr__(self, "confusion", scipy.sparse.csr_array(self.confusion))

    @property
    def examples(self) -> int:
        """The number of examples counted."""
        return int(self.confusion.sum())

    def __add__(self, other: "Tally") -> "Tally":
        """The tally of both sets of examples together.

        Raises:
            ValueError: they are of models with different classes, or of other bins.
        """
        for what, left, right in (
            ("classes", self.confusion, other.confusion),
            ("bins", self.bin_count, other.bin_count),
        ):
            if left.shape != right.shape:
                found = f"{left.shape[0]} and {right.shape[0]}"
                raise ValueError(f"cannot add tallies of {found} {what}")
        return Tally(
            confusion=self.confusion + other.confusion,
            log_loss_sum=self.log_loss_sum + other.log_loss_sum,
            bin_count=self.bin_count + other.bin_count,
            bin_correct=self.bin_correct + other.bin_correct,
            bin_confidence=self.bin_confidence + other.bin_confidence,
        )


def empty_tally(num_classes: int) -> Tally:
    """The tally of no examples, where a sum starts.

    >>> empty_tally(3).examples
    0
    """
    return Tally(
        confusion=scipy.sparse.csr_array((num_classes, num_classes), dtype=np.int64),
        log_loss_sum=0.0,
        bin_count=np.zeros(CALIBRATION_BINS, np.int64),
        bin_correct=np.zeros(CALIBRATION_BINS, np.int64),
        bin_confidence=np.zeros(CALIBRATION_BINS, np.float64),
    )


def tally(logits: NDArray[np.float32], labels: NDArray[np.int32] | NDArray[np.int64]) -> Tally:
    """The counts of one batch, which may be empty.

    Args:
        logits: [B, C], unnormalised. A tie goes to the lower class index.
        labels: [B], class indices in [0, C).

    Raises:
        ValueError: `logits` and `labels` differ in length; a logit that is not finite; a label
            outside [0, C), which means that the shards and the model were built from different
            class lists.

    >>> tally(np.float32([[2, 2, 1]]), np.array([1])).confusion.toarray().tolist()  # 0 of a tie
    [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    """
    num_classes = logits.shape[1]
    if len(logits) != len(labels):
        raise ValueError(f"{len(logits)} rows of logits for {len(labels)} labels")
    bad_labels = labels[(labels < 0) | (labels >= num_classes)]
    if bad_labels.size:
        raise ValueError(f"label {bad_labels[0]} is outside [0, {num_classes}) of this model")
    bad_rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if bad_rows.size:
        raise ValueError(
            f"the logits of row {bad_rows[0]} are not finite: {logits[bad_rows[0], :20].tolist()}; "
            f"{bad_rows.size} of {len(logits)} rows are like that"
        )
    counts = empty_tally(num_classes)
    predicted = logits.argmax(axis=1)
    log_probabilities = _log_softmax(logits)
    rows = np.arange(len(labels))
    confidence = np.exp(log_probabilities[rows, predicted])
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    # Unlike counts[t, p] += 1, np.add.at adds for every repeat of an index.
    np.add.at(counts.bin_count, bins, 1)
    np.add.at(counts.bin_correct, bins, predicted == labels)
    np.add.at(counts.bin_confidence, bins, confidence)
    return Tally(
        confusion=scipy.sparse.csr_array(
            (np.ones(len(labels), np.int64), (labels, predicted)), shape=(num_classes, num_classes)
        ),
        log_loss_sum=-float(log_probabilities[rows, labels].sum()),
        bin_count=counts.bin_count,
        bin_correct=counts.bin_correct,
        bin_confidence=counts.bin_confidence,
    )


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities [B, C] of finite logits [B, C]; logits of any size neither overflow nor warn.

    >>> softmax(np.float32([[0, 1000], [-1000, -1000]])).tolist()
    [[0.0, 1.0], [0.5, 0.5]]
    """
    return np.exp(_log_softmax(logits)).astype(np.float32)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def exact_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share, which holds in at least 95 % of draws whatever the share is.

    Clopper and Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of
    the binomial", Biometrika 26:404-413. Wilson's shorter interval misses the truth in up to 16 %
    of draws near 0 % and 100 %. It takes the trials as independent: for photographs of the same
    leaf see `intervals.share`.

    Raises:
        ValueError: unless 0 <= successes <= trials.

    >>> exact_interval(0, 0)  # nothing seen, nothing known
    (0.0, 1.0)
    >>> [round(bound, 4) for bound in exact_interval(24, 24)]  # 0.025 ** (1 / 24)
    [0.8575, 1.0]
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials, got {successes} and {trials}")
    failures = trials - successes
    low = betaincinv(successes, failures + 1, 0.025) if successes else 0.0
    high = betaincinv(successes + 1, failures, 0.975) if failures else 1.0
    return float(low), float(high)


def scores(tally: Tally, class_names: Sequence[str]) -> dict[str, Any]:
    """Everything that is reported about one split, ready for JSON.

    A share of nothing is 0.0: the precision of a class that was never predicted, the recall of
    one without examples. Macro F1 is the mean over all of `class_names`, so a class without
    examples lowers it, as in scikit-learn's f1_score(average="macro", labels=all classes,
    zero_division=0). `ece` is the expected calibration error over `CALIBRATION_BINS` bins of
    equal width, Guo et al. 2017, arXiv:1706.04599, equation 3. `_low` and `_high` bound the 95 %
    interval of `exact_interval`. `confusion` is of all classes, or of the `MAX_CONFUSION` most
    confused ones if there are more; `confusion_classes` says which.

    Raises:
        ValueError: no examples, or another number of names than the tally has classes.

    >>> never_predicted = Tally(np.array([[3, 0], [1, 0]]), 1.2, *np.zeros((3, 15)))
    >>> scores(never_predicted, ["healthy", "rust"])["per_class"]["rust"]["precision"]
    0.0
    """
    confusion, examples = tally.confusion, tally.examples
    if len(class_names) != confusion.shape[0]:
        raise ValueError(
            f"{len(class_names)} class names for a tally of {confusion.shape[0]} classes"
        )
    if examples == 0:
        raise ValueError("no examples to score: the split is empty")
    correct = int(confusion.trace())
    accuracy_low, accuracy_high = exact_interval(correct, examples)
    per_class = {}
    sums = (confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0))
    for name, hits, support, predicted in zip(
        class_names, *(column.tolist() for column in sums), strict=True
    ):
        recall_low, recall_high = exact_interval(hits, support)
        per_class[name] = {
            "precision": hits / max(predicted, 1),
            "recall": hits / max(support, 1),
            "f1": 2 * hits / max(support + predicted, 1),
            "support": support,
            "predicted": predicted,
            "recall_low": recall_low,
            "recall_high": recall_high,
        }
    shown = most_confused(confusion, MAX_CONFUSION)
    gaps = np.abs(tally.bin_correct - tally.bin_confidence)
    return {
        "examples": examples,
        "accuracy": correct / examples,
        "accuracy_low": accuracy_low,
        "accuracy_high": accuracy_high,
        "macro_f1": sum(entry["f1"] for entry in per_class.values()) / len(per_class),
        "log_loss": tally.log_loss_sum / examples,
        "ece": float(gaps.sum()) / examples,
        "per_class": per_class,
        "confusion": confusion[shown][:, shown].toarray().tolist(),
        "confusion_classes": [class_names[i] for i in shown],
        "confused_pairs": confused_pairs(confusion, class_names, limit=30),
        "calibration": [
            {
                "confidence": float(tally.bin_confidence[b] / tally.bin_count[b]),
                "accuracy": float(tally.bin_correct[b] / tally.bin_count[b]),
                "count": int(tally.bin_count[b]),
            }
            for b in np.flatnonzero(tally.bin_count)
        ],
    }
