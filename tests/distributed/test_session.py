import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leafnet.core.errors import UserError
from leafnet.core.settings import RaySettings
from leafnet.data.shards import SPLITS
from leafnet.distributed import resources, session
from leafnet.distributed.resources import Node
from leafnet.training.head import worker
from leafnet.training.head.state import TrainState
from leafnet.training.head.worker import HeadJob, HeadResult
from leafnet.training.worker import Placement
from tests.support.made_features import ROWS, head_jobs


@pytest.mark.parametrize(
    ("nodes", "gpu", "expected"),
    [
        ([Node(1, 0)], "auto", (0, 1, 1, 0.75)),
        ([Node(2, 0)], "auto", (0, 1, 2, 1.5)),
        ([Node(16, 0)], "auto", (0, 4, 4, 3.0)),
        ([Node(16, 0), Node(6, 0)], False, (0, 5, 4, 3.0)),
        ([Node(16, 4)], "auto", (4, 4, 3, 1.0)),
        ([Node(16, 4)], False, (0, 4, 4, 3.0)),
    ],
)
def test_actors_leave_cpus_to_decode(
    nodes: list[Node], gpu: Any, expected: tuple[int, int, int, float]
) -> None:
    machines = resources.machines(nodes, gpu)
    assert tuple(machines) == expected
    assert machines.actors * machines.cpus_per_actor < sum(node.cpus for node in nodes)


def test_a_gpu_that_is_asked_for_and_not_there() -> None:
    with pytest.raises(UserError, match="the cluster has no GPU"):
        resources.machines([Node(8, 0)], True)


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "expected"),
    [
        ([Node(2, 0)], "auto", 0, (1, 2.0)),
        ([Node(2, 0)], 4, 0, (4, 0.5)),
        ([Node(16, 4)], "auto", 4, (4, 4.0)),
        # Of 12 each could have 6, but the smaller node has none such; nor a quarter less, 4.5.
        ([Node(8, 0), Node(4, 0)], 2, 0, (2, 0.75 * 4.5)),
        ([Node(5, 0)], 2, 0, (2, 2.0)),
    ],
)
def test_workers(nodes: list[Node], workers: Any, gpus: int, expected: tuple[int, float]) -> None:
    assert resources.workers_for(nodes, workers, gpus) == expected
    count, share = expected
    assert sum(int(node.cpus / share) for node in nodes) >= count


def test_more_workers_than_gpus() -> None:
    with pytest.raises(UserError, match=r"--workers 5, but the cluster has 4 GPUs"):
        resources.workers_for([Node(16, 4)], 5, 4)


# In a process of its own: this one is connected to another Ray.
GROWING = """
import threading
from concurrent.futures import ThreadPoolExecutor
from ray.cluster_utils import Cluster
from leafnet.core.settings import RaySettings
from leafnet.distributed import session
machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
settings = RaySettings(address=machines.address, wait=100)
waiting = threading.Event()
def tell(line):
    print(line)
    waiting.set()
with session.session(settings) as found, ThreadPoolExecutor(1) as pool:
    print(session.with_gpus(found, "auto", 2, settings, tell))
    never = settings.model_copy(update={"wait": 0})
    print(session.with_gpus(found, True, "auto", never, print))
    planned = pool.submit(session.with_gpus, found, True, 2, settings, tell)
    waiting.wait()
    machines.add_node(num_cpus=1, num_gpus=2)
    print(sorted(planned.result()))
machines.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_gpus_that_a_cluster_has_to_start_are_waited_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROWING], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    alone, grown = [Node(1.0, 0.0)], [Node(1.0, 0.0), Node(1.0, 2.0)]
    planned = [line for line in done.stdout.splitlines() if "Node(" in line]
    assert planned == [str(nodes) for nodes in (alone, alone, grown)]
    assert "waiting   for 2 GPUs, of which the cluster has 0, at most 100 s" in done.stdout


def test_a_ray_of_the_jobs_own_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    nodes = [Node(2, 0)]
    assert session.with_gpus(nodes, True, "auto", RaySettings(), print) == nodes


@pytest.fixture(scope="module")
def make_job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., HeadJob]:
    """Jobs on made features: 48 examples to train on in two views, 13 to validate, 7 to test."""
    return head_jobs(str(tmp_path_factory.mktemp("cache") / "key"))


def fit(job: HeadJob, storage_path: Path, workers: int = 1) -> tuple[HeadResult, list[Any]]:
    rows: list[dict[str, float]] = []
    result = worker.fit_head(
        job,
        Placement(workers, 0.5, False, str(storage_path)),
        on_epoch=rows.append,
    )
    return result, rows


def flat(state: TrainState) -> np.ndarray:
    return np.concatenate([array.ravel() for layer in state.head for array in layer])


@pytest.mark.ray
@pytest.mark.slow
def test_one_and_two_workers_give_the_same_weights(
    local_ray: None, make_job: Callable[..., HeadJob], tmp_path: Path
) -> None:
    """The same global batches, so only the order of the sums in an all-reduce may differ."""
    one, rows = fit(make_job(), tmp_path / "one")
    two, rows_of_two = fit(make_job(), tmp_path / "two", workers=2)
    np.testing.assert_allclose(flat(two.state), flat(one.state), rtol=0, atol=1e-5)
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in rows_of_two] == [1, 2, 3]
    for row, row_of_two in zip(rows, rows_of_two, strict=True):
        assert row_of_two == pytest.approx(row, abs=1e-4)
    for result in (one, two):
        assert {split: result.tallies[split].examples for split in SPLITS} == ROWS


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_fit_is_not_done_again_nor_taken_for_another(
    local_ray: None, make_job: Callable[..., HeadJob], tmp_path: Path
) -> None:
    job = make_job()
    first, rows = fit(job, tmp_path)
    assert len(rows) == 3
    again, rows = fit(job, tmp_path)
    assert rows == []
    np.testing.assert_array_equal(flat(again.state), flat(first.state))
    with pytest.raises(UserError, match="was started with data made, not other"):
        fit(dataclasses.replace(job, identity={"data": "other"}), tmp_path)


@pytest.mark.ray
@pytest.mark.slow
def test_a_user_error_in_a_worker_comes_back_as_one(
    local_ray: None, make_job: Callable[..., HeadJob], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="not finite in epoch 1") as caught:
        fit(make_job(learning_rate=1e38, warmup_epochs=0), tmp_path)
    assert caught.value.reason == "loss-not-finite"
