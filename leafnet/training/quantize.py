"""The backbone quantized to int8, and whether its accuracy allows to publish it."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from leafnet.core import hardware
from leafnet.data import shards
from leafnet.data.images import Pixels, decode
from leafnet.data.shards import ShardIndex
from leafnet.distributed.resources import Machines
from leafnet.metrics.novelty import Novelty
from leafnet.metrics.thresholds import Outcomes, outcomes
from leafnet.models import openvino
from leafnet.models.classifier import Head, head_logits
from leafnet.models.openvino import Int8

# The validation accuracy that int8 may cost, and the examples it is measured on at most.
_MAX_FALL = 0.005
_MAX_VALID = 10_000


class Quantized(NamedTuple):
    """A quantized backbone and what it does on validation examples."""

    int8: Int8
    calibration_examples: int
    outcomes: Outcomes  # of the first examples of the validation split, in their order


def quantize(
    index: ShardIndex,
    weights: "ray.ObjectRef[Any]",
    head: Head,
    distance: Novelty,
    *,
    image_size: int,
    machines: Machines,
) -> Quantized:
    """Quantize the backbone on training photographs and try it on validation photographs.

    One task on one node: calibration takes a few hundred photographs, and 10,000 tell the
    accuracies apart. Examples are shuffled in the shards, so the first are a fair sample.

    Args:
        index: of a data set with both splits.
        weights: `backbone.Weights.convolutions`, in Ray's object store.
        head: on raw features.
        distance: of the same features.
        image_size: pixels.
        machines: what there is to run on.
    """
    task = ray.remote(num_cpus=machines.cpus_per_actor)(_quantize)
    quantized: Quantized = ray.get(
        task.remote(index, weights, head, distance, image_size, machines.threads_per_actor)
    )
    return quantized


def accept_int8(accuracy: float, of_float: float) -> bool:
    """True unless int8 costs more than half a point of validation accuracy.

    >>> accept_int8(0.895, 0.900), accept_int8(0.894, 0.900), accept_int8(0.91, 0.90)
    (True, False, True)
    """
    return of_float - accuracy <= _MAX_FALL + 1e-9


def _quantize(
    index: ShardIndex,
    weights: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
    head: Head,
    distance: Novelty,
    image_size: int,
    threads: int,
) -> Quantized:
    calibration = list(
        itertools.islice(
            (pixels for pixels, _ in _photographs(index, "train", image_size)),
            openvino.CALIBRATION_EXAMPLES,
        )
    )
    graph = openvino.build(weights, image_size=image_size)
    int8 = openvino.quantize(graph, calibration)
    precision, _ = hardware.choose_precision("auto", compute_capability=None)
    forward = openvino.compile_model(openvino.read(int8), precision=precision, threads=threads)
    parts, labels = [], []
    valid = itertools.islice(_photographs(index, "valid", image_size), _MAX_VALID)
    while batch := list(itertools.islice(valid, 32)):
        parts.append(forward(np.stack([pixels for pixels, _ in batch])))
        labels += [label for _, label in batch]
    features = np.concatenate(parts)
    return Quantized(
        int8,
        len(calibration),
        outcomes(head_logits(head, features), np.array(labels), distance.distance(features)),
    )


def _photographs(index: ShardIndex, split: str, image_size: int) -> Iterator[tuple[Pixels, int]]:
    """(pixels, label) of each example of `split`, in the order of its cached features."""
    for shard in sorted(index.of_split(split), key=lambda shard: shard.name):
        for table in shards.row_groups(index.root, shard, cache=index.cache):
            images, labels = table.column("image").to_pylist(), table.column("label").to_pylist()
            for image, label in zip(images, labels, strict=True):
                yield decode(image, image_size).pixels, label
