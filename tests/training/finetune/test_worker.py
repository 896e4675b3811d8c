from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from leafnet.distributed import group
from leafnet.distributed.group import RestartPolicy
from leafnet.models.weights import Weights, fingerprint
from leafnet.training.finetune import worker
from leafnet.training.worker import Placement


def tuned(number: float) -> worker.Tuned:
    arrays = (np.full((1, 1, 2, 3), number, np.float32), np.full(3, number, np.float32))
    return worker.Tuned({"conv5_conv": arrays}, [], 2, 1, {}, [])


def test_the_driver_hears_each_image_and_epoch_once_also_after_a_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Workers tell of all images since the start; what came before the restart does not count."""

    def run(*args: Any, on_event: Any, on_restart: Any, **settings: Any) -> list[str]:
        assert (settings["workers"], settings["gpu"], settings["name"]) == (3, True, "fine_tune")
        assert (settings["cpus_per_worker"], settings["storage_path"]) == (2.0, "s3://runs/one")
        for event in (("images", 40), ("epoch", {"epoch": 1}), ("images", 70), ("result", "old")):
            on_event(event)
        on_restart()
        for event in (("images", 40), ("epoch", {"epoch": 1}), ("images", 90)):
            on_event(event)
        on_event(("epoch", {"epoch": 2}))
        on_event(("result", "new"))
        return ["one restart"]

    monkeypatch.setattr(group, "run", run)
    rows: list[dict[str, float]] = []
    images: list[int] = []
    found: Any = worker.fine_tune(
        SimpleNamespace(),  # type: ignore[arg-type]
        Placement(3, 2.0, True, "s3://runs/one", RestartPolicy()),
        on_epoch=rows.append,
        on_images=images.append,
    )
    assert found == ("new", ["one restart"])
    assert images == [40, 30, 20]
    assert rows == [{"epoch": 1}, {"epoch": 2}]


def test_progress_is_told_of_every_half_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    told: list[Any] = []
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    progress = worker._Progress(told.append)
    for later, count in ((0.0, 5), (0.4, 7), (0.1, 1), (0.2, 3)):
        clock[0] += later
        progress(count)
    assert told == [("images", 5), ("images", 13)]
    progress.flush()
    assert told[2:] == [("images", 16)]
    worker._Progress(None)(4)  # of a worker that does not tell


def test_trained_stages_take_the_place_of_theirs_alone() -> None:
    before = {f"conv{stage}_conv": tuned(stage).convolutions["conv5_conv"] for stage in (4, 5)}
    weights = Weights(before, "of the file", "imagenet")
    found = worker.merged(weights, tuned(9))
    assert found.convolutions["conv4_conv"] is before["conv4_conv"]
    assert found.convolutions["conv5_conv"][0].max() == 9
    assert before["conv5_conv"][0].max() == 5
    assert found.source == "imagenet"
    assert found.fingerprint == fingerprint(found.convolutions)
    assert found.fingerprint != fingerprint(before)
