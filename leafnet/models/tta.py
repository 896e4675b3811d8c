"""Test-time augmentation: the mean over the symmetries of a square.

A leaf on the ground has no up and no left, so a photograph, its mirror images and its quarter turns
show the same disease, and none of them interpolates a pixel. It happens around the network, so any
engine runs it. B photographs, S image size, C classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from leafnet.models.classifier import Head, head_logits

Pixels = NDArray[np.uint8]
Array = NDArray[np.float32]


class Outputs(NamedTuple):
    """What the network makes of some photographs."""

    features: Array  # [B, D], of the photographs as they are
    plain: Array  # [B, C], logits of those
    logits: Array  # [B, C], mean over the views


def view(pixels: Pixels, number: int) -> Pixels:
    """View `number` of `pixels` [B, S, S, 3], in [0, 8): 0 is the photograph as it is.

    0 to 3 are the flips, 4 to 7 the same of the transposed photograph: together the dihedral group
    of the square.

    >>> square = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    >>> [view(square, number)[0, :, :, 0].tolist() for number in (0, 1, 2, 4)]
    [[[0, 1], [2, 3]], [[1, 0], [3, 2]], [[2, 3], [0, 1]], [[0, 2], [1, 3]]]
    """
    if number & 4:
        pixels = pixels.swapaxes(1, 2)
    if number & 1:
        pixels = pixels[:, :, ::-1]
    if number & 2:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def run(forward: Callable[[Pixels], Array], head: Head, pixels: Pixels, *, views: int) -> Outputs:
    """`head` on the features that `forward` makes of the first `views` views of `pixels`.

    Args:
        forward: RGB [B, S, S, 3] uint8 -> features [B, D], such as `Engine.features`.
        head: on raw features.
        pixels: [B, S, S, 3].
        views: 1, 4 or 8.
    """
    features = forward(pixels)
    plain = head_logits(head, features)
    total = plain.astype(np.float64)
    for number in range(1, views):
        total += head_logits(head, forward(view(pixels, number)))
    return Outputs(features, plain, np.asarray(total / views, np.float32))
