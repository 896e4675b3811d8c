"""Which photographs of a night are most worth a label: uncertain, novel, and unlike each other.

N photographs, C classes, D features.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Places = NDArray[np.int64]

# Of unit vectors: what is closer is the same photograph again.
_SAME = 1e-4


def margin(probabilities: Array) -> Array:
    """By how much the best class leads the second, [N] of probabilities [N, C]; 0: not at all.

    Scheffer et al. 2001, "Active hidden Markov models for information extraction".

    >>> margin(np.float32([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]])).tolist()
    [0.25, 0.0]
    """
    ordered = np.sort(probabilities, axis=1)
    lead: Array = ordered[:, -1] - ordered[:, -2]
    return lead


def pool(margins: Array, novelty: Array | None, size: int) -> Places:
    """Places of at most `size` photographs: in turn the next most uncertain and most novel.

    The first is the most uncertain. Ties go to the earlier photograph; a photograph without a
    novelty (NaN) is never novel.

    Args:
        margins: [N].
        novelty: [N]; None: the model has no such measure, and only uncertainty counts.
        size: how many.

    >>> pool(np.float32([0.9, 0.1, 0.5, 0.8]), np.float32([9, 1, 2, 5]), 3).tolist()
    [1, 0, 2]
    """
    lists = [np.argsort(margins, kind="stable")]
    if novelty is not None and np.isfinite(novelty).any():
        order = np.argsort(-np.nan_to_num(novelty, nan=-np.inf), kind="stable")
        lists.append(order[: int(np.isfinite(novelty).sum())])
    chosen: dict[int, None] = {}
    places = [0] * len(lists)
    while len(chosen) < min(size, len(margins)):
        for i, order in enumerate(lists):
            while places[i] < len(order) and int(order[places[i]]) in chosen:
                places[i] += 1
            if places[i] < len(order) and len(chosen) < size:
                chosen[int(order[places[i]])] = None
    return np.array(list(chosen), np.int64)


def k_center(features: NDArray[np.floating], count: int) -> tuple[Places, Array]:
    """Places of at most `count` rows that lie in front of all others, the first row first.

    Each next row is the one farthest from those before: the greedy 2-approximation of the k-center
    problem, as core sets for active learning are found in Sener and Savarese 2018,
    arXiv:1708.00489, algorithm 1. Rows are compared as unit vectors, because the length of a
    photograph's features says more of its contrast than of what is on it. It stops where only
    copies are left.

    Args:
        features: [N, D], N >= 1.
        count: how many.

    Returns:
        Places [K] and the distance [K] of each from the nearest before it, infinite for the first.

    >>> places, distances = k_center(np.array([[1.0, 0], [2, 0], [0, 1], [1, 1]]), 4)
    >>> places.tolist(), [f"{distance:.2f}" for distance in distances]
    ([0, 2, 3], ['inf', '1.41', '0.77'])
    """
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit = np.asarray(features / np.maximum(lengths, 1e-12), np.float64)
    places, distances = [0], [np.inf]
    nearest = np.linalg.norm(unit - unit[0], axis=1)
    while len(places) < min(count, len(unit)):
        farthest = int(nearest.argmax())
        if nearest[farthest] < _SAME:
            break
        places.append(farthest)
        distances.append(float(nearest[farthest]))
        nearest = np.minimum(nearest, np.linalg.norm(unit - unit[farthest], axis=1))
    return np.array(places, np.int64), np.array(distances, np.float32)
