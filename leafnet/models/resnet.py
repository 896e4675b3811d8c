"""ResNet50 with its BatchNorms folded into the convolutions, built from arrays."""

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from leafnet.models import weights as models_weights
from leafnet.models.weights import BLOCKS, MEAN_BGR, Array

if TYPE_CHECKING:
    import keras


def build(
    weights: dict[str, tuple[Array, Array]],
    *,
    image_size: int,
    precision: str,
    pooled: bool = True,
) -> "keras.Model":
    """The folded network: RGB in 0..255, [B, image_size, image_size, 3] -> [B, 2048] float32.

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
    for name, (kernel, bias) in weights.items():
        # The weights are for BGR. To turn their channels round once is exact, and spares turning
        # every photograph's, which took 5 % of the forward pass on two cores.
        folded.get_layer(name).set_weights(
            [kernel[:, :, ::-1] if name == "conv1_conv" else kernel, bias]
        )

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


def build_parts(
    weights: dict[str, tuple[Array, Array]], *, precision: str, blocks: int | Literal["all"]
) -> Parts:
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
    # Channels are turned as in `build`, but for a stem that is trained, whose kernel stays for BGR.
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
    for part in (frozen, trained):
        for layer in part.layers:
            if layer.weights:
                kernel, bias = weights[layer.name]
                if turned and layer.name == "conv1_conv":
                    kernel = kernel[:, :, ::-1]
                layer.set_weights([kernel, bias])
    return Parts(frozen, trained)


def _layers(x: "keras.KerasTensor", precision: str, stages: range) -> "keras.KerasTensor":
    """The `stages` of Keras's ResNet50 without BatchNorm, and without weights that matter.

    Built here and not cloned from `keras.applications`, whose random initial weights took three
    quarters of the time of building.
    """
    import keras

    shapes = {conv: shape for conv, _, shape in models_weights.convolutions()}

    def conv(x: "keras.KerasTensor", name: str, stride: int = 1) -> "keras.KerasTensor":
        height, width, _, filters = shapes[f"{name}_conv"]
        return keras.layers.Conv2D(
            filters,
            (height, width),
            strides=stride,
            padding="valid" if name == "conv1" else "same",
            kernel_initializer="zeros",
            dtype=precision,
            name=f"{name}_conv",
        )(x)

    def relu(x: "keras.KerasTensor") -> "keras.KerasTensor":
        return keras.layers.Activation("relu", dtype=precision)(x)

    if 1 in stages:
        x = relu(conv(keras.layers.ZeroPadding2D(3, dtype=precision)(x), "conv1", stride=2))
        x = keras.layers.ZeroPadding2D(1, dtype=precision)(x)
        x = keras.layers.MaxPooling2D(3, strides=2, dtype=precision)(x)
    for stage, blocks in BLOCKS.items():
        if stage not in stages:
            continue
        for block in range(1, blocks + 1):
            name = f"conv{stage}_block{block}"
            stride = 2 if block == 1 and stage > 2 else 1
            shortcut = conv(x, f"{name}_0", stride) if block == 1 else x
            x = relu(conv(x, f"{name}_1", stride))
            x = conv(relu(conv(x, f"{name}_2")), f"{name}_3")
            x = relu(keras.layers.Add(dtype=precision)([shortcut, x]))
    return x
