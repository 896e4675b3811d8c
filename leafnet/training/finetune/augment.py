"""Augmentation of photographs on the device that trains, in TensorFlow's graph.

Chance is drawn on the host, from (seed, epoch, index of the example) alone, and what the graph does
with it is a function: an example looks the same however many workers there are and wherever a run
goes on. Flips, rotation, crop and resize are one affine map, so pixels are interpolated once.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leafnet.features.views import MAX_TURN

if TYPE_CHECKING:
    import tensorflow as tf


# Uniform numbers an example needs: flips 2, turn 1, area 1, aspect 1, place 2, brightness 1,
# saturation 1, channels 3.
DRAWS = 12
# Numbers a pair of examples needs to be mixed: see `draw_mixing`.
MIXING = 5

# Crops are at most so much wider than high, or higher than wide (Szegedy et al. 2015,
# arXiv:1409.4842, have 4/3).
_ASPECT = 4 / 3
# Weights of red, green and blue in what is seen as brightness (ITU-R BT.601).
_LUMA = (0.299, 0.587, 0.114)


class Augmentation(NamedTuple):
    """How far views differ from their photograph."""

    size: int  # of the views, pixels
    crop: float  # smallest area of a crop, share of the photograph
    brightness: float  # factor 1 ± this
    colour: float  # factor 1 ± this of saturation, and half of it of each channel


def draw(indices: NDArray[np.int64], *, seed: int, epoch: int) -> NDArray[np.float32]:
    """Uniform numbers [M, DRAWS] in [0, 1) for the examples `indices` [M] in `epoch`."""
    out = np.empty((indices.size, DRAWS), np.float32)
    for row, index in zip(out, indices, strict=True):
        row[:] = np.random.default_rng([seed, epoch, 2, int(index)]).random(DRAWS, np.float32)
    return out


def draw_mixing(
    pairs: NDArray[np.int64], *, seed: int, epoch: int, mixup: float, cutmix: float
) -> NDArray[np.float32]:
    """How the `pairs` [P] of an epoch are mixed: [P, MIXING] of share, top, left, bottom, right.

    `share` is what an example keeps of itself outside of the box, whose sides are shares of the
    picture's; inside it there is only the other one. Mixup (Zhang et al. 2017, arXiv:1710.09412)
    has an empty box, CutMix (Yun et al. 2019, arXiv:1905.04899) a share of 1. Where both are set,
    each takes half of the pairs.

    Args:
        pairs: their places in the epoch's order.
        seed: of the run.
        epoch: that takes them.
        mixup: alpha of the Beta distribution of the share; 0: none.
        cutmix: alpha of the Beta distribution of what is left outside of the box; 0: none.
    """
    out = np.zeros((pairs.size, MIXING), np.float32)
    out[:, 0] = 1.0
    for row, pair in zip(out, pairs, strict=True):
        generator = np.random.default_rng([seed, epoch, 3, int(pair)])
        cut = cutmix > 0 and (mixup == 0 or generator.random() < 0.5)
        if cut:
            side = np.sqrt(1.0 - generator.beta(cutmix, cutmix))
            top, left = generator.random(2)
            box = np.array([top, left, top, left]) + side * np.array([-0.5, -0.5, 0.5, 0.5])
            row[1:] = np.clip(box, 0.0, 1.0)
        elif mixup > 0:
            row[0] = generator.beta(mixup, mixup)
    return out


def augment(pixels: "tf.Tensor", draws: "tf.Tensor", how: Augmentation) -> "tf.Tensor":
    """Augmented views [B, how.size, how.size, 3] float32 in 0..255 of photographs.

    Flips both ways, a rotation of at most 0.2 turn, a crop of random area, aspect and place that is
    resized to `how.size`, then brightness and colour. Pixels from outside mirror the edge.

    Args:
        pixels: [B, S, S, 3] uint8.
        draws: [B, DRAWS] float32 of `draw`.
        how: the extents.
    """
    import tensorflow as tf

    views = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(pixels, tf.float32),
        transforms=_transforms(draws, source=pixels.shape[1], how=how),
        output_shape=[how.size, how.size],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="REFLECT",
    )
    views = tf.ensure_shape(views, [pixels.shape[0], how.size, how.size, 3])
    if not how.brightness and not how.colour:
        return views
    flat = tf.matmul(tf.reshape(views, [-1, how.size * how.size, 3]), _colours(draws, how))
    return tf.clip_by_value(tf.reshape(flat, tf.shape(views)), 0.0, 255.0)


def _transforms(draws: "tf.Tensor", *, source: int, how: Augmentation) -> "tf.Tensor":
    """[B, 8]: where in a photograph of `source` pixels each pixel of its view comes from."""
    import tensorflow as tf

    left_right, up_down, turn, area, aspect, right, down = tf.unstack(draws[:, :7], axis=1)
    flip_x = tf.where(left_right < 0.5, -1.0, 1.0)
    flip_y = tf.where(up_down < 0.5, -1.0, 1.0)
    angle = 2 * np.pi * MAX_TURN * (2 * turn - 1)
    side = tf.sqrt(how.crop + (1 - how.crop) * area)
    stretch = tf.exp(0.5 * np.log(_ASPECT) * (2 * aspect - 1))
    width, height = tf.minimum(side * stretch, 1.0), tf.minimum(side / stretch, 1.0)
    # The crop's middle, anywhere that keeps it inside the photograph before it is turned.
    middle_x = (source - 1) / 2 + source * (1 - width) * (right - 0.5)
    middle_y = (source - 1) / 2 + source * (1 - height) * (down - 0.5)
    scale_x = flip_x * width * (source / how.size)
    scale_y = flip_y * height * (source / how.size)
    a, b = tf.cos(angle) * scale_x, -tf.sin(angle) * scale_y
    c, d = tf.sin(angle) * scale_x, tf.cos(angle) * scale_y
    centre = (how.size - 1) / 2
    zero = tf.zeros_like(a)
    return tf.stack(
        [
            *(a, b, middle_x - centre * (a + b)),
            *(c, d, middle_y - centre * (c + d)),
            *(zero, zero),
        ],
        axis=1,
    )


def _colours(draws: "tf.Tensor", how: Augmentation) -> "tf.Tensor":
    """[B, 3, 3]: RGB rows times it is RGB of another brightness, saturation and tint."""
    import tensorflow as tf

    signed = 2 * draws[:, 7:] - 1
    saturation = (1 + how.colour * signed[:, 1])[:, None, None]
    grey = tf.constant(np.repeat(np.array(_LUMA, np.float32)[:, None], 3, axis=1))
    gains = (1 + how.brightness * signed[:, :1]) * (1 + 0.5 * how.colour * signed[:, 2:])
    mixed = saturation * tf.eye(3) + (1 - saturation) * grey
    return mixed * gains[:, None, :]


def mix(views: "tf.Tensor", targets: "tf.Tensor", mixing: "tf.Tensor") -> "tuple[tf.Tensor, ...]":
    """(views, targets) with the examples of each pair mixed into each other.

    A pair is rows 2i and 2i + 1: both are of one worker, so that what is mixed does not depend on
    the number of workers.

    Args:
        views: [B, S, S, 3] float32, B even.
        targets: [B, C] float32, one row a distribution.
        mixing: [B / 2, MIXING] float32 of `draw_mixing`.
    """
    import tensorflow as tf

    share, top, left, bottom, right = tf.unstack(tf.repeat(mixing, 2, axis=0), axis=1)
    size = views.shape[1]
    middles = (tf.range(size, dtype=tf.float32) + 0.5) / size
    rows = (middles >= top[:, None]) & (middles < bottom[:, None])
    columns = (middles >= left[:, None]) & (middles < right[:, None])
    inside = rows[:, :, None] & columns[:, None, :]
    kept = tf.where(inside, 0.0, share[:, None, None])
    weight = tf.reduce_mean(kept, axis=(1, 2))[:, None]
    kept = kept[..., None]
    return (
        views * kept + _partners(views) * (1 - kept),
        targets * weight + _partners(targets) * (1 - weight),
    )


def _partners(rows: "tf.Tensor") -> "tf.Tensor":
    import tensorflow as tf

    pairs = tf.reshape(rows, [-1, 2, *rows.shape[1:]])
    return tf.reshape(pairs[:, ::-1], tf.shape(rows))
