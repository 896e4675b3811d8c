"""Features of views, computed by the frozen network on every CPU or GPU of the cluster."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from leafnet.core import interrupts
from leafnet.core.hardware import limit_threads
from leafnet.data.images import Pixels
from leafnet.data.shards import Shard, ShardIndex
from leafnet.distributed import pipeline
from leafnet.distributed.heartbeat import Board
from leafnet.distributed.resources import Machines
from leafnet.features import cache
from leafnet.features.cache import Part
from leafnet.features.views import draw_view
from leafnet.models import resnet, runtime
from leafnet.models.runtime import ahead
from leafnet.models.weights import FEATURES


def extract(
    index: ShardIndex,
    plan: cache.Plan,
    weights: "ray.ObjectRef[Any]",
    *,
    image_size: int,
    precision: str,
    batch_size: int,
    machines: Machines,
    advance: Callable[[int], None],
) -> None:
    """Compute and store the missing parts of `plan`.

    Args:
        index: of the data set that the parts belong to.
        plan: what is missing, and where it goes.
        weights: `backbone.Weights.convolutions`, in Ray's object store.
        image_size: pixels.
        precision: of the backbone.
        batch_size: views in one forward pass.
        machines: what there is to run on.
        advance: called with each count of views that is finished.
    """
    groups: dict[Shard, dict[int, list[Part]]] = {}
    for part in plan.missing:
        groups.setdefault(part.shard, {}).setdefault(part.row_group, []).append(part)
    board = Board()
    results = pipeline.over_shards(
        index,
        list(groups),
        wanted={shard.name: set(of_shard) for shard, of_shard in groups.items()},
        image_size=image_size,
        actor=_Extractor,
        actor_args=(weights, image_size, precision, batch_size, plan.root, groups, board.handle),
        machines=machines,
    )
    with board.follow(advance):
        for _ in results.iter_rows():
            interrupts.raise_if_asked()


class _Extractor:
    """An actor that turns a row group of pixels into its missing parts."""

    def __init__(
        self,
        weights: Any,
        image_size: int,
        precision: str,
        batch_size: int,
        root: str,
        groups: dict[Shard, dict[int, list[Part]]],
        board: Any,
        threads: int,
        gpu: bool,
    ) -> None:
        limit_threads(threads, gpu=gpu)
        weights = ray.get(weights) if isinstance(weights, ray.ObjectRef) else weights
        self._network = resnet.build(weights, image_size=image_size, precision=precision)
        self._batch_size = batch_size
        self._root, self._board = root, board
        self._parts = {shard.name: of_shard for shard, of_shard in groups.items()}

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        shard, group = str(batch["shard"][0]), int(batch["row_group"][0])
        pixels, keys = batch["pixels"][0], json.loads(str(batch["keys"][0]))
        for part in self._parts[shard][group]:
            views = range(part.first, part.stop)
            out = np.empty((len(keys) * len(views), FEATURES), np.float16)
            done = 0
            stacks = ahead(_view_batches(pixels, keys, views, part.seed, self._batch_size))
            for made in runtime.run(self._network, stacks):
                rows = min(len(out) - done, len(made))
                out[done : done + rows] = made[:rows]
                done += rows
                self._board.post.remote(rows)
            cache.write_part(
                self._root,
                part,
                out.reshape(len(keys), len(views), -1),
                np.asarray(batch["labels"][0], np.int32),
            )
        return {"shard": batch["shard"], "row_group": batch["row_group"]}


def _view_batches(
    pixels: Pixels, keys: Sequence[str], views: range, seed: int, batch_size: int
) -> Iterator[Pixels]:
    """All views of all examples, example by example, in stacks of `batch_size`, the last padded."""
    total = len(keys) * len(views)
    for start in range(0, total, batch_size):
        stack = np.zeros((batch_size, *pixels.shape[1:]), np.uint8)
        for i in range(start, min(start + batch_size, total)):
            example, view = divmod(i, len(views))
            stack[i - start] = draw_view(
                pixels[example], key=keys[example], number=views[view], seed=seed
            )
        yield stack
