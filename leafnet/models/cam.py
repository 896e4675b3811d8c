"""Class activation maps: where in a photograph the network sees its answer.

Between the last convolution and the logits there is an average and a small head of relu layers, so
the map needs no approximation (Zhou et al. 2016, arXiv:1512.04150, and what Selvaraju et al. 2017,
arXiv:1610.02391, come to here): the head is linear around a photograph's features, and the weight
of each feature in a logit, times that feature at a place, is what the place adds to the logit.
B photographs, h and w of the last feature map, D features, C classes.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leafnet.data.images import Pixels
from leafnet.models import resnet
from leafnet.models.classifier import Head, head_logits
from leafnet.models.weights import Array, Convolutions

_STRENGTH = 0.65  # how much of the photograph the strongest place covers


def explainer(
    convolutions: Convolutions, head: Head, *, image_size: int, precision: str
) -> Callable[[Pixels, NDArray[np.integer]], Array]:
    """A function from RGB [B, S, S, 3] uint8 and classes [B] to `class_maps` [B, h, w].

    TensorFlow runs the network, whatever runs it elsewhere.

    Args:
        convolutions: folded weights.
        head: on raw features.
        image_size: S, pixels.
        precision: `float32` or `bfloat16`.
    """
    network = resnet.build(convolutions, image_size=image_size, precision=precision, pooled=False)

    def explain(pixels: Pixels, classes: NDArray[np.integer]) -> Array:
        return class_maps(head, np.asarray(network.predict_on_batch(pixels), np.float32), classes)

    return explain


def class_maps(head: Head, maps: Array, classes: NDArray[np.integer]) -> Array:
    """What each place adds to the logit of `classes` [B], [B, h, w] float32.

    The logit is that over the mean of all classes' logits, since only differences of logits mean
    anything. The mean of a map is exactly that logit: positive places speak for the class,
    negative ones against it.

    Args:
        head: on raw features.
        maps: [B, h, w, D], of the last convolution.
        classes: of each photograph.
    """
    features = maps.mean(axis=(1, 2), dtype=np.float32)
    weights = _gradient(head, features, classes)
    logits = head_logits(head, features)
    logit = logits[np.arange(len(logits)), classes] - logits.mean(axis=1)
    # What does not depend on the place: biases, and with them the mean over the training features
    # that standardisation takes away. Every place gets the same of it.
    offset = logit - (weights * features).sum(axis=1)
    return np.asarray(np.einsum("bhwd,bd->bhw", maps, weights) + offset[:, None, None], np.float32)


def _gradient(head: Head, features: Array, classes: NDArray[np.integer]) -> Array:
    """Gradient [B, D] of the logit of `classes`, less the mean logit, by `features` [B, D]."""
    x, alive = features, []
    for kernel, bias in head[:-1]:
        x = x @ kernel + bias
        alive.append(x > 0)
        x = np.maximum(x, 0.0)
    kernel, _ = head[-1]
    back: Array = kernel.T[classes] - kernel.mean(axis=1)
    for (kernel, _), active in zip(reversed(head[:-1]), reversed(alive), strict=True):
        back = (back * active) @ kernel.T
    return back


def overlay(pixels: Pixels, class_map: Array) -> Pixels:
    """`pixels` [H, W, 3] under the positive part of `class_map` [h, w], from yellow to red.

    The strongest place is the same red in every picture: the map tells where, not how much. A map
    without positive places leaves the photograph as it is.
    """
    height, width = pixels.shape[:2]
    heat = np.maximum(class_map, 0.0)
    if heat.max() > 0:
        heat = heat / heat.max()
    enlarged = Image.fromarray(heat.astype(np.float32)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    strength = np.clip(np.asarray(enlarged), 0.0, 1.0)[..., None]
    colour = np.array([255, 230, 0]) + strength * np.array([-40, -230, 40])
    cover = _STRENGTH * strength
    return np.asarray(pixels * (1 - cover) + colour * cover, np.uint8)
