"""Several models over the same examples, with Ray Data: what a comparison is made of."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from leafnet import backbone, bundle, inference
from leafnet.backbone import Array, limit_threads
from leafnet.bundle import Bundle
from leafnet.classifier import Head, head_logits
from leafnet.cluster import Board, Machines
from leafnet.shards import ShardIndex

Convolutions = dict[str, tuple[Array, Array]]
Labels = NDArray[np.int64]


def logits_of(
    models: Sequence[Bundle],
    index: ShardIndex,
    split: str,
    *,
    precision: str,
    batch_size: int,
    machines: Machines,
    advance: Callable[[int], None],
) -> tuple[list[Array], Labels]:
    """Logits [N, C] of each model and labels [N], for every example of `split`.

    The examples are in the order of the index for all models, so that these can be compared one by
    one. Models of the same image size share the decoding, and those of the same backbone its pass.

    Raises:
        RuntimeError: an example did not come back.
    """
    results: dict[int, Array] = {}
    labels: Labels = np.zeros(0, np.int64)
    for size in sorted({model.image_size for model in models}):
        places = [i for i, model in enumerate(models) if model.image_size == size]
        some = [models[i] for i in places]
        made, labels = _logits_of_size(
            some, index, split, size, precision, batch_size, machines, advance
        )
        results |= dict(zip(places, made, strict=True))
    return [results[i] for i in range(len(models))], labels


def _logits_of_size(
    models: Sequence[Bundle],
    index: ShardIndex,
    split: str,
    image_size: int,
    precision: str,
    batch_size: int,
    machines: Machines,
    advance: Callable[[int], None],
) -> tuple[list[Array], Labels]:
    backbones: list[Convolutions] = []
    heads: list[tuple[int, Head]] = []  # place of its backbone, and the head
    for model in models:
        same = (i for i, known in enumerate(backbones) if _equal(known, model.convolutions))
        place = next(same, len(backbones))
        if place == len(backbones):
            backbones.append(model.convolutions)
        heads.append((place, model.head))
    wanted = index.of_split(split)
    board = Board()
    results = inference.over_shards(
        index,
        wanted,
        wanted=None,
        image_size=image_size,
        actor=_Predictor,
        actor_args=(ray.put(backbones), heads, image_size, precision, batch_size, board.handle),
        machines=machines,
    )
    found: dict[tuple[str, int], tuple[Array, Labels]] = {}
    with board.follow(advance):
        for row in results.iter_rows():
            labels = np.frombuffer(row["labels"], np.int64)
            logits = np.frombuffer(row["logits"], np.float32)
            found[str(row["shard"]), int(row["row_group"])] = (
                logits.reshape(len(models), len(labels), -1),
                labels,
            )
    groups = [found[shard.name, i] for shard in wanted for i in range(len(shard.row_groups))]
    labels = np.concatenate([labels for _, labels in groups])
    if len(labels) != index.examples(split):
        raise RuntimeError(
            f"{len(labels)} examples of {split} came back, which has {index.examples(split)}"
        )
    return list(np.concatenate([logits for logits, _ in groups], axis=1)), labels


def _equal(
    a: Convolutions,
    b: Convolutions,
) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True)
    )


class _Predictor:
    """An actor that gives the logits of several models for a row group."""

    def __init__(
        self,
        backbones: Any,
        heads: list[tuple[int, Head]],
        image_size: int,
        precision: str,
        batch_size: int,
        board: Any,
        threads: int,
        gpu: bool,
    ) -> None:
        limit_threads(threads, gpu=gpu)
        backbones = ray.get(backbones) if isinstance(backbones, ray.ObjectRef) else backbones
        self._networks = [
            backbone.build(weights, image_size=image_size, precision=precision)
            for weights in backbones
        ]
        self._heads, self._batch_size, self._board = heads, batch_size, board

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        found = [
            bundle.forward(network, batch["pixels"][0], batch_size=self._batch_size)
            for network in self._networks
        ]
        logits = np.stack([head_logits(head, found[place]) for place, head in self._heads])
        self._board.post.remote(len(self._heads) * len(found[0]))
        return {
            "shard": batch["shard"],
            "row_group": batch["row_group"],
            # Bytes: groups differ in length, and Ray would pickle arrays that do.
            "logits": np.array([logits.tobytes()], object),
            "labels": np.array([np.asarray(batch["labels"][0], np.int64).tobytes()], object),
        }
