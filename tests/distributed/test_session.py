import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leafnet.core.errors import UserError
from leafnet.core.settings import RaySettings
from leafnet.data.shards import SPLITS
from leafnet.distributed import session
from leafnet.distributed.resources import Node
from leafnet.training.head import worker
from leafnet.training.head.state import TrainState
from leafnet.training.head.worker import HeadJob, HeadResult
from leafnet.training.worker import Placement
from tests.support.made_features import ROWS, head_jobs


def test_a_ray_of_the_jobs_own_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    nodes = [Node(2, 0)]
    assert session.with_room(nodes, False, 7, RaySettings()) == nodes
    with pytest.raises(UserError, match="no room for 1 worker with a GPU"):
        session.with_room(nodes, True, "auto", RaySettings())


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
