"""Features of views, computed by the frozen network on every CPU or GPU of the cluster."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from leafnet.core import interrupts
from leafnet.core.errors import UserError
from leafnet.core.hardware import limit_threads
from leafnet.data.images import Pixels
from leafnet.data.shards import Shard, ShardIndex
from leafnet.distributed import pipeline
from leafnet.distributed.heartbeat import Board
from leafnet.distributed.resources import Machines
from leafnet.features import cache
from leafnet.features.cache import Part
from leafnet.features.moments import Features
from leafnet.features.views import draw_view
from leafnet.models import resnet, runtime
from leafnet.models.runtime import ahead
from leafnet.models.weights import FEATURES

NOT_FINITE = "features-not-finite"  # the reason of the error where a network gives such


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

    Raises:
        UserError: the network gives features that are not finite; a photograph cannot be decoded.
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

    # A generator: of other functions Ray Data hides an error behind one of its own.
    def __call__(self, batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        shard, group = str(batch["shard"][0]), int(batch["row_group"][0])
        pixels, keys = batch["pixels"][0], json.loads(str(batch["keys"][0]))
        for part in self._parts[shard][group]:
            views = range(part.first, part.stop)
            out = np.empty((len(keys) * len(views), FEATURES), np.float16)
            done = 0
            stacks = ahead(_view_batches(pixels, keys, views, part.seed, self._batch_size))
            for features in runtime.run(self._network, stacks):
                rows = min(len(out) - done, len(features))
                with np.errstate(over="ignore"):  # refused below, by the photograph's name
                    out[done : done + rows] = features[:rows]
                done += rows
                self._board.post.remote(rows)
            _refuse_non_finite(out, keys, shard)
            cache.write_part(
                self._root,
                part,
                out.reshape(len(keys), len(views), -1),
                np.asarray(batch["labels"][0], np.int32),
            )
        yield {"shard": batch["shard"], "row_group": batch["row_group"]}


def _refuse_non_finite(features: Features, keys: Sequence[str], shard: str) -> None:
    """Keep features [examples x views, D] that are no numbers out of the cache.

    Raises:
        UserError: the network gave some.
    """
    (bad,) = np.nonzero(~np.isfinite(features).all(axis=1))
    if bad.size:
        key = keys[bad[0] * len(keys) // len(features)]
        raise UserError(
            NOT_FINITE,
            f"the network's features of {key} in {shard} are not finite in half precision, and of "
            f"{bad.size - 1:,} more views; its weights are damaged or diverged, check --weights",
        )


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
