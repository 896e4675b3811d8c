"""Which examples deserve a second look, by the model or by the person who labelled them.

N examples, C classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from numpy.typing import NDArray


class WrongLabels(NamedTuple):
    """Examples whose label is likely wrong, the likeliest first."""

    rows: NDArray[np.int64]  # [M], places in the N examples
    suggested: NDArray[np.int64]  # [M], class that the model is confident of instead
    self_confidence: NDArray[np.float64]  # [M], probability of the label that is given


def most_confused(confusion: Any, limit: int) -> NDArray[np.int64]:
    """The classes with the most errors in their row and column, at most `limit`, in order.

    Args:
        confusion: [C, C], sparse or not, row = true class, column = predicted class.
        limit: at most so many; all classes where there are no more.

    >>> most_confused(np.array([[9, 0, 1], [0, 9, 0], [3, 0, 9]]), 2).tolist()
    [0, 2]
    """
    table = scipy.sparse.csr_array(confusion)
    errors = table.sum(axis=0) + table.sum(axis=1) - 2 * table.diagonal()
    found: NDArray[np.int64] = np.sort(np.argsort(-errors, kind="stable")[:limit])
    return found


def confused_pairs(
    confusion: Any, class_names: Sequence[str], *, limit: int = 10
) -> list[dict[str, Any]]:
    """The most frequent mistakes, ready for JSON; `share` is that of the true class's examples.

    Args:
        confusion: [C, C], sparse or not, row = true class, column = predicted class.
        class_names: [C].
        limit: at most so many.

    >>> confused_pairs(np.array([[5, 1], [3, 9]]), ["rust", "healthy"])[0]
    {'label': 'healthy', 'predicted': 'rust', 'count': 3, 'share': 0.25}
    """
    table = scipy.sparse.csr_array(confusion)
    support, cells = table.sum(axis=1), table.tocoo()
    (true, guessed), counts = cells.coords, cells.data
    order = np.lexsort([guessed, true, -counts])
    order = order[(true != guessed)[order] & (counts > 0)[order]][:limit]
    return [
        {
            "label": class_names[i],
            "predicted": class_names[j],
            "count": count,
            "share": count / int(support[i]),
        }
        for i, j, count in np.stack([true, guessed, counts])[:, order].T.tolist()
    ]


def confident_errors(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer]
) -> NDArray[np.int64]:
    """The rows that are predicted wrong, the most confident first."""
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    return wrong[np.argsort(-confidence[wrong], kind="stable")]


def likely_wrong_labels(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer]
) -> WrongLabels:
    """Confident learning (Northcutt et al. 2021, arXiv:1911.00068, sections 3.1 and 3.2).

    A class's threshold is the mean probability of that class among the examples labelled with it,
    so a class that the model is shy of in general is not suspected as a whole. An example is
    suspected when the likeliest of the classes over their thresholds is not its label. The order is
    that of self-confidence, the probability of the label that is given, lowest first.

    The model must not have learned from these labels: it would defend them.

    Args:
        probabilities: [N, C].
        labels: [N], class indices.
    """
    classes = probabilities.shape[1]
    of_label = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    counts = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, of_label, minlength=classes)
    # No example has such a label, and none can be suspected to deserve it.
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    over = np.where(probabilities >= thresholds, probabilities, -1.0)
    suggested = over.argmax(axis=1)
    suspected = np.flatnonzero((over.max(axis=1) >= 0) & (suggested != labels))
    rows = suspected[np.argsort(of_label[suspected], kind="stable")]
    return WrongLabels(rows, suggested[rows], of_label[rows])
