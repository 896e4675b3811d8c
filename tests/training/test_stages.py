"""Stages of a run without a cluster: what becomes of features that cannot be used."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.exceptions

from leafnet.core.errors import DamagedParts, UserError
from leafnet.features import extraction
from leafnet.training import stages
from leafnet.training.run import Run
from leafnet.training.settings import FineTuneSettings


def made_run(**more: Any) -> Any:
    """A run at work as far as the stages look at it."""
    settings = SimpleNamespace(fine_tune=FineTuneSettings(learning_rate=9.0))
    run: Any = SimpleNamespace(plan=SimpleNamespace(settings=settings), seconds={}, **more)
    run.stage = lambda name: Run.stage(run, name)
    return run


def test_a_network_that_fine_tuning_drove_out_of_bounds_blames_its_learning_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cause: Exception = UserError(extraction.NOT_FINITE, "of leaf.jpg")

    def extract(*_: Any, **__: Any) -> Any:
        raise ray.exceptions.RayTaskError("f", "trace", cause)

    monkeypatch.setattr(stages, "extract", extract)
    result: Any = SimpleNamespace(mean=np.zeros(2, "f4"), deviation=np.ones(2, "f4"))
    head = [(np.ones((2, 3), np.float32), np.zeros(3, np.float32))]
    network: Any = None
    with pytest.raises(UserError, match=r"--fine_tune\.learning_rate 9; .* lower one") as caught:
        stages._judge(made_run(), network, head, result)
    assert caught.value.reason == "fine-tuning-diverged"
    cause = UserError("shard-changed", "of another file")
    with pytest.raises(ray.exceptions.RayTaskError):
        stages._judge(made_run(), network, head, result)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_parts_that_are_damaged_are_computed_again_and_given_up_the_third_time(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tmp_path / "s" / "g0000.plain.parquet"
    part.parent.mkdir()
    network: Any = None
    features = stages.Features(network, str(tmp_path), {}, 3, 0)
    asked = []

    def extract(run: Any, network: Any, *, views: int) -> stages.Features:
        assert not part.exists()
        asked.append(views)
        return features

    monkeypatch.setattr(stages, "extract", extract)

    def use(_: stages.Features) -> str:
        if len(asked) < times:
            part.write_bytes(b"damaged")
            raise DamagedParts(["s/g0000.plain.parquet"])
        return "used"

    run = made_run()
    if times < 3:
        assert stages._on_whole(run, features, use) == "used"
    else:
        with pytest.raises(DamagedParts):
            stages._on_whole(run, features, use)
    assert asked == [3] * min(times, 2)
    assert set(run.seconds) == {"features"}


def test_seconds_of_a_stage_within_another_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("leafnet.training.run.time", SimpleNamespace(monotonic=lambda: now[0]))
    run = made_run()
    for _ in range(2):
        with run.stage("publish"):
            now[0] += 2
            with run.stage("int8"):
                now[0] += 10
            now[0] += 1
    assert run.seconds == {"int8": 20, "publish": 6}
