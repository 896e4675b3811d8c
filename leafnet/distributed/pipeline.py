"""One Ray Data pipeline over the rows of shards: decode, batch, predict."""

import json
import platform
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data import isolated, shards
from leafnet.data.images import ImageError, Pixels
from leafnet.data.isolated import Decoder
from leafnet.data.shards import Shard, ShardIndex
from leafnet.distributed import resources
from leafnet.distributed.resources import Machines


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
            with isolated.decoder(job, number, of=storage.join(index.root, shard.name)) as decoder:
                yield from _decoded_groups(index, shard, groups, image_size, decoder)

    largest = max(max(shard.row_groups) for shard in wanted_shards)
    with resources.bounded_store(
        largest * image_size**2 * 3, actors=machines.actors, decoders=machines.decoders
    ):
        return (
            ray.data.from_arrow(items)
            .map_batches(decode_shard, batch_size=1, num_cpus=machines.cpus_per_decode)
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
            "keys": np.array([json.dumps(keys)]),
            "labels": table.column("label").to_numpy()[None],
            "sizes": np.stack([table.column("width"), table.column("height")], axis=1)[None],
            "pixels": np.stack(pixels)[None],
        }
