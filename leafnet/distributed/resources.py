"""What the machines of the cluster can run: workers, threads, batch sizes, memory.

The one place that plans what runs where, on the nodes that can run it.
"""

import bisect
from collections import Counter
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
# Ray counts in ten-thousandths of a CPU.
_GRAIN = 10_000


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
    cpus_per_decode: float = 0.25
    decoders: int = 4  # tasks that decode at the same time


def machines(
    nodes: list[Node],
    gpu: bool | Literal["auto"],
    *,
    actors: int | Literal["auto"] = "auto",
    cpus_per_decode: float | Literal["auto"] = "auto",
) -> Machines:
    """The actors that run the network, and what they leave to the tasks that feed them.

    By default one for each GPU; without, one for every few cores. A quarter of their CPUs is kept
    to decode: actors that took all would leave none, and the job would wait for ever.

    Raises:
        UserError: no node can hold that.

    >>> machines([Node(2, 0)], "auto")[:4], machines([Node(16, 0), Node(8, 1)], "auto")[:4]
    ((0, 1, 2, 1.5), (1, 1, 7, 1.0))
    """
    gpus = room(nodes, gpu=True) if gpu else 0
    if gpu is True and not gpus:
        raise no_room(nodes, 1, gpu=True)
    most = float("inf")  # threads of each
    if actors != "auto":
        count = actors
    elif gpus:
        count = gpus
    else:
        most = max(1, min(_MAX_THREADS, int(max((node.cpus for node in nodes), default=0))))
        count = max(1, sum(int(node.cpus // most) for node in nodes))
    share = min(most, _share(nodes, count, gpu=gpus > 0))
    threads, taken = int(share), 0.75 * share
    if gpus:
        threads, taken = threads - 1, min(1.0, taken)
    left = sum(node.cpus for node in nodes) - count * taken
    wanted = cpus_per_decode
    if wanted == "auto":
        wanted = 1.0 if gpus else 0.25
    # Some node has at least its part of what is left.
    part = left / sum(node.cpus > 0 for node in nodes)
    decode = int(min(wanted, part) * _GRAIN) / _GRAIN
    return Machines(gpus, count, max(1, threads), taken, decode, max(1, int(left / decode)))


def room(nodes: list[Node], share: float = 1 / _GRAIN, *, gpu: bool) -> int:
    """How many workers of `share` CPUs each, with `gpu` also a GPU each, `nodes` hold.

    >>> room([Node(16, 0), Node(8, 1)], 4, gpu=False), room([Node(16, 0), Node(8, 1)], 4, gpu=True)
    (6, 1)
    """
    fits = [(int(node.cpus / share + 1e-6), int(node.gpus)) for node in nodes]
    return sum(min(one) if gpu else one[0] for one in fits)


def _share(nodes: list[Node], count: int, *, gpu: bool) -> float:
    """The most CPUs that each of `count` workers can have; whole ones, where it is at least one.

    Raises:
        UserError: no node can hold that.
    """
    # Workers cannot be cut over nodes: the most that each can have is a node's part for some.
    parts = sorted({node.cpus / k for node in nodes for k in range(1, count + 1) if node.cpus})
    fit = bisect.bisect_left(parts, True, key=lambda part: room(nodes, part, gpu=gpu) < count)
    share = parts[fit - 1] if fit else 0.0
    share = float(int(share)) if share >= 1 else int(share * _GRAIN + 1e-9) / _GRAIN
    if not share:
        raise no_room(nodes, count, gpu=gpu)
    return share


def described(nodes: list[Node]) -> str:
    """What the nodes have, for people.

    >>> described([Node(0, 0), Node(16, 0), Node(8, 1), Node(16, 0)])
    '1 of 8 CPUs and 1 GPU, 2 of 16 CPUs'
    """
    kinds = Counter(node for node in nodes if node.cpus or node.gpus)
    told = []
    for node, number in sorted(kinds.items()):
        gpus = f" and {node.gpus:g} GPU{'s' * (node.gpus > 1)}" if node.gpus else ""
        told.append(f"{number} of {node.cpus:g} CPU{'s' * (node.cpus != 1)}{gpus}")
    return ", ".join(told) or "none with a CPU"


def no_room(nodes: list[Node], count: int, *, gpu: bool) -> UserError:
    """What no node of the cluster can hold, and what would fit."""
    wanted = f"{count} worker{'s' * (count > 1)}" + (" with a GPU each" if gpu else "")
    most = room(nodes, gpu=gpu)
    if gpu:
        remedy = f"give --workers {most}" if most else "start such nodes"
        remedy += ", or give --gpu false"
    else:
        remedy = f"give --workers {most}" if most else "start nodes with CPUs (`ray start`)"
    return UserError(
        "no-room",
        f"no room for {wanted} on the nodes of the cluster ({described(nodes)}); {remedy}",
    )


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

    On GPUs only the CPUs beside them count.

    Raises:
        UserError: no node can hold that.

    >>> workers_for([Node(2, 0)], "auto", 0), workers_for([Node(2, 0)], 2, 0)
    ((1, 2.0), (2, 1.0))
    >>> workers_for([Node(8, 0), Node(4, 0)], 2, 0)  # not 6.0: one node has no such
    (2, 4.0)
    >>> workers_for([Node(16, 0), Node(8, 1)], "auto", 1)
    (1, 8.0)
    >>> workers_for([Node(4, 0), Node(2, 0)], "1..8", 0)  # a machine each, as large as all have
    ((1, 8), 2.0)
    """
    span = worker_range(workers)
    count = span[0] if span else (gpus or 1) if workers == "auto" else int(workers)
    share = _share(nodes, count, gpu=gpus > 0)
    if span is None:
        return count, share
    able = [node for node in nodes if node.cpus and (int(node.gpus) or not gpus)]
    each = [_share([node], int(node.gpus) if gpus else 1, gpu=gpus > 0) for node in able]
    return span, min(share, *each)
