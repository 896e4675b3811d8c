"""The stored document of an evaluation: how it is described, compared, written and read."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data.shards import SPLITS
from leafnet.evaluation import gallery
from leafnet.metrics import calibration, intervals, mistakes, slices
from leafnet.metrics import scores as metrics_scores
from leafnet.metrics.scores import softmax, tally

DOCUMENT = "evaluation.json"
VERSION = 1
COVERAGE = 0.9
_LISTED = 50  # errors, suspected labels and disagreements that are kept, each

Scores = dict[str, Any]


class Described(NamedTuple):
    """The examples of a split, with what is known of them beside the model's answers."""

    keys: Sequence[str]  # N
    labels: NDArray[np.integer]  # [N]
    logits: NDArray[np.float32]  # [N, C]
    sizes: NDArray[np.int32]  # [N, 2], width and height in pixels


def describe(
    examples: Described,
    class_names: Sequence[str],
    *,
    pattern: re.Pattern[str] | None = None,
    groups: NDArray[np.integer] | None = None,
) -> Scores:
    """`scores.scores` and what else can be said of a split, ready for JSON.

    Args:
        examples: N >= 1 of them.
        class_names: [C].
        pattern: see `slices.by_pattern`.
        groups: [N], of examples that are not independent, see `intervals.intervals`.

    Raises:
        UserError: `pattern` matches no key.
    """
    keys, labels, logits, sizes = examples
    probabilities = softmax(logits)
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    correct = predicted == labels
    scores = metrics_scores.scores(tally(logits, labels.astype(np.int64)), class_names)
    found = intervals.intervals(logits, labels, groups=groups)
    suspects = mistakes.likely_wrong_labels(probabilities, labels)
    known = {*class_names, *SPLITS, "val"}
    try:
        columns = slices.columns_of(keys, *sizes.T, known=known, pattern=pattern)
    except ValueError as error:
        raise UserError("slice-matches-nothing", f"--slice_by {error}") from None
    return (
        scores
        | grouped(scores, correct, labels, groups)
        | {
            f"selective_accuracy_{100 * COVERAGE:.0f}": calibration.selective_accuracy(
                confidence, correct, coverage=COVERAGE
            ),
            "ece_if_calibrated": calibration.ece_if_calibrated(confidence),
            "intervals": {name: list(interval) for name, interval in found.items()},
            "resampled_by_group": groups is not None,
            "groups": None if groups is None else len(np.unique(groups)),
            "confident_errors": [
                {
                    "key": keys[row],
                    "label": class_names[labels[row]],
                    "predicted": class_names[predicted[row]],
                    "confidence": float(confidence[row]),
                }
                for row in mistakes.confident_errors(probabilities, labels)[:_LISTED]
            ],
            "likely_wrong_labels": {
                "examples": len(suspects.rows),
                "first": [
                    {
                        "key": keys[row],
                        "label": class_names[labels[row]],
                        "suggested": class_names[suggested],
                        "self_confidence": float(self_confidence),
                    }
                    for row, suggested, self_confidence in zip(*suspects, strict=True)
                ][:_LISTED],
            },
            "slices": {
                name: slices.accuracies(column, correct, groups=groups)
                for name, column in columns.items()
            },
        }
    )


def grouped(
    scores: Scores,
    correct: NDArray[np.bool_],
    labels: NDArray[np.integer],
    groups: NDArray[np.integer] | None,
) -> Scores:
    """What takes the place of bounds in `scores` where examples come in `groups` [N].

    Args:
        scores: `scores.scores` of the examples.
        correct: [N].
        labels: [N].
        groups: [N]; None: they are independent, and nothing changes.
    """
    if groups is None:
        return {}
    low, high = intervals.share(correct, groups=groups)
    per_class = {}
    for number, (name, of_class) in enumerate(scores["per_class"].items()):
        rows = np.flatnonzero(labels == number)
        bounds = intervals.share(correct[rows], groups=groups[rows])
        per_class[name] = of_class | dict(zip(("recall_low", "recall_high"), bounds, strict=True))
    return {"accuracy_low": low, "accuracy_high": high, "per_class": per_class}


def compare(
    ours: Described, theirs: NDArray[np.float32], class_names: Sequence[str], *, groups: Any = None
) -> dict[str, Any]:
    """Two models on the same examples, ready for JSON.

    Args:
        ours: with the logits of the model that is judged.
        theirs: [N, C], of the other.
        class_names: [C].
        groups: as in `describe`.
    """
    labels = ours.labels
    mine, other = ours.logits.argmax(axis=1), theirs.argmax(axis=1)
    found = intervals.compare(mine == labels, other == labels, groups=groups)
    differ = np.flatnonzero(mine != other)
    kinds, counts = np.unique(
        np.stack([labels[differ], mine[differ], other[differ]], axis=1), axis=0, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    return {
        "accuracy": float((other == labels).mean()),
        "difference": found.difference,
        "interval": list(found.interval),
        "only_ours": found.only_ours,
        "only_theirs": found.only_theirs,
        "mcnemar_p": found.p_value,
        "disagreements": len(differ),
        "kinds": [
            {
                **dict(
                    zip(("label", "ours", "theirs"), (class_names[i] for i in kind), strict=True)
                ),
                "count": int(count),
            }
            for kind, count in zip(kinds[order].tolist(), counts[order].tolist(), strict=True)
        ],
        "first": [
            {
                "key": ours.keys[row],
                "label": class_names[labels[row]],
                "ours": class_names[mine[row]],
                "theirs": class_names[other[row]],
            }
            for row in differ[:_LISTED]
        ],
    }


def figures(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Of each split what is a number."""
    return {
        split: {name: value for name, value in of_split.items() if isinstance(value, int | float)}
        for split, of_split in scores.items()
    }


def write(folder: str, document: dict[str, Any], split: str, items: Sequence[gallery.Item]) -> None:
    """Store an evaluation in `folder`: the gallery of `split`, then the document that names it."""
    told = {"split": split, "items": gallery.write(folder, items)}
    storage.write_json(storage.join(folder, DOCUMENT), document | {"gallery": told})


def read(folder: str) -> tuple[dict[str, Any], list[gallery.Item]]:
    """The document and the gallery of `write`.

    Raises:
        FileNotFoundError: there is none.
    """
    document: dict[str, Any] = storage.read_json(storage.join(folder, DOCUMENT))
    return document, gallery.read(folder, document["gallery"]["items"])
