"""What runs where, on clusters of all shapes."""

import random
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import pytest

from leafnet.core.errors import UserError
from leafnet.core.settings import worker_range
from leafnet.distributed import resources
from leafnet.distributed.resources import Machines, Node

HEAD = Node(0, 0)  # as in cluster/aws.yaml
OF_CPUS = (Node(16, 0), Node(6, 0), Node(3, 0))
OF_GPUS = (Node(8, 1), Node(4, 2))


class Shape(NamedTuple):
    """A head without CPUs, some CPU nodes, some GPU nodes, and how many workers are wanted."""

    cpu_nodes: int
    gpu_nodes: int
    workers: int | str

    @property
    def nodes(self) -> list[Node]:
        return [HEAD, *OF_CPUS[: self.cpu_nodes], *OF_GPUS[: self.gpu_nodes]]


SHAPES = [
    Shape(cpu_nodes, gpu_nodes, workers)
    for cpu_nodes in range(4)
    for gpu_nodes in range(3)
    for workers in (2, "1..4")
]


def planned_train(
    nodes: list[Node], gpu: bool | Literal["auto"], workers: int | str
) -> tuple[int | tuple[int, int], float, int]:
    """(workers, CPUs of each, GPUs of the plan), as jobs/train.py plans."""
    gpus = resources.machines(nodes, gpu).gpus
    return (*resources.workers_for(nodes, workers, gpus), gpus)


