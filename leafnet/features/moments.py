"""Mean and deviation of features, added up block by block."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float16]

# Vectors that are worked on at a time, so that memory does not grow with the data set: 16 MB in
# float64.
BLOCK = 1024


class Moments(NamedTuple):
    """Sums over feature vectors, to be added before anything is divided."""

    vectors: int
    total: NDArray[np.float64]  # [D]
    squares: NDArray[np.float64]  # [D]


def moments(features: Features, rows: NDArray[np.int64] | None = None) -> Moments:
    """The sums over all views of the examples `rows` (none: all) of `features` [N, K, D].

    In float64, and a block at a time: N may be larger than memory.
    """
    total = np.zeros(features.shape[2])
    squares = np.zeros(features.shape[2])
    examples = features.shape[0] if rows is None else rows.size
    step = max(1, BLOCK // features.shape[1])
    for start in range(0, examples, step):
        stop = min(start + step, examples)
        block = features[start:stop] if rows is None else features[rows[start:stop]]
        values = block.reshape(-1, features.shape[2]).astype(np.float64)
        total += values.sum(axis=0)
        squares += np.square(values).sum(axis=0)
    return Moments(examples * features.shape[1], total, squares)


def statistics(*parts: Moments) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and deviation [D] over all of `parts`.

    A feature that never changes gets the deviation 1, so that dividing by it is harmless.
    """
    count = sum(part.vectors for part in parts)
    mean = np.sum([part.total for part in parts], axis=0) / count
    squares = np.sum([part.squares for part in parts], axis=0) / count
    deviation = np.sqrt(np.maximum(squares - mean**2, 0.0))
    # float16 has 11 bits: a spread below that is rounding and would be blown up to noise.
    constant = deviation <= 1e-4 * np.abs(mean) + 1e-12
    return mean.astype(np.float32), np.where(constant, 1.0, deviation).astype(np.float32)
