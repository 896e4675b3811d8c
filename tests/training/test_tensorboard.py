"""Event files read back by TensorBoard itself: its reader, and its server."""

import io
import json
import os
import socket
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

from leafnet.core import storage
from leafnet.data.shards import ShardIndex
from leafnet.metrics.scores import Tally, scores
from leafnet.training.tensorboard import EventLog, sample_photographs

# TensorBoard would import TensorFlow, which takes seconds, only to look at local files.
sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")
SERVER = """
import sys, types
sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")
from tensorboard.main import run_main
run_main()
"""
NAMES = ("early_blight", "healthy", "late_blight")


def row(epoch: int) -> dict[str, float]:
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "learning_rate": 1e-3,
        "train_loss": 1 / epoch,
        "train_accuracy": 1 - 0.5 / epoch,
        "valid_loss": 1.5 / epoch,
        "valid_accuracy": 1 - 0.6 / epoch,
    }


def of_split() -> dict[str, Any]:
    return scores(Tally(np.diag([4, 3, 2]), 1.2, *np.zeros((3, 15))), NAMES)


def png(width: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, 20), "green").save(sink, "PNG")
    return sink.getvalue()


def tuned_row(epoch: int) -> dict[str, float]:
    return row(epoch) | {"train_loss": 0.1 / epoch, "images_per_s": 12.0, "waited": 0.01}


def finish(log: EventLog, epochs: int, tuned: int = 0) -> None:
    history = [row(epoch) for epoch in range(1, epochs + 1)]
    found = {split: of_split() for split in ("test", "valid", "train")}
    log.results(
        history,
        found,
        images={"confusion": png(50)},
        samples={"healthy": png(60)},
        fine_tune=[tuned_row(epoch) for epoch in range(1, tuned + 1)],
    )


def read(run: Path | str, split: str) -> EventAccumulator:
    found = EventAccumulator(str(Path(run) / "tensorboard" / split))
    found.Reload()
    return found


def points(run: Path | str, split: str, tag: str) -> list[tuple[int, Any]]:
    return [(e.step, pytest.approx(e.value)) for e in read(run, split).Scalars(tag)]


def written(run: Path, split: str, tag: str) -> list[int]:
    """Steps of `tag` in all files as they are, in which nothing was replaced by the reader."""
    steps = []
    for file in sorted((run / "tensorboard" / split).iterdir()):
        for event in RawEventFileLoader(str(file)).Load():
            parsed = _parse(event)
            steps += [parsed.step for value in parsed.summary.value if value.tag == tag]
    return steps


def _parse(data: bytes) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event.FromString(data)


def test_every_epoch_as_it_comes_and_the_results(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path))
    for epoch in (1, 2, 3):
        log.epoch(row(epoch))
        assert points(tmp_path, "train", "loss")[-1] == (epoch, 1 / epoch)
    finish(log, 3)
    assert points(tmp_path, "train", "loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert points(tmp_path, "valid", "accuracy") == [(1, 0.4), (2, 0.7), (3, 0.8)]
    assert points(tmp_path, "test", "final/accuracy") == [(3, 1.0)]
    assert points(tmp_path, "test", "final_f1/late_blight") == [(3, 1.0)]
    test = read(tmp_path, "test")
    assert test.Tags()["images"] == ["confusion", "samples/healthy"]
    (confusion,) = test.Images("confusion")
    assert (confusion.width, confusion.encoded_image_string) == (50, png(50))


def test_a_run_that_goes_on_has_every_epoch_once(tmp_path: Path) -> None:
    first = EventLog(str(tmp_path))
    for epoch in (1, 2, 3, 4):
        first.epoch(row(epoch))
    # Killed; the checkpoint was that of epoch 2, and the file ends in the middle of a record.
    (file,) = (tmp_path / "tensorboard" / "train").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    second = EventLog(str(tmp_path))
    for epoch in (3, 4, 5):
        second.epoch(row(epoch))
    finish(second, 5)
    for split, tag in (("train", "loss"), ("valid", "loss"), ("train", "learning_rate")):
        assert written(tmp_path, split, tag) == [1, 2, 3, 4, 5], (split, tag)
        assert [step for step, _ in points(tmp_path, split, tag)] == [1, 2, 3, 4, 5]


def test_a_new_file_that_a_kill_left_half_written_hides_nothing(tmp_path: Path) -> None:
    EventLog(str(tmp_path)).epoch(row(1))
    folder = tmp_path / "tensorboard" / "train"
    (file,) = folder.iterdir()
    (folder / "events.out.tfevents.9999999999.0.host.tmp").write_bytes(file.read_bytes()[:40])
    EventLog(str(tmp_path)).epoch(row(2))
    assert written(tmp_path, "train", "loss") == [1, 2]
    assert len(list(folder.iterdir())) == 1


def test_workers_that_start_again_take_epochs_back(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path))
    for epoch in (1, 2, 3, 2, 3, 4):
        log.epoch(row(epoch))
    assert written(tmp_path, "valid", "accuracy") == [1, 2, 3, 4]


