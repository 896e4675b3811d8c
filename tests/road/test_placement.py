"""What is planned for a cluster is what Ray can place there."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.distributed.test_resources import SHAPES

pytestmark = pytest.mark.road


@pytest.fixture(scope="module")
def walked() -> list[dict[str, Any]]:
    """What became of each plan, on a Ray of pretended nodes in a process of its own."""
    command = [sys.executable, "-m", "tests.road.placement"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_cluster_without_room_is_refused(walked: list[dict[str, Any]]) -> None:
    """With a head of 0 CPUs alone, GPUs and CPUs: each within half a minute."""
    assert [one for one in walked if "alone" in one] == [
        {"alone": True, "refused": "no-room"},
        {"alone": False, "refused": "no-room"},
    ]
    (told,) = [one for one in walked if "seconds" in one]
    assert told["seconds"] < 2 * 30


def test_a_node_that_joins_is_waited_for(walked: list[dict[str, Any]]) -> None:
    (told,) = [one["joined"] for one in walked if "joined" in one]
    assert told == [[0, 0], [2, 0]]


def test_gpus_that_tensorflow_does_not_see_are_refused_or_not_planned(
    walked: list[dict[str, Any]],
) -> None:
    refused, planned = [one for one in walked if "unseen" in one]
    assert refused["reason"] == "no-gpu"
    assert refused["unseen"].startswith("TensorFlow sees no GPU on ")
    assert "\n" not in refused["unseen"]
    assert planned["unseen"] == [[cpus, 0] for cpus in (0, 16, 6, 3, 8, 4)]


def test_every_plan_is_placed_by_ray_or_refused(walked: list[dict[str, Any]]) -> None:
    plans = [one for one in walked if "shape" in one]
    assert len(plans) == len(SHAPES) * 2 * 2  # train and score, with GPUs and without
    for plan in plans:
        cpu_nodes, gpu_nodes, workers = plan["shape"]
        gpus = [0, 1, 3][gpu_nodes]
        fewest = 1 if workers == "1..4" else workers
        fits = gpus >= fewest if plan["gpu"] else cpu_nodes + gpu_nodes > 0
        assert ("on" in plan, plan.get("refused")) == (fits, None if fits else "no-room"), plan
        if fits and plan["gpu"]:
            assert set(plan["on"]) == {"gpu node"}
