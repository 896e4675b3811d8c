"""Photographs to predictions on Ray: reading and decoding beside the network."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from leafnet.core import interrupts
from leafnet.data import isolated
from leafnet.distributed import resources
from leafnet.distributed.resources import Machines
from leafnet.models import tta
from leafnet.models.bundle import Bundle
from leafnet.models.engine import open_engine
from leafnet.scoring import reading, thumbnails
from leafnet.scoring import rows as scoring_rows
from leafnet.scoring.rows import schema

# Passes of the network in a stack, which is what goes from a decoding task to an actor.
_BATCHES = 4
_STACK_BYTES = 256_000_000
# A decoding task makes at most so many: the next then goes to where there is room.
_STACKS_PER_TASK = 4

Pixels = NDArray[np.uint8]  # [B, S, S, 3]
Array = NDArray[np.float32]


# The pipeline


@dataclass(frozen=True)
class Job:
    """All that tasks and actors have to know."""

    image_size: int
    stack: int  # photographs
    max_pixels: int
    batch_size: int
    precision: str
    engine: str
    model_id: str
    run_id: str
    start: str  # of this process, unlike any other
    class_names: tuple[str, ...]
    views: int  # of test-time augmentation
    explain: bool = False  # photographs for review, once the night is over


class Result(NamedTuple):
    """What an actor made of a stack."""

    rows: pa.Table
    places: NDArray[np.int64]  # of the rows, in the night's list
    decode_s: float  # of the decoding task
    network_s: float  # of the actor
    engine: str
    precision: str


def batches(batch_size: int, image_size: int, photographs: int, actors: int) -> int:
    """Passes of the network in a stack: fewer where they are large, or where all are to have one.

    >>> batches(32, 256, 5000, 1), batches(32, 256, 50, 1), batches(256, 512, 5000, 1)
    (4, 2, 1)
    """
    fair = -(-photographs // (batch_size * actors))
    return max(1, min(_BATCHES, fair, _STACK_BYTES // (batch_size * image_size**2 * 3)))


def scored_batches(chosen: pa.Table, model: Bundle, job: Job, pool: Machines) -> Iterator[Result]:
    """The photographs of `chosen` through decoder and network, a stack at a time, as they come."""
    stack_bytes = job.stack * job.image_size**2 * 3
    decode: Callable[..., Any] = _decode
    with resources.bounded_store(stack_bytes, actors=pool.actors, decoders=pool.decoders):
        results = (
            ray.data.from_arrow(_spans(chosen, job.stack, pool.decoders))
            .map_batches(
                decode,
                batch_size=None,
                batch_format="pyarrow",
                zero_copy_batch=True,
                # The list as a whole: a million photographs, block by block, would fill the share
                # of the object store that is meant for pixels.
                fn_kwargs={"chosen": ray.put(chosen), "job": job},
                num_cpus=pool.cpus_per_decode,
            )
            .map_batches(
                _Network,
                batch_size=1,
                batch_format="pyarrow",
                zero_copy_batch=True,
                fn_constructor_args=(ray.put(model), job, pool.threads_per_actor, pool.gpus > 0),
                compute=ray.data.ActorPoolStrategy(size=pool.actors),
                num_cpus=pool.cpus_per_actor,
                num_gpus=1 if pool.gpus else 0,
            )
        )
        for block in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            interrupts.raise_if_asked()
            table: Any = block
            for row in table.to_pylist():
                yield Result(
                    rows=_from_ipc(row["rows"]),
                    places=np.frombuffer(row["places"], np.int64),
                    decode_s=row["decode_s"],
                    network_s=row["network_s"],
                    engine=row["engine"],
                    precision=row["precision"],
                )


def _spans(chosen: pa.Table, stack: int, decoders: int) -> list[pa.Table]:
    """Runs of rows, a block for each decoding task: some stacks, or what is wanted of a shard."""
    count = len(chosen)
    if count and chosen["row"].null_count == 0:
        shard = chosen["version"].combine_chunks().dictionary_encode().indices.to_numpy()
        starts = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist()]
    else:
        stacks = min(_STACKS_PER_TASK, max(1, count // (4 * decoders * stack)))
        starts = list(range(0, count, stacks * stack))
    stops = [*starts[1:], count]
    return [pa.table({"start": [a], "stop": [b]}) for a, b in zip(starts, stops, strict=True)]


def _decode(spans: pa.Table, *, chosen: Any, job: Job) -> Iterator[pa.Table]:
    """The stacks of some runs of `chosen`; pixels as bytes, which no stage copies or unpacks."""
    listed: pa.Table = ray.get(chosen) if isinstance(chosen, ray.ObjectRef) else chosen
    for span in spans.to_pylist():
        with isolated.tried(job.start, span["start"]) as died:
            stacks = reading.decode_photographs(
                listed.slice(span["start"], span["stop"] - span["start"]),
                image_size=job.image_size,
                batch_size=job.stack,
                max_pixels=job.max_pixels,
                careful=died,
            )
            for stack in stacks:
                yield pa.table(
                    {
                        "photographs": _binary(_to_ipc(stack.photographs)),
                        "pixels": _binary(pa.py_buffer(np.ascontiguousarray(stack.pixels))),
                        "decode_s": [stack.seconds],
                    }
                )


class _Network:
    """An actor that turns stacks into rows of the output."""

    def __init__(self, model: Any, job: Job, threads: int, gpu: bool) -> None:
        self._model: Bundle = ray.get(model) if isinstance(model, ray.ObjectRef) else model
        self._job = job
        self._thumbnails = thumbnails.Maker(seen=job.explain)
        self._schema = schema(job.class_names, model_id=job.model_id, run_id=job.run_id)
        self._engine = open_engine(
            self._model,
            engine=job.engine,
            precision=job.precision,
            threads=threads,
            gpu=gpu,
            batch_size=job.batch_size,
        )

    def __call__(self, stacks: pa.Table) -> pa.Table:
        job, results = self._job, []
        for i in range(stacks.num_rows):
            began = time.perf_counter()
            photographs = _from_ipc(stacks["photographs"][i].as_buffer())
            side = job.image_size
            buffer = stacks["pixels"][i].as_buffer()
            pixels = np.frombuffer(buffer, np.uint8).reshape(-1, side, side, 3)
            logits = np.zeros((0, len(job.class_names)), np.float32)
            novelty = None
            if len(pixels):
                outputs = tta.run(self._engine.features, self._model.head, pixels, views=job.views)
                logits = outputs.logits
                # Its threshold was chosen on photographs as they are.
                novelty = _novelty(self._model, outputs.features)
            rows = scoring_rows.rows(
                photographs,
                logits,
                novelty,
                output=self._schema,
                class_names=job.class_names,
                review=self._engine.review,
                model_id=job.model_id,
                run_id=job.run_id,
            )
            decoded = np.flatnonzero(photographs["reason"].is_null().to_numpy())
            rows = self._thumbnails.attach(rows, pixels, decoded)
            results.append(
                {
                    "rows": _to_ipc(rows).to_pybytes(),
                    "places": photographs["place"].to_numpy().tobytes(),
                    "decode_s": stacks["decode_s"][i].as_py(),
                    "network_s": time.perf_counter() - began,
                    "engine": self._engine.name,
                    "precision": self._engine.precision,
                }
            )
        return pa.Table.from_pylist(results)


def _novelty(model: Bundle, features: Array) -> Array | None:
    return None if model.novelty is None else model.novelty.distance(features)


def _binary(buffer: pa.Buffer) -> pa.Array:
    """One value of `buffer`'s bytes, not copied."""
    offsets = pa.py_buffer(np.array([0, buffer.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, buffer])


def _to_ipc(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _from_ipc(data: Any) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
