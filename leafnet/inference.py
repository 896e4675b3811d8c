"""The frozen network over every photograph of a data set, with Ray Data: features, evaluation.

Two stages. Tasks read whole shards, check and decode them; actors hold the network. A row between
them is a row group of decoded pixels, so that no group is ever cut in two on its way.
"""

import itertools
import pickle
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from leafnet import (
    apart,
    backbone,
    background,
    bundle,
    cam,
    cluster,
    engine,
    features,
    gallery,
    openvino_graph,
    shards,
    storage,
    terminal,
    tta,
)
from leafnet.apart import Decoder
from leafnet.backbone import ahead, limit_threads
from leafnet.classifier import Head, head_logits
from leafnet.cluster import Board, Machines
from leafnet.errors import UserError
from leafnet.features import Part, Pixels
from leafnet.images import ImageError, decode
from leafnet.novelty import Novelty
from leafnet.openvino_graph import Int8
from leafnet.review import Outcomes, outcomes
from leafnet.shards import Shard, ShardIndex

# Less than what `cluster.machines` leaves beside the actors, also on a single CPU.
_DECODE_CPUS = 0.25
# The validation accuracy that int8 may cost, and the examples it is measured on at most.
_MAX_FALL = 0.005
_MAX_VALID = 10_000


def extract(
    index: ShardIndex,
    plan: features.Plan,
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
    results = over_shards(
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
            terminal.raise_if_asked()


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
    choice: engine.Choice,
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
        choice: engine and precision.
        views: of test-time augmentation, see `tta`.
        batch_size: images in one pass of the network.
        machines: what there is to run on.
        advance: called with each count of examples that is finished.

    Raises:
        RuntimeError: the examples that came back are not those of the index.
    """
    wanted = {split: gallery.ordered(index, split) for split in splits}
    board = Board()
    results = over_shards(
        index,
        [shard for of_split in wanted.values() for shard in of_split],
        wanted=None,
        image_size=model.image_size,
        actor=_Predictor,
        actor_args=(ray.put(model), choice, views, batch_size, board.handle),
        machines=machines,
    )
    found: dict[tuple[str, int], Predictions] = {}
    seconds = plain_seconds = 0.0
    with board.follow(advance):
        for row in results.iter_rows():
            terminal.raise_if_asked()
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
    made: Quantized = ray.get(
        task.remote(index, weights, head, distance, image_size, machines.threads_per_actor)
    )
    return made


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
            openvino_graph.CALIBRATION_EXAMPLES,
        )
    )
    graph = openvino_graph.build(weights, image_size=image_size)
    int8 = openvino_graph.quantize(graph, calibration)
    precision, _ = backbone.choose_precision("auto", compute_capability=None)
    forward = openvino_graph.compile_model(
        openvino_graph.read(int8), precision=precision, threads=threads
    )
    made, labels = [], []
    valid = itertools.islice(_photographs(index, "valid", image_size), _MAX_VALID)
    while batch := list(itertools.islice(valid, 32)):
        made.append(forward(np.stack([pixels for pixels, _ in batch])))
        labels += [label for _, label in batch]
    found = np.concatenate(made)
    return Quantized(
        int8,
        len(calibration),
        outcomes(head_logits(head, found), np.array(labels), distance.distance(found)),
    )


def _photographs(index: ShardIndex, split: str, image_size: int) -> Iterator[tuple[Pixels, int]]:
    """(pixels, label) of each example of `split`, in the order of its cached features."""
    for shard in sorted(index.of_split(split), key=lambda shard: shard.name):
        for table in shards.row_groups(index.root, shard, cache=index.cache):
            images, labels = table.column("image").to_pylist(), table.column("label").to_pylist()
            for image, label in zip(images, labels, strict=True):
                yield decode(image, image_size).pixels, label


def over_shards(
    index: ShardIndex,
    wanted_shards: Sequence[Shard],
    *,
    wanted: dict[str, set[int]] | None,
    image_size: int,
    actor: type,
    actor_args: tuple[Any, ...],
    machines: Machines,
) -> "ray.data.Dataset":
    """The pipeline: shards -> row groups of pixels -> what `actor` makes of each.

    Args:
        index: of the data set.
        wanted_shards: to be read.
        wanted: row groups by name of their shard; none: all.
        image_size: of the pixels, uint8 [B, image_size, image_size, 3].
        actor: made with `actor_args`, the threads that it has, and whether it has a GPU; called
            with a row group.
        actor_args: the first arguments of `actor`.
        machines: what it is spread over.
    """
    # A block each: `repartition` would do it with a task that takes a whole CPU, which a machine
    # with two has not left beside the actor, and the job would wait for ever.
    items = [pa.table({"shard": [shard.name]}) for shard in wanted_shards]
    by_name = {shard.name: (i, shard) for i, shard in enumerate(wanted_shards)}
    job = uuid.uuid4().hex[:16]

    def decode_shard(batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        for name in batch["shard"]:
            groups = None if wanted is None else wanted[name]
            number, shard = by_name[name]
            with apart.decoder(job, number, of=storage.join(index.root, shard.name)) as decoder:
                yield from _decoded_groups(index, shard, groups, image_size, decoder)

    largest = max(max(shard.row_groups) for shard in wanted_shards)
    # A task for each part of a CPU that the actors leave.
    decoders = max(1, machines.actors * machines.threads_per_actor * (4 if machines.gpus else 1))
    with cluster.bounded_store(
        largest * image_size**2 * 3, actors=machines.actors, decoders=decoders
    ):
        return (
            ray.data.from_arrow(items)
            .map_batches(decode_shard, batch_size=1, num_cpus=_DECODE_CPUS)
            .map_batches(
                actor,
                batch_size=1,
                fn_constructor_args=(*actor_args, machines.threads_per_actor, machines.gpus > 0),
                compute=ray.data.ActorPoolStrategy(
                    min_size=1,
                    max_size=machines.actors,
                    initial_size=_useful(machines, wanted_shards),
                    # A row group takes seconds: one that waits is enough, and more would sit with
                    # one actor while another has nothing to do.
                    max_tasks_in_flight_per_actor=2,
                ),
                num_cpus=machines.cpus_per_actor,
                num_gpus=1 if machines.gpus else 0,
            )
        )


def _useful(machines: Machines, wanted_shards: Sequence[Shard]) -> int:
    return min(machines.actors, sum(len(shard.row_groups) for shard in wanted_shards))


def _decoded_groups(
    index: ShardIndex, shard: Shard, groups: set[int] | None, image_size: int, decoder: Decoder
) -> Iterator[dict[str, NDArray[Any]]]:
    """The row groups of `shard` that are wanted, decoded.

    Raises:
        UserError: a photograph cannot be decoded, which jobs/prepare.py could.
    """
    for i, table in enumerate(shards.row_groups(index.root, shard, cache=index.cache)):
        if groups is not None and i not in groups:
            continue
        keys = table.column("key").to_pylist()
        pixels: list[Pixels] = []
        for key, image in zip(keys, table.column("image").to_pylist(), strict=True):
            try:
                pixels.append(decoder.decode(image, image_size).pixels)
            except ImageError as error:
                raise UserError(
                    "bad-photograph",
                    f"{key} in {storage.join(index.root, shard.name)} cannot be decoded on "
                    f"{platform.node()}: {error}; prepare the data set again there, which leaves "
                    "it out",
                ) from None
        yield {
            "shard": np.array([shard.name]),
            "row_group": np.array([i]),
            # One string, because Ray would pickle an array of lists.
            "keys": np.array(["\n".join(keys)]),
            "labels": table.column("label").to_numpy()[None],
            "sizes": np.stack([table.column("width"), table.column("height")], axis=1)[None],
            "pixels": np.stack(pixels)[None],
        }


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
        self._network = backbone.build(weights, image_size=image_size, precision=precision)
        self._batch_size = batch_size
        self._root, self._board = root, board
        self._parts = {shard.name: of_shard for shard, of_shard in groups.items()}

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        shard, group = str(batch["shard"][0]), int(batch["row_group"][0])
        pixels, keys = batch["pixels"][0], str(batch["keys"][0]).split("\n")
        for part in self._parts[shard][group]:
            views = range(part.first, part.stop)
            out = np.empty((len(keys) * len(views), backbone.FEATURES), np.float16)
            done = 0
            stacks = ahead(_view_batches(pixels, keys, views, part.seed, self._batch_size))
            for made in backbone.run(self._network, stacks):
                rows = min(len(out) - done, len(made))
                out[done : done + rows] = made[:rows]
                done += rows
                self._board.post.remote(rows)
            features.write_part(
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
            stack[i - start] = features.draw_view(
                pixels[example], key=keys[example], number=views[view], seed=seed
            )
        yield stack


class _Predictor:
    """An actor that predicts the examples of a row group."""

    def __init__(
        self,
        model: Any,
        choice: engine.Choice,
        views: int,
        batch_size: int,
        board: Any,
        threads: int,
        gpu: bool,
    ) -> None:
        self._model: bundle.Bundle = ray.get(model) if isinstance(model, ray.ObjectRef) else model
        self._engine = engine.open_engine(
            self._model,
            engine=choice.engine,
            precision=choice.precision,
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
            str(batch["keys"][0]).split("\n"),
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
