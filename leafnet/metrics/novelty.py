"""How unlike everything trained on a photograph is, from its features.

The distance is Mahalanobis's (Lee et al. 2018, arXiv:1807.03888), of compressed features from
their mean over the training split. Of D = 2,048 features and far fewer directions in which
photographs of leaves differ, a plain covariance cannot be inverted: its leading directions are
kept, and what is left is taken as equally spread over all others (probabilistic PCA, Tipping and
Bishop 1999), which also is what makes it small.

`python -m tests.benchmarks.novelty` measures it beside others.
"""

from collections.abc import Iterator
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
# Of it at a time: all of it in float32, and in each step of the way, would be a gigabyte.
_ROWS, _COLUMNS = 1024, 64


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
    sample = features[np.arange(0, count, -(-count // _SAMPLE))]
    examples, width = sample.shape
    unit = _units(sample)
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in _blocks(sample, unit)) / examples
    mean = np.asarray(mean, np.float32)
    # Of the two matrices with the same eigenvalues the smaller: [D, D] takes seconds.
    centred = None
    if examples < width:
        centred = np.concatenate([block - mean for block in _blocks(sample, unit)])
        matrix = centred @ centred.T
    else:
        matrix = np.zeros((width, width), np.float32)
        for block in _blocks(sample, unit):
            block -= mean
            matrix += block.T @ block
    matrix /= examples
    total = float(np.trace(matrix, dtype=np.float64))
    # Where all photographs are alike, rounding is what is left.
    floor = 1e-6 * (1.0 + total / width)
    most = min(_DIRECTIONS, examples // 4, width - 1)
    variances, directions = _leading(matrix, most, floor=floor)
    if centred is not None:
        directions = centred.T @ directions / np.sqrt(variances * examples)
    rest = (total - float(variances.sum())) / (width - len(variances))
    return Novelty(
        unit=unit.astype(np.float32),
        mean=mean.astype(np.float32),
        directions=directions.astype(np.float32),
        spread=np.sqrt(variances).astype(np.float32),
        rest=np.sqrt(np.float32(max(rest, floor))),
    )


def _units(sample: NDArray[np.floating]) -> Array:
    """The scale [D] of each feature of `sample` [N, D]: its median."""
    units = []
    for at in range(0, sample.shape[1], _COLUMNS):
        columns = np.asarray(sample[:, at : at + _COLUMNS], np.float32)
        # A feature that is 0 on half of the photographs is measured by its mean.
        units.append(np.maximum(np.median(columns, axis=0), 0.1 * columns.mean(axis=0)) + 1e-6)
    return np.concatenate(units)


def _blocks(sample: NDArray[np.floating], unit: Array) -> Iterator[Array]:
    """`sample` [N, D], compressed, a few rows at a time."""
    for at in range(0, len(sample), _ROWS):
        yield _compress(sample[at : at + _ROWS], unit)


def _leading(matrix: Array, count: int, *, floor: float) -> tuple[Array, Array]:
    """(eigenvalues [K], eigenvectors [M, K]) of `matrix` [M, M], the largest, K <= `count` < M.

    Those under `floor` are left out, which is how K can be smaller.
    """
    last = len(matrix) - 1
    if count < 1:
        return np.zeros(0, np.float32), np.zeros((len(matrix), 0), np.float32)
    variances, vectors = scipy.linalg.eigh(matrix, subset_by_index=[last - count + 1, last])
    kept = variances > floor
    return variances[kept], vectors[:, kept]


def _compress(features: NDArray[np.floating], unit: Array) -> Array:
    """log(1 + feature / unit), elementwise; features are means after a relu, so never negative.

    Their tails are heavy (the norms of ordinary photographs' features span a factor of 400 with
    some weights), and a few photographs far out would decide over the covariance and threshold.
    """
    compressed: Array = np.log1p(np.maximum(np.asarray(features, np.float32), 0.0) / unit)
    return compressed
