"""ResNet50 with its BatchNorms folded into the convolutions, built from arrays."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from leafnet.models import weights as models_weights
from leafnet.models.weights import BLOCKS, MEAN_BGR, Convolutions

if TYPE_CHECKING:
    import keras


class Operators(NamedTuple):
    """What a framework needs to have for ResNet50, on tensors of its own."""

    convolve: Callable[[Any, str, int, int], Any]  # of (x, name, stride, zeros on each side)
    relu: Callable[[Any], Any]
    max_pool: Callable[[Any], Any]  # 3 x 3 with stride 2, after a relu, one pixel of padding
    add: Callable[[Any, Any], Any]


def apply_stages(operators: Operators, x: Any, stages: range = range(1, 6)) -> Any:
    """Apply stages of Keras's ResNet50, without BatchNorm, to `x`; stage 1 is the stem.

    The architecture is that of `weights.convolutions`.
    """
    convolve, relu, max_pool, add = operators
    if 1 in stages:
        x = max_pool(relu(convolve(x, "conv1_conv", 2, 3)))
    for stage, blocks in BLOCKS.items():
        if stage not in stages:
            continue
        for block in range(1, blocks + 1):
            name = f"conv{stage}_block{block}"
            stride = 2 if block == 1 and stage > 2 else 1
            shortcut = convolve(x, f"{name}_0_conv", stride, 0) if block == 1 else x
            y = relu(convolve(x, f"{name}_1_conv", stride, 0))
            y = relu(convolve(y, f"{name}_2_conv", 1, 1))
            x = relu(add(shortcut, convolve(y, f"{name}_3_conv", 1, 0)))
    return x


def for_rgb(weights: Convolutions) -> Convolutions:
    """Turn the channels of the first kernel round, so that it takes RGB where Keras's takes BGR.

    It is exact, and spares turning every photograph, which took 5 % of the forward pass on two
    cores.
    """
    kernel, bias = weights["conv1_conv"]
    return weights | {"conv1_conv": (kernel[:, :, ::-1], bias)}


def build(
    weights: Convolutions,
    *,
    image_size: int,
    precision: str,
    pooled: bool = True,
) -> "keras.Model":
    """Build the folded network: RGB in 0..255, [B, image_size, image_size, 3] -> [B, 2048] float32.

    Input scaling is inside, so that training, evaluation and scoring cannot drift apart. The
    average over the last feature map is taken in float32 also where the network runs in bfloat16.

    Args:
        weights: as `Weights.convolutions`.
        image_size: pixels; the network is built for squares of this size.
        precision: `float32` or `bfloat16`, of convolutions and their weights.
        pooled: False leaves the average out: the last feature map, [B, h, w, 2048].
    """
    import keras

    maps_in = keras.Input((image_size, image_size, 3), dtype=precision)
    folded = keras.Model(maps_in, _layers(maps_in, precision, range(1, 6)), name="resnet50")
    for name, arrays in for_rgb(weights).items():
        folded.get_layer(name).set_weights(arrays)

    images = keras.Input((image_size, image_size, 3), dtype="float32", name="rgb")
    centred = images - np.array(MEAN_BGR[::-1], np.float32)
    features = keras.ops.cast(folded(keras.ops.cast(centred, precision)), "float32")
    if pooled:
        features = keras.ops.mean(features, axis=(1, 2))
    model = keras.Model(images, features, name="backbone")
    model.trainable = False
    return model


class Parts(NamedTuple):
    """The network in two, for squares of any size."""

    frozen: "keras.Model"  # RGB in 0..255 [B, S, S, 3] float32 -> maps [B, h, w, c] in `precision`
    trained: "keras.Model"  # maps -> features [B, 2048] float32; its variables are float32


def build_parts(weights: Convolutions, *, precision: str, blocks: int | Literal["all"]) -> Parts:
    """The folded network cut before its last `blocks` stages, which can be trained.

    One after the other they compute what `build` computes. The variables of the trained part are
    float32 in either precision, rounded to it as they are used: an update at a low rate is smaller
    than what bfloat16 tells apart.

    Args:
        weights: as `Weights.convolutions`.
        precision: `float32` or `bfloat16`, of convolutions.
        blocks: stages from the end, 1 to 4; `all`: these and the stem.
    """
    import keras

    first = 1 if blocks == "all" else 6 - blocks
    images = keras.Input((None, None, 3), dtype="float32", name="rgb")
    # The channels are turned round as in `build`, unless the stem is trained: its kernel stays BGR.
    turned = first > 1
    centred = (images if turned else images[..., ::-1]) - np.array(
        MEAN_BGR[::-1] if turned else MEAN_BGR, np.float32
    )
    below = _layers(keras.ops.cast(centred, precision), precision, range(1, first))
    frozen = keras.Model(images, below, name="frozen")
    frozen.trainable = False

    maps = keras.Input(tuple(below.shape[1:]), dtype=precision, name="maps")
    policy = "mixed_bfloat16" if precision == "bfloat16" else precision
    above = keras.ops.cast(_layers(maps, policy, range(first, 6)), "float32")
    trained = keras.Model(maps, keras.ops.mean(above, axis=(1, 2)), name="trained")
    arrays = for_rgb(weights) if turned else weights
    for layer in [*frozen.layers, *trained.layers]:
        if layer.weights:
            layer.set_weights(arrays[layer.name])
    return Parts(frozen, trained)


def _layers(x: "keras.KerasTensor", precision: str, stages: range) -> "keras.KerasTensor":
    """Apply `stages` as Keras layers, without weights that matter.

    Built here and not cloned from `keras.applications`, whose random initial weights took three
    quarters of the time of building.
    """
    import keras

    shapes = {name: shape for name, _, shape in models_weights.convolutions()}

    def convolve(x: "keras.KerasTensor", name: str, stride: int, pad: int) -> "keras.KerasTensor":
        height, width, _, filters = shapes[name]
        if stride > 1 and pad:  # "same" would pad one side more than the other
            x = keras.layers.ZeroPadding2D(pad, dtype=precision)(x)
        return keras.layers.Conv2D(
            filters,
            (height, width),
            strides=stride,
            padding="valid" if stride > 1 and pad else "same",
            kernel_initializer="zeros",
            dtype=precision,
            name=name,
        )(x)

    def max_pool(x: "keras.KerasTensor") -> "keras.KerasTensor":
        x = keras.layers.ZeroPadding2D(1, dtype=precision)(x)
        return keras.layers.MaxPooling2D(3, strides=2, dtype=precision)(x)

    operators = Operators(
        convolve=convolve,
        relu=lambda x: keras.layers.Activation("relu", dtype=precision)(x),
        max_pool=max_pool,
        add=lambda x, y: keras.layers.Add(dtype=precision)([x, y]),
    )
    return apply_stages(operators, x, stages)
