"""The frozen network over every photograph of a data set, with Ray Data: features, evaluation.

Two stages. Tasks read whole shards, check and decode them; actors hold the network. A row between
them is a row group of decoded pixels, so that no group is ever cut in two on its way.
"""

import json
import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from leafnet.core import interrupts
from leafnet.core.hardware import limit_threads
from leafnet.data.images import Pixels
from leafnet.data.shards import ShardIndex
from leafnet.distributed import fastest, pipeline
from leafnet.distributed.heartbeat import Board
from leafnet.distributed.resources import Machines
from leafnet.evaluation import gallery
from leafnet.metrics import background
from leafnet.models import bundle, cam, engine, resnet, runtime, tta
from leafnet.models.bundle import Bundle
from leafnet.models.classifier import Head, head_logits
from leafnet.models.rates import CLEARLY, Way
from leafnet.models.weights import Array

Convolutions = dict[str, tuple[Array, Array]]
Labels = NDArray[np.int64]


def choose_precision(
    wanted: str, convolutions: Convolutions, *, image_size: int, machines: Machines
) -> tuple[str, str]:
    """(precision, why) of the backbone in TensorFlow, for `wanted` one of auto, float32, bfloat16.

    `auto` is bfloat16 where it is clearly faster on the nodes. Where the two are near each other
    the one without rounding is taken, and another measurement would choose the same.

    Args:
        wanted: a precision that is named is taken.
        convolutions: folded weights.
        image_size: S, pixels.
        machines: that run it.
    """
    gpu = machines.gpus > 0
    ways = engine.ways(
        engine="tensorflow", precision=wanted, gpu=gpu, has_int8=False, installed=False
    )
    _, precision, why = fastest.choose(
        ways,
        gpu=gpu,
        weights=(convolutions, None),
        cpus=machines.cpus_per_actor,
        margin=CLEARLY,
        **engine.measuring(ways, image_size=image_size, threads=machines.threads_per_actor),
    )
    return precision, why


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
    results = pipeline.over_shards(
        index,
        wanted,
        wanted=None,
        image_size=image_size,
        actor=_PairPredictor,
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


class _PairPredictor:
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
            resnet.build(weights, image_size=image_size, precision=precision)
            for weights in backbones
        ]
        self._heads, self._batch_size, self._board = heads, batch_size, board

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        found = [
            runtime.forward(network, batch["pixels"][0], batch_size=self._batch_size)
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


class Predictions(NamedTuple):
    """What a model says of every example of a split, in the order of `gallery.ordered`."""

    keys: list[str]  # N
    labels: NDArray[np.int64]  # [N]
    logits: NDArray[np.float32]  # [N, C], mean over the views of test-time augmentation
    plain: NDArray[np.float32]  # [N, C], of the photograph as it is
    sizes: NDArray[np.int32]  # [N, 2], width and height of the original in pixels
    border: NDArray[np.float32]  # [N, background.STATISTICS]


class Evaluated(NamedTuple):
    """The predictions of every split, and what they took."""

    splits: dict[str, Predictions]
    seconds: float  # of the network, summed over the actors
    plain_seconds: float  # of that, for the photographs as they are


def predict(
    model: bundle.Bundle,
    index: ShardIndex,
    splits: Sequence[str],
    *,
    way: Way,
    views: int,
    batch_size: int,
    machines: Machines,
    advance: Callable[[int], None],
) -> Evaluated:
    """Every example of `splits` once through `model`.

    Everything but the pixels comes to this process: at ten classes 300 bytes an example.

    Args:
        model: with the classes of `index`.
        index: of the data set.
        splits: to take.
        way: engine and precision.
        views: of test-time augmentation, see `tta`.
        batch_size: images in one pass of the network.
        machines: what there is to run on.
        advance: called with each count of examples that is finished.

    Raises:
        RuntimeError: the examples that came back are not those of the index.
    """
    wanted = {split: gallery.ordered(index, split) for split in splits}
    board = Board()
    results = pipeline.over_shards(
        index,
        [shard for of_split in wanted.values() for shard in of_split],
        wanted=None,
        image_size=model.image_size,
        actor=_Predictor,
        actor_args=(ray.put(model), way, views, batch_size, board.handle),
        machines=machines,
    )
    found: dict[tuple[str, int], Predictions] = {}
    seconds = plain_seconds = 0.0
    with board.follow(advance):
        for row in results.iter_rows():
            interrupts.raise_if_asked()
            made: Predictions = pickle.loads(row["predictions"])
            found[row["shard"], row["row_group"]] = made
            seconds += row["seconds"]
            plain_seconds += row["plain_seconds"]
    splits_found = {}
    for split, of_split in wanted.items():
        places = [(shard.name, i) for shard in of_split for i in range(len(shard.row_groups))]
        parts = [found[place] for place in places if place in found]
        splits_found[split] = Predictions(
            [key for part in parts for key in part.keys],
            *(np.concatenate(arrays) for arrays in zip(*(p[1:] for p in parts), strict=True)),
        )
        if len(splits_found[split].keys) != index.examples(split):
            raise RuntimeError(
                f"evaluated {len(splits_found[split].keys)} examples of {split}, which has "
                f"{index.examples(split)}"
            )
    return Evaluated(splits_found, seconds, plain_seconds)


def make_gallery(
    index: ShardIndex,
    split: str,
    chosen: Sequence[gallery.Choice],
    *,
    convolutions: Any,
    head: Head,
    image_size: int,
    precision: str,
    machines: Machines,
    explain: bool,
) -> list[gallery.Item]:
    """`gallery.make`; with activation maps by one task where the network may run.

    Args:
        index: of the data set.
        split: whose examples are chosen.
        chosen: of `gallery.choose`.
        convolutions: folded weights, in Ray's object store.
        head: on raw features.
        image_size: pixels.
        precision: of the backbone, `float32` or `bfloat16`.
        machines: what there is to run on.
        explain: make activation maps.
    """
    if not explain:
        return gallery.make(index, split, chosen, image_size=image_size, explain=None)
    gpus = 1 if machines.gpus else 0
    task = ray.remote(num_cpus=machines.cpus_per_actor, num_gpus=gpus)(_make_gallery)
    made: list[gallery.Item] = ray.get(
        task.remote(
            index,
            split,
            list(chosen),
            convolutions,
            head,
            image_size,
            precision,
            machines.threads_per_actor,
            machines.gpus > 0,
        )
    )
    return made


def _make_gallery(
    index: ShardIndex,
    split: str,
    chosen: list[gallery.Choice],
    convolutions: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
    head: Head,
    image_size: int,
    precision: str,
    threads: int,
    gpu: bool,
) -> list[gallery.Item]:
    limit_threads(threads, gpu=gpu)
    explain = cam.explainer(convolutions, head, image_size=image_size, precision=precision)
    return gallery.make(index, split, chosen, image_size=image_size, explain=explain)


class _Predictor:
    """An actor that predicts the examples of a row group."""

    def __init__(
        self,
        model: Any,
        way: Way,
        views: int,
        batch_size: int,
        board: Any,
        threads: int,
        gpu: bool,
    ) -> None:
        self._model: bundle.Bundle = ray.get(model) if isinstance(model, ray.ObjectRef) else model
        self._engine = engine.open_engine(
            self._model,
            engine=way.engine,
            precision=way.precision,
            threads=threads,
            gpu=gpu,
            batch_size=batch_size,
        )
        self._views, self._board = views, board

    def __call__(self, batch: dict[str, NDArray[Any]]) -> pa.Table:
        pixels = batch["pixels"][0]
        took: list[float] = []

        def forward(view: Pixels) -> NDArray[np.float32]:
            began = time.perf_counter()
            features = self._engine.features(view)
            took.append(time.perf_counter() - began)
            return features

        outputs = tta.run(forward, self._model.head, pixels, views=self._views)
        made = Predictions(
            json.loads(str(batch["keys"][0])),
            np.asarray(batch["labels"][0], np.int64),
            outputs.logits,
            outputs.plain,
            np.asarray(batch["sizes"][0], np.int32),
            background.border(pixels),
        )
        self._board.post.remote(len(pixels))
        return pa.table(
            {
                "shard": [str(batch["shard"][0])],
                "row_group": [int(batch["row_group"][0])],
                "predictions": pa.array([pickle.dumps(made)], pa.large_binary()),
                "seconds": [sum(took)],
                "plain_seconds": [took[0]],
            }
        )