def test_epochs_that_a_kill_kept_from_the_files(tmp_path: Path) -> None:
    """The checkpoint was saved, and the driver was killed before it had heard of the epoch."""
    EventLog(str(tmp_path)).epoch(row(1))
    log = EventLog(str(tmp_path))
    log.epoch(row(4))
    finish(log, 4)
    assert written(tmp_path, "train", "accuracy") == [1, 2, 3, 4]


def test_results_that_come_again_replace_the_first(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path))
    log.epoch(row(1))
    finish(log, 1)
    finish(EventLog(str(tmp_path)), 1)  # killed between these and the model's publication
    assert written(tmp_path, "train", "loss") == [1]
    assert written(tmp_path, "train", "final/accuracy") == [1]
    assert written(tmp_path, "test", "confusion") == [1]


def test_fine_tuning_has_its_own_epochs_and_tags(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path))
    for epoch in (1, 2, 3):
        log.epoch(row(epoch))
    for epoch in (1, 2, 3, 2):  # the workers start again
        log.fine_tune_epoch(tuned_row(epoch))
    assert points(tmp_path, "train", "fine_tune/loss") == [(1, 0.1), (2, 0.05)]
    # Killed; the driver had not heard of epoch 4.
    again = EventLog(str(tmp_path))
    for epoch in (3, 5):
        again.fine_tune_epoch(tuned_row(epoch))
    finish(again, 3, tuned=5)
    for tag, epochs in (("loss", 3), ("fine_tune/loss", 5), ("fine_tune/accuracy", 5)):
        for split in ("train", "valid"):
            assert written(tmp_path, split, tag) == list(range(1, epochs + 1)), (split, tag)
            assert len(points(tmp_path, split, tag)) == epochs
    assert points(tmp_path, "train", "fine_tune/waited")[0] == (1, 0.01)
    assert points(tmp_path, "train", "loss")[-1] == (3, 1 / 3)
    assert points(tmp_path, "test", "final/accuracy") == [(3, 1.0)]


def test_a_run_in_object_storage() -> None:
    run = "memory://tensorboard-run"
    log = EventLog(run)
    for epoch in (1, 2):
        log.epoch(row(epoch))
        (name,) = storage.list_names(f"{run}/tensorboard/train")
    EventLog(run).epoch(row(3))
    (after,) = storage.list_names(f"{run}/tensorboard/train")
    assert after > name
    data = storage.read_bytes(f"{run}/tensorboard/train/{after}")
    for epoch in (1, 2, 3):
        assert data.count(np.float32(1 / epoch).tobytes()) >= 1, epoch


def test_samples(data_set: ShardIndex) -> None:
    found = sample_photographs(data_set, "train")
    assert set(found) == set(data_set.class_names)
    for strip in found.values():
        with Image.open(io.BytesIO(strip)) as picture:
            assert picture.height == 160
            assert picture.width in {160, 320, 480, 640}
            assert np.asarray(picture).std() > 10


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        data = answer.read()
        return json.loads(data) if "json" in answer.headers["Content-Type"] else data


def serve(command: Sequence[str], url: str) -> subprocess.Popen[bytes]:
    """A server, once it answers at `url`."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while True:
        try:
            get(url)
            return server
        except OSError:
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.2)


@pytest.mark.slow
def test_the_server_shows_it(tmp_path: Path) -> None:
    run = tmp_path / "potato"
    log = EventLog(str(run))
    for epoch in (1, 2):
        log.epoch(row(epoch))
    finish(log, 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-c", SERVER, "--logdir", tmp_path, "--port", port, "--host=127.0.0.1"]
    data = f"http://127.0.0.1:{port}/data"
    server = serve([sys.executable, *map(str, command)], f"{data}/environment")
    try:
        deadline = time.monotonic() + 30
        while len(get(f"{data}/runs")) < 3:
            assert time.monotonic() < deadline, "the runs do not show"
            time.sleep(0.2)
        assert set(get(f"{data}/runs")) == {
            os.path.join("potato", "tensorboard", split) for split in ("train", "valid", "test")
        }
        one = "run=potato/tensorboard/train&tag=loss"
        shown = get(f"{data}/plugin/scalars/scalars?{one}")
        assert [(step, value) for _, step, value in shown] == [(1, 1.0), (2, 0.5)]
        query = "run=potato/tensorboard/test&tag=confusion&sample=0"
        (picture,) = get(f"{data}/plugin/images/images?{query}")
        assert picture["step"] == 2
        assert get(f"{data}/plugin/images/individualImage?{picture['query']}") == png(50)
    finally:
        server.terminate()
        server.wait()
