"""What the machines of the cluster can run: workers, threads, batch sizes, memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import ray
import ray.data

from leafnet.core.errors import UserError
from leafnet.core.settings import worker_range

# A CPU actor computes in at most so many threads: ResNet50 gains little from more, and a node
# with many cores is better used by several actors.
_MAX_THREADS = 4
_CPU_BATCH, _GPU_BATCH = 32, 256


class Node(NamedTuple):
    """A machine of the cluster."""

    cpus: float
    gpus: float


class Machines(NamedTuple):
    """How the network is spread over a cluster by Ray Data."""

    gpus: int  # 0: on CPUs
    actors: int
    threads_per_actor: int
    cpus_per_actor: float


def machines(nodes: list[Node], gpu: bool | Literal["auto"]) -> Machines:
    """One actor for each GPU; without, one for every few cores, a quarter of them kept to decode.

    Actors that took all CPUs would leave none to the tasks that feed them, and the job would wait
    for ever without a word.

    Raises:
        UserError: GPUs are asked for and there are none.

    >>> machines([Node(2, 0)], "auto")
    Machines(gpus=0, actors=1, threads_per_actor=2, cpus_per_actor=1.5)
    """
    gpus = int(sum(node.gpus for node in nodes)) if gpu else 0
    cpus = sum(node.cpus for node in nodes)
    if gpu is True and not gpus:
        raise UserError("no-gpu", "--gpu true, but the cluster has no GPU; give --gpu auto")
    if gpus:
        return Machines(gpus, gpus, max(1, int(cpus / gpus) - 1), 1.0)
    threads = max(1, min(_MAX_THREADS, int(max(node.cpus for node in nodes))))
    actors = max(1, sum(int(node.cpus) // threads for node in nodes))
    return Machines(0, actors, threads, 0.75 * threads)


@contextmanager
def bounded_store(stack_bytes: int, *, actors: int, decoders: int) -> Iterator[None]:
    """Let Ray Data hold no more stacks of pixels than keep all busy, and each stack by itself.

    By default it fills half the object store (15 % of the memory) with decoded photographs, and
    gathers blocks of 128 MB before it hands them on. What is made of datasets in the block is bound
    by this, also when it is run later.

    Args:
        stack_bytes: of the pixels that are handed on at once.
        actors: that take them.
        decoders: tasks that make them at the same time.
    """
    context = ray.data.DataContext.get_current()
    options = context.execution_options
    before = context.target_max_block_size, options.resource_limits
    context.target_max_block_size = max(1, stack_bytes // 2)
    half = ray.cluster_resources().get("object_store_memory", 0.0) / 2
    options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=min(half, stack_bytes * (4 * actors + 3 * decoders))
    )
    try:
        yield
    finally:
        context.target_max_block_size, options.resource_limits = before


def device(gpus: int) -> str:
    """What the network runs on, for people."""
    return f"{gpus} GPU" if gpus else "CPU"


def batch_size(wanted: int | Literal["auto"], *, gpus: int) -> int:
    """Images in one pass of the network.

    >>> batch_size("auto", gpus=0), batch_size("auto", gpus=1), batch_size(7, gpus=1)
    (32, 256, 7)
    """
    if wanted != "auto":
        return wanted
    return _GPU_BATCH if gpus else _CPU_BATCH


def workers_for(
    nodes: list[Node], workers: int | str, gpus: int
) -> tuple[int | tuple[int, int], float]:
    """(number of workers, CPUs of each) for Ray Train; of a range, (fewest, most).

    Raises:
        UserError: more workers than GPUs.

    >>> workers_for([Node(2, 0)], "auto", 0), workers_for([Node(2, 0)], 2, 0)
    ((1, 2.0), (2, 1.0))
    >>> workers_for([Node(3, 0), Node(3, 0)], 3, 0)  # not 2.0: one node can hold only one such
    (3, 1.5)
    >>> workers_for([Node(4, 0), Node(2, 0)], "1..8", 0)  # a machine each, as large as all have
    ((1, 8), 2.0)
    """
    span = worker_range(workers)
    total = sum(node.cpus for node in nodes)
    if span is not None:
        if gpus:
            return span, max(1.0, float(int(total / gpus)))
        return span, float(min(node.cpus for node in nodes if node.cpus))
    count = (gpus or 1) if workers == "auto" else int(workers)
    if gpus and count > gpus:
        raise UserError(
            "too-few-gpus",
            f"--workers {count}, but the cluster has {gpus} GPUs; give fewer, or --gpu false",
        )
    share = min(total / count, max(node.cpus for node in nodes))
    share = float(int(share)) if share >= 1 else share
    # Workers cannot be cut over nodes: shrink until enough fit.
    while sum(int(node.cpus / share) for node in nodes) < count:
        share *= 0.75
    return count, share
