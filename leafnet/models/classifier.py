"""Backbone and head as one network: uint8 pixels in, logits out."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from leafnet.models import resnet
from leafnet.models.weights import Array, Convolutions

if TYPE_CHECKING:
    import keras


# One (kernel [in, out], bias [out]) for each Dense layer; all but the last are followed by relu.
Head = list[tuple[Array, Array]]


def initial_head(units: Sequence[int], num_classes: int, *, inputs: int, seed: int) -> Head:
    """Glorot-uniform kernels and zero biases (Glorot and Bengio 2010), the same on every worker."""
    generator = np.random.default_rng([seed, 0x4EAD])
    widths = [inputs, *units, num_classes]
    head = []
    for fan_in, fan_out in itertools.pairwise(widths):
        limit = np.sqrt(6.0 / (fan_in + fan_out))
        kernel = generator.uniform(-limit, limit, (fan_in, fan_out)).astype(np.float32)
        head.append((kernel, np.zeros(fan_out, np.float32)))
    return head


def fold_standardisation(head: Head, *, mean: Array, deviation: Array) -> Head:
    """The head that does on raw features what `head` does on (features - mean) / deviation.

    Args:
        head: fitted on standardised features.
        mean: [D], of the training features.
        deviation: [D], positive.
    """
    (kernel, bias), *rest = head
    scaled = kernel.astype(np.float64) / deviation[:, None].astype(np.float64)
    shifted = bias - mean.astype(np.float64) @ scaled
    return [(scaled.astype(np.float32), shifted.astype(np.float32)), *rest]


def head_logits(head: Head, features: NDArray[np.floating]) -> Array:
    """Logits [B, C] float32 of `features` [B, D], with numpy alone."""
    x = features.astype(np.float32)
    for kernel, bias in head[:-1]:
        x = np.maximum(x @ kernel + bias, 0.0)
    kernel, bias = head[-1]
    return np.asarray(x @ kernel + bias, np.float32)


def build(weights: Convolutions, head: Head, *, image_size: int, precision: str) -> "keras.Model":
    """The classifier: RGB [B, image_size, image_size, 3] uint8 -> logits [B, C] float32.

    Args:
        weights: folded.
        head: for raw features, see `fold_standardisation`. It runs in float32.
        image_size: pixels.
        precision: of the backbone, `float32` or `bfloat16`.
    """
    import keras

    images = keras.Input((image_size, image_size, 3), dtype="uint8", name="image")
    features = resnet.build(weights, image_size=image_size, precision=precision)(
        keras.ops.cast(images, "float32")
    )
    x = features
    for i, (kernel, bias) in enumerate(head):
        last = i == len(head) - 1
        dense = keras.layers.Dense(
            kernel.shape[1],
            activation=None if last else "relu",
            kernel_initializer="zeros",
            name="logits" if last else f"hidden_{i}",
            dtype="float32",
        )
        x = dense(x)
        dense.set_weights([kernel, bias])
    model = keras.Model(images, x, name="classifier")
    model.trainable = False
    return model


def fold_temperature(head: Head, temperature: float) -> Head:
    """The head whose logits are those of `head` divided by `temperature`."""
    *rest, (kernel, bias) = head
    factor = np.float32(1.0 / temperature)
    return [*rest, (kernel * factor, bias * factor)]