def most_whole_cpus(nodes: list[Node], count: int, *, gpu: bool) -> int:
    """The right answer by trying: CPUs of each of `count` workers, 0 where there is no room."""
    for cpus in range(16, 0, -1):
        fits = [int(node.cpus) // cpus for node in nodes]
        if gpu:
            fits = [min(fit, int(node.gpus)) for fit, node in zip(fits, nodes, strict=True)]
        if sum(fits) >= count:
            return cpus
    return 0


@pytest.mark.parametrize("gpu", [True, False, "auto"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_planned_for_nodes_that_can_run_it_or_refused(
    shape: Shape, gpu: bool | Literal["auto"]
) -> None:
    on_gpus = gpu is True or (gpu == "auto" and shape.gpu_nodes > 0)
    span = worker_range(shape.workers)
    fewest = span[0] if span else int(shape.workers)
    most = most_whole_cpus(shape.nodes, fewest, gpu=on_gpus)
    if not most:
        with pytest.raises(UserError, match="no room for ") as caught:
            planned_train(shape.nodes, gpu, shape.workers)
        assert (caught.value.reason, caught.value.exit_code) == ("no-room", 2)
        assert "\n" not in str(caught.value)
        return
    workers, cpus, gpus = planned_train(shape.nodes, gpu, shape.workers)
    assert workers == (span or fewest)
    assert gpus == (sum(int(node.gpus) for node in shape.nodes) if on_gpus else 0)
    if not span:
        assert cpus == most
    # Of a range each has what every machine that counts can give.
    each = [
        node.cpus / (node.gpus or 1) if on_gpus else node.cpus
        for node in shape.nodes
        if (node.gpus if on_gpus else node.cpus)
    ]
    assert cpus <= (min(each) if span else max(node.cpus for node in shape.nodes))
    assert resources.room(shape.nodes, cpus, gpu=on_gpus) >= fewest


def placements(nodes: list[Node], machines: Machines) -> Iterator[list[float]]:
    """CPUs that are left on each node, for actors put here and there."""
    for seed in range(20):
        rng = random.Random(seed)
        left = [[node.cpus, node.gpus] for node in nodes]
        for _ in range(machines.actors):
            able = [
                one
                for one in left
                if one[0] + 1e-9 >= machines.cpus_per_actor and (one[1] >= 1 or not machines.gpus)
            ]
            assert able, "no node has room for the next actor"
            chosen = rng.choice(able)
            chosen[0] -= machines.cpus_per_actor
            chosen[1] -= 1
        yield [cpus for cpus, _ in left]


@pytest.mark.parametrize("actors", ["auto", 1, 2, 3, 7])
@pytest.mark.parametrize("gpu", [True, False, "auto"])
@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
def test_the_pool_fits_wherever_it_is_put_and_leaves_room_to_decode(
    shape: Shape, gpu: bool | Literal["auto"], actors: Any
) -> None:
    nodes = shape.nodes
    gpus = sum(int(node.gpus) for node in nodes) if gpu else 0
    refused = not any(node.cpus for node in nodes) or (gpu is True and not gpus)
    if refused or (gpus and actors != "auto" and actors > gpus):
        with pytest.raises(UserError, match="no room for "):
            resources.machines(nodes, gpu, actors=actors)
        return
    machines = resources.machines(nodes, gpu, actors=actors)
    assert machines.gpus == gpus
    assert machines.actors >= 1
    assert actors in ("auto", machines.actors)
    assert 1 <= machines.threads_per_actor <= max(node.cpus for node in nodes)
    for left in placements(nodes, machines):
        assert 0 < machines.cpus_per_decode <= max(left) + 1e-9
        assert machines.decoders * machines.cpus_per_decode <= sum(left) + 1e-9


@pytest.mark.parametrize(
    ("nodes", "gpu", "expected"),
    [
        ([Node(1, 0)], "auto", (0, 1, 1, 0.75, 0.25, 1)),
        ([Node(2, 0)], "auto", (0, 1, 2, 1.5, 0.25, 2)),
        ([Node(16, 0)], "auto", (0, 4, 4, 3.0, 0.25, 16)),
        ([Node(16, 0), Node(6, 0)], False, (0, 5, 4, 3.0, 0.25, 28)),
        ([Node(16, 4)], "auto", (4, 4, 3, 1.0, 1.0, 12)),
        ([Node(16, 4)], False, (0, 4, 4, 3.0, 0.25, 16)),
        # An actor with one CPU would leave none to decode; the CPUs of another node do not help.
        ([Node(1, 1)], "auto", (1, 1, 1, 0.75, 0.25, 1)),
        ([Node(2, 2), Node(8, 0)], True, (2, 2, 1, 0.75, 1.0, 8)),
    ],
)
def test_actors_leave_cpus_to_decode(nodes: list[Node], gpu: Any, expected: Any) -> None:
    assert tuple(resources.machines(nodes, gpu)) == expected


@pytest.mark.parametrize("wanted", [0.5, 2, 4])
def test_what_a_decoding_task_is_to_have_is_cut_to_what_is_left(wanted: float) -> None:
    machines = resources.machines([Node(16, 1), Node(3, 0)], "auto", cpus_per_decode=wanted)
    assert machines.cpus_per_decode == wanted
    machines = resources.machines([Node(2, 0)], "auto", cpus_per_decode=wanted)
    assert machines.cpus_per_decode == 0.5


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "expected"),
    [
        ([Node(2, 0)], "auto", 0, (1, 2.0)),
        ([Node(2, 0)], 4, 0, (4, 0.5)),
        ([Node(2, 0)], 3, 0, (3, 0.6666)),  # three of 0.6667, as Ray would round, have no room
        ([Node(16, 4)], "auto", 4, (4, 4.0)),
        ([Node(8, 0), Node(4, 0)], 2, 0, (2, 4.0)),  # of 12 each could have 6: one node has not
        ([Node(5, 0)], 2, 0, (2, 2.0)),
        ([Node(0, 0), Node(16, 0), Node(8, 1)], "auto", 1, (1, 8.0)),  # not the 16 beside it
        ([Node(8, 1), Node(4, 2)], "1..3", 3, ((1, 3), 2.0)),
        ([Node(4, 0), Node(2, 0)], "4..8", 0, ((4, 8), 1.0)),  # room for four, of two machines
    ],
)
def test_workers(nodes: list[Node], workers: Any, gpus: int, expected: tuple[Any, float]) -> None:
    assert resources.workers_for(nodes, workers, gpus) == expected
    count = expected[0] if isinstance(expected[0], int) else expected[0][0]
    assert resources.room(nodes, expected[1], gpu=gpus > 0) >= count


@pytest.mark.parametrize(
    ("nodes", "count", "gpu", "message"),
    [
        (
            [Node(16, 4)],
            5,
            True,
            "no room for 5 workers with a GPU each on the nodes of the cluster (1 of 16 CPUs and 4 "
            "GPUs); give --workers 4, or give --gpu false",
        ),
        (
            [Node(0, 0), Node(16, 0), Node(16, 0), Node(0, 1)],
            1,
            True,
            "no room for 1 worker with a GPU each on the nodes of the cluster (1 of 0 CPUs and 1 "
            "GPU, 2 of 16 CPUs); start such nodes, or give --gpu false",
        ),
        (
            [Node(0, 0)],
            1,
            False,
            "no room for 1 worker on the nodes of the cluster (none with a CPU); start nodes with "
            "CPUs (`ray start`)",
        ),
    ],
)
def test_what_would_fit_is_told(nodes: list[Node], count: int, gpu: bool, message: str) -> None:
    assert str(resources.no_room(nodes, count, gpu=gpu)) == message
