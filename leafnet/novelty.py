"""How unlike everything trained on a photograph is, from its features.

The distance is Mahalanobis's (Lee et al. 2018, arXiv:1807.03888), of compressed features from
their mean over the training split. Of D = 2,048 features and far fewer directions in which
photographs of leaves differ, a plain covariance cannot be inverted: its leading directions are
kept, and what is left is taken as equally spread over all others (probabilistic PCA, Tipping and
Bishop 1999), which also is what makes it small.

`python -m tests.benchmarks.novelty` measures it beside others.
"""

from dataclasses import asdict, dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float32]

# At most a quarter of the examples: more directions would be fitted to each of them.
_DIRECTIONS = 256
# Photographs that the covariance is taken of, evenly from the whole split: ten times the features,
# which bounds memory and time.
_SAMPLE = 20_000


@dataclass(frozen=True)
class Novelty:
    """A distance from the training photographs. D features, K directions."""

    unit: Array  # [D], scale of each feature
    mean: Array  # [D], of compressed features
    directions: Array  # [D, K], orthonormal
    spread: Array  # [K], deviation along each
    rest: Array  # [], deviation along every other direction

    def arrays(self) -> dict[str, Array]:
        """What it consists of, for a file; `Novelty(**arrays)` is the same again."""
        arrays: dict[str, Array] = asdict(self)
        return arrays

    def distance(self, features: NDArray[np.floating]) -> Array:
        """Distances [B] float32 of `features` [B, D], in deviations; about sqrt(D) is usual."""
        centred = _compress(features, self.unit) - self.mean
        along = centred @ self.directions
        beside = np.maximum((centred**2).sum(axis=1) - (along**2).sum(axis=1), 0.0)
        squares = ((along / self.spread) ** 2).sum(axis=1) + beside / self.rest**2
        return np.asarray(np.sqrt(squares), np.float32)


def fit(features: NDArray[np.floating]) -> Novelty:
    """The distance from `features` [N, D], N >= 1, which may be memory-mapped.

    At most 20,000 rows are read, evenly from all.
    """
    count = len(features)
    rows = np.arange(0, count, -(-count // _SAMPLE))
    sample = np.asarray(features[rows], np.float32)
    # A feature that is 0 on half of the photographs is measured by its mean.
    unit = np.maximum(np.median(sample, axis=0), 0.1 * sample.mean(axis=0)) + 1e-6
    compressed = _compress(sample, unit)
    mean = compressed.mean(axis=0)
    centred = compressed - mean
    width = centred.shape[1]
    total = float((centred**2).sum()) / len(rows)
    # Where all photographs are alike, rounding is what is left.
    floor = 1e-6 * (1.0 + total / width)
    variances, directions = _leading(centred, min(_DIRECTIONS, len(rows) // 4), floor=floor)
    rest = (total - float(variances.sum())) / (width - len(variances))
    return Novelty(
        unit=unit.astype(np.float32),
        mean=mean.astype(np.float32),
        directions=directions.astype(np.float32),
        spread=np.sqrt(variances).astype(np.float32),
        rest=np.sqrt(np.float32(max(rest, floor))),
    )


def _leading(centred: Array, count: int, *, floor: float) -> tuple[Array, Array]:
    """(variances [K], directions [D, K]) of the rows of `centred` [N, D], K <= `count` < D.

    Directions of a variance under `floor` are left out, which is how K can be smaller.
    """
    examples, width = centred.shape
    count = min(count, width - 1)
    # Of the two matrices with the same eigenvalues the smaller: [D, D] takes seconds.
    few = examples < width
    matrix = (centred @ centred.T if few else centred.T @ centred) / examples
    last = len(matrix) - 1
    if count < 1:
        return np.zeros(0, np.float32), np.zeros((width, 0), np.float32)
    variances, vectors = scipy.linalg.eigh(matrix, subset_by_index=[last - count + 1, last])
    kept = variances > floor
    variances, vectors = variances[kept], vectors[:, kept]
    if few:
        vectors = centred.T @ vectors / np.sqrt(variances * examples)
    return variances, vectors


def _compress(features: NDArray[np.floating], unit: Array) -> Array:
    """log(1 + feature / unit), elementwise; features are means after a relu, so never negative.

    Their tails are heavy (the norms of ordinary photographs' features span a factor of 400 with
    some weights), and a few photographs far out would decide over the covariance and threshold.
    """
    compressed: Array = np.log1p(np.maximum(np.asarray(features, np.float32), 0.0) / unit)
    return compressed
