"""How far the border of a photograph alone tells its class.

Photographs of one class are often taken in one place on one day, and a network takes the table for
the disease: Noyan 2022 (arXiv:2206.04374) predicted 49 % of the labels of PlantVillage's 38 classes
from eight background pixels, where guessing gives 2.6 %. A probe that sees nothing but the colours
of the border puts a number on it. N examples, S image size, C classes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafnet.metrics.intervals import share

WIDTH = 8  # pixels of the border
STATISTICS = 24  # mean and deviation of three colours on four sides
_FOLDS = 5
# Enough to know the accuracy to a point, and seconds to fit.
_SAMPLE = 10_000
# The share of the model's lead over the majority that the border may have before it is told.
_MUCH = 0.5


def border(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Colour statistics [N, STATISTICS] of the border of `pixels` [N, S, S, 3], in [0, 1].

    Mean and standard deviation of each colour on each side, `WIDTH` pixels deep.
    """
    sides = (
        pixels[:, :WIDTH],
        pixels[:, -WIDTH:],
        pixels[:, :, :WIDTH],
        pixels[:, :, -WIDTH:],
    )
    found = []
    for side in sides:
        values = side.astype(np.float32) / 255
        found += [values.mean(axis=(1, 2)), values.std(axis=(1, 2))]
    return np.concatenate(found, axis=1)


def probe(
    statistics: NDArray[np.floating],
    labels: NDArray[np.integer],
    *,
    model_accuracy: float,
    groups: NDArray[np.integer] | None = None,
    seed: int = 0,
) -> dict[str, Any] | None:
    """How often a logistic regression on the border is right, over five folds; ready for JSON.

    Args:
        statistics: [N, F], of `border`.
        labels: [N], class indices.
        model_accuracy: of the model that is judged, on the same examples.
        groups: [N], such as the plant of each photograph: no group is both learnt from and judged
            on, as a border that knows the plant knows its class.
        seed: of folds and of the sample that is taken of more than 10,000.

    Returns:
        `accuracy` with its 95 % interval `low` to `high`, beside `majority`, what naming the most
        frequent class gives; `share_of_lead`, the probe's lead over the majority as a share of the
        model's (None where the model has none); `high_warning`, whether it is surely above the
        majority and has half of the model's lead or more. None where there are fewer than two
        classes with five examples, or five groups, or where the statistics say nothing because all
        are the same.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    generator = np.random.default_rng(seed)
    if len(labels) > _SAMPLE:
        rows = np.sort(generator.choice(len(labels), _SAMPLE, replace=False))
        statistics, labels = statistics[rows], labels[rows]
        groups = None if groups is None else groups[rows]
    alone = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    # In how many groups each class is.
    pairs = np.unique(np.stack([labels, alone]), axis=1)
    kept = np.isin(labels, np.flatnonzero(np.bincount(pairs[0]) >= _FOLDS))
    statistics, labels, alone = statistics[kept], labels[kept], alone[kept]
    if len(np.unique(labels)) < 2 or np.ptp(statistics, axis=0).max() == 0:
        return None
    fold = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = fold(_FOLDS, shuffle=True, random_state=seed)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    together = None if groups is None else alone
    guessed = cross_val_predict(classifier, statistics, labels, cv=folds, groups=together)
    examples = len(labels)
    low, high = share(guessed == labels, groups=together)
    accuracy = float((guessed == labels).mean())
    majority = float(np.bincount(labels).max() / examples)
    lead = model_accuracy - majority
    of_lead = (accuracy - majority) / lead if lead > 0 else None
    return {
        "examples": examples,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "majority": majority,
        "share_of_lead": of_lead,
        "high_warning": low > majority and (of_lead is None or of_lead >= _MUCH),
    }
