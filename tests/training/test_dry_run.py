"""Dry runs without a cluster: two machines that are made up, and rates that are known."""

import contextlib
import json
import os
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leafnet.core import hardware, storage, terminal
from leafnet.core.errors import UserError
from leafnet.core.hardware import Machine
from leafnet.core.settings import validate
from leafnet.data import shards
from leafnet.data.shards import ShardIndex
from leafnet.distributed import session as distributed_session
from leafnet.distributed.resources import Node
from leafnet.features import cache as features_cache
from leafnet.models import resnet, runtime
from leafnet.models.weights import Weights, load_weights
from leafnet.training import dry_run, plan
from leafnet.training.estimate import Room
from leafnet.training.settings import TrainSettings

GB = 10**9
VERSIONS = {"python": "3.12.1"} | dict.fromkeys(hardware.PACKAGES, "1.0")


def settings(index: ShardIndex, out: Path | str, **more: Any) -> TrainSettings:
    values = {
        **{"shards": index.root, "out": str(out), "name": "leaves", "weights": "random"},
        **{"image_size": 32, "views": 3, "precision": "float32", "batch_size": 8, "workers": 2},
        "head": {"units": [16], "epochs": 4, "batch_size": 10},
        **more,
    }
    return validate(TrainSettings, values)


def made_machine(**changes: Any) -> Machine:
    found = Machine(
        host="one",
        processor="p",
        cores=2,
        abilities=(),
        memory=8 * GB,
        memory_free=6 * GB,
        shm=GB,
        folder="/tmp",
        disk=90 * GB,
        disk_free=50 * GB,
        gpus=(),
        versions=VERSIONS,
    )
    return found._replace(**changes)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return load_weights("random")


@pytest.fixture
def cluster_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines of two CPUs, tasks that run here, ten views and four steps' images a second."""

    @contextlib.contextmanager
    def session(_: Any) -> Iterator[list[Node]]:
        yield [Node(2, 0), Node(2, 0)]

    def on_every_node(function: Callable[..., Any], *args: Any, **_: Any) -> dict[str, Any]:
        return {name: function(*args) for name in ("one", "two")}

    def remote(**_: Any) -> Callable[..., Any]:
        return lambda function: types.SimpleNamespace(remote=function)

    monkeypatch.setattr(distributed_session, "session", session)
    monkeypatch.setattr(distributed_session, "with_room", lambda nodes, *_: nodes)
    monkeypatch.setattr(distributed_session, "on_every_node", on_every_node)
    monkeypatch.setattr(dry_run, "ray", types.SimpleNamespace(remote=remote, get=lambda x: x))
    monkeypatch.setattr(hardware, "look", made_machine)
    monkeypatch.setattr(dry_run, "_measure", lambda *_: dry_run._Rate(10.0, 2 * GB))
    monkeypatch.setattr(dry_run, "_measure_steps", lambda *_: dry_run._Rate(4.0, 3 * GB))


def rehearse(
    chosen: TrainSettings,
    index: ShardIndex,
    weights: Weights,
    capfd: pytest.CaptureFixture[str],
) -> tuple[dict[str, Any], str]:
    """(the plan, the text that was said)."""

    def job(_: Any) -> None:
        dry_run.run(plan.Plan(chosen, index, weights))

    code = terminal.run_job(job, ["--json"])
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert code == 0, events
    return events[-1]["plan"], "\n".join(event.get("text", "") for event in events)


def test_a_plan_counts_views_batches_steps_and_seconds(
    cluster_of_two: None,
    data_set: ShardIndex,
    weights: Weights,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """36/9/9 photographs in two row groups a shard. Of train (two of 18) the plain views go in
    three batches of 8 each and two views more in five; of the others (5 and 4) in one each.
    """
    told, text = rehearse(settings(data_set, tmp_path / "runs"), data_set, weights, capfd)
    assert (told["views"], told["cached"]) == (36 * 3 + 9 + 9, 0)
    assert told["batches"] == 2 * (3 + 5) + 4 * 1
    # Of 36 in batches of 10 the whole ones alone.
    assert (told["steps_per_epoch"], told["steps"]) == (3, 4 * 3)
    assert (told["batch_size"], told["workers"], told["gpus"]) == (10, 2, 0)
    assert told["views_per_second"] == 10.0
    assert told["features_seconds"] == 126 / (10 * 2)
    assert told["fine_tune_steps"] is None
    assert (told["precision"], told["fingerprint"]) == ("float32", data_set.fingerprint)
    assert "36/9/9 images for train/valid/test, 3 classes, 3 shards" in text
    assert "global batch 10, 5 on each of 2 workers" in text
    assert "2 processes, 10.0 views/s each, as just measured" in text
    assert "start and head come on top" in text
    assert list(tmp_path.iterdir()) == []


def test_a_plan_says_what_it_takes(
    cluster_of_two: None,
    data_set: ShardIndex,
    weights: Weights,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A feature is 2,048 numbers of two bytes; on each machine are one process and one worker."""
    told, _ = rehearse(settings(data_set, tmp_path / "runs"), data_set, weights, capfd)
    assert told["local"] == 126 * 4096 + 54 * 4
    # Row, view and label beside each, and a few kilobytes a file.
    assert 126 * 4096 < told["cache"] < 126 * 4096 + 8 * 5000
    assert told["cache_new"] == told["cache"]
    stacks = 4 * 18 * 32 * 32 * 3
    assert told["memory"] == 600_000_000 + 500_000_000 + 2 * GB + stacks
    assert (told["photographs"], told["checkpoints"]) == (0, 0)


def test_a_plan_of_fine_tuning(
    cluster_of_two: None,
    data_set: ShardIndex,
    weights: Weights,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Three epochs of three steps of 12, at four photographs a second on each of two workers."""
    tuned = {"blocks": 1, "epochs": 3, "batch_size": 12}
    chosen = settings(data_set, tmp_path / "runs", fine_tune=tuned, checkpoint={"keep": 4})
    told, text = rehearse(chosen, data_set, weights, capfd)
    assert told["fine_tune_steps"] == 9
    assert told["fine_tune_seconds"] == 9 * 12 / (4 * 2)
    assert told["photographs"] == (36 + 9) * 32 * 32 * 3
    # Kernels and biases of the last stage: three blocks of 1x1, 3x3 and 1x1, and one shortcut.
    middle = 3 * 3 * 512 * 512 + 512 + 512 * 2048 + 2048
    stage = 3 * middle + (1024 * 512 + 512) + (1024 * 2048 + 2048) + 2 * (2048 * 512 + 512)
    head = 2048 * 16 + 16 + 16 * 3 + 3
    # Weights, two moments, the average and the best; four that are kept, and one being written.
    assert told["checkpoints"] == (4 + 1) * 5 * 4 * (stage + head)
    assert told["memory"] == 600_000_000 + 500_000_000 + 3 * GB
    assert "13.5 s for the steps of fine-tuning: 2 workers, 4.0 images/s each" in text
    assert "start, head, and fine-tuning's validation come on top" in text


def test_what_is_computed_already_is_not_measured(
    cluster_of_two: None,
    data_set: ShardIndex,
    weights: Weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The memory is then that of a process that fits the head; one view each: not augmented."""
    real = features_cache.plan

    def plan_of(*args: Any, **more: Any) -> features_cache.Plan:
        found = real(*args, **more)
        return features_cache.Plan(found.root, found.parts, ())

    monkeypatch.setattr(features_cache, "plan", plan_of)
    chosen = settings(data_set, tmp_path, augment=False)
    told, text = rehearse(chosen, data_set, weights, capfd)
    assert (told["views"], told["cached"], told["batches"]) == (54, 54, 0)
    assert (told["views_per_second"], told["features_seconds"]) == (None, None)
    assert (told["cache_new"], told["memory"]) == (0, 600_000_000 + 500_000_000 + 900_000_000)
    assert "time      that of the start and the head; all features are there" in text


def test_of_a_range_of_workers_the_plan_is_for_the_most(
    cluster_of_two: None,
    data_set: ShardIndex,
    weights: Weights,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    chosen = settings(data_set, tmp_path, workers="1..5")
    assert rehearse(chosen, data_set, weights, capfd)[0]["workers"] == 5


def test_a_batch_that_workers_cannot_share_is_refused_before_it_is_tried(
    cluster_of_two: None, data_set: ShardIndex, weights: Weights, tmp_path: Path
) -> None:
    for more in ({"fine_tune": {"blocks": 1, "batch_size": 1}}, {"head": {"batch_size": 1}}):
        chosen = settings(data_set, tmp_path, **more)
        with pytest.raises(UserError, match="cannot be shared out among 2 workers"):
            dry_run.run(plan.Plan(chosen, data_set, weights))


def test_a_share_that_is_tried_is_even_for_pairs(
    cluster_of_two: None,
    data_set: ShardIndex,
    weights: Weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 15 on two workers six each, and never fewer than two."""
    tried = []

    def measure(_: Any, head: Any, chosen: Any, *more: Any) -> dry_run._Rate:
        tried.append((chosen.batch_size, len(head[0][1]), more))
        return dry_run._Rate(1.0, 0)

    monkeypatch.setattr(dry_run, "_measure_steps", measure)
    for batch in (15, 3):
        tuned = {"blocks": 2, "batch_size": batch}
        chosen = settings(data_set, tmp_path, fine_tune=tuned)
        dry_run.run(plan.Plan(chosen, data_set, weights))
    # Pixels, precision, threads, no GPU.
    assert tried == [(6, 16, (32, "float32", 2, False)), (2, 16, (32, "float32", 2, False))]


def test_the_sample_is_the_first_shard_of_each_split(data_set: ShardIndex) -> None:
    (shard,) = data_set.of_split("train")
    second = shard.__class__(**{**vars(shard), "name": "train-00001.parquet"})
    index = ShardIndex(**{**vars(data_set), "shards": (*data_set.shards, second)})
    names = [found.name for found in dry_run._sample(index)]
    assert names == [f"{split}-00000.parquet" for split in ("train", "valid", "test")]
    only = ShardIndex(**{**vars(data_set), "shards": (second,)})
    assert dry_run._sample(only) == (second,)


@pytest.fixture
def copied(data_set: ShardIndex, tmp_path: Path) -> ShardIndex:
    storage.upload_folder(data_set.root, str(tmp_path / "shards"))
    return shards.read_index(str(tmp_path / "shards"))


def look(index: ShardIndex, *stores: str) -> Machine:
    return dry_run._look(index.root, dry_run._sample(index), stores)


def test_a_machine_that_sees_the_data_and_may_write_says_what_it_is(
    copied: ShardIndex, tmp_path: Path
) -> None:
    assert look(copied, str(tmp_path / "out")).cores == len(os.sched_getaffinity(0))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*/file"):
        look(copied, str(tmp_path / "out"), str(tmp_path / "file"))
    assert {path.name for path in tmp_path.iterdir()} == {"shards", "file"}


def test_a_machine_that_does_not_see_the_shards_is_named(copied: ShardIndex) -> None:
    Path(copied.root, "valid-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"valid-00000\.parquet is not on the machine") as caught:
        look(copied)
    assert caught.value.reason == "shards-not-shared"


def test_a_shard_with_other_bytes_or_rows_is_refused(copied: ShardIndex) -> None:
    root = Path(copied.root)
    shutil.copy(root / "valid-00000.parquet", root / "train-00000.parquet")
    with pytest.raises(UserError, match="has 9 rows, the index says 36") as caught:
        look(copied)
    assert caught.value.reason == "shard-changed"
    (root / "train-00000.parquet").write_bytes(bytes(5000))
    with pytest.raises(UserError, match="is not the file that was prepared") as caught:
        look(copied)
    assert caught.value.reason == "shard-changed"


def clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[int]:
    """Makes each batch of the network take so long; the sizes of what it is given."""
    now, sizes = [0.0], []

    def run(_: Any, stacks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for stack in stacks:
            sizes.append(len(stack))
            now[0] += seconds
            yield stack

    quick = types.SimpleNamespace(predict_on_batch=lambda stack: now.__setitem__(0, 100.0))
    monkeypatch.setattr(dry_run, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(runtime, "run", run)
    monkeypatch.setattr(resnet, "build", lambda *_, **__: quick)
    monkeypatch.setattr(hardware, "limit_threads", lambda *_, **__: None)
    return sizes


@pytest.mark.parametrize(
    ("seconds", "batch", "gpu", "sizes", "rate"),
    [
        (0.25, 32, False, [16] * 4, 16 / 0.25),
        (0.25, 6, False, [6] * 4, 6 / 0.25),
        (1.5, 32, False, [16] * 2, 16 / 1.5),
        (0.5, 32, True, [32] * 4, 32 / 0.5),
    ],
)
def test_a_rate_is_of_some_batches_or_seconds_without_the_first(
    seconds: float,
    batch: int,
    gpu: bool,
    sizes: list[int],
    rate: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU of batches of 16 at most, and memory is this process's peak."""
    seen = clock(monkeypatch, seconds)
    found = dry_run._measure({}, 32, "float32", batch, 1, gpu)
    assert seen == sizes
    assert found.per_second == pytest.approx(rate)
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    assert found.memory == pytest.approx(int(line.split()[1]) * 1024, rel=0.2)


def test_machines_are_told_and_versions_must_agree(capsys: pytest.CaptureFixture[str]) -> None:
    """Patches of Python may differ."""
    two = made_machine(
        gpus=("a", "b"), cores=8, memory_free=5 * GB, versions=VERSIONS | {"python": "3.12.9"}
    )
    dry_run._say_nodes({"one": made_machine(), "two": two})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("one: 2 cores, 6.0 GB of 8.0 GB memory and 50.0 GB of disk free")
    assert lines[1].endswith(
        "two: 8 cores, 2 GPUs, 5.0 GB of 8.0 GB memory and 50.0 GB of disk free"
    )
    assert "python 3.12.1, tensorflow 1.0, keras 1.0, ray 1.0, leafnet 1.0" in lines[2]
    for package, version in (("keras", "2.0"), ("python", "3.11.1")):
        other = made_machine(versions=VERSIONS | {package: version})
        with pytest.raises(UserError, match=f"{package} is .* on one") as caught:
            dry_run._say_nodes({"one": made_machine(), "two": other})
        assert caught.value.reason == "versions-differ"


def room(**takes: int) -> Room:
    """That some things take so many bytes, and the others nothing."""
    names = ("cache", "cache_new", "local", "photographs", "checkpoints", "memory")
    return Room(**{**dict.fromkeys(names, 0), **takes})


def say_room(capsys: pytest.CaptureFixture[str], **takes: int) -> str:
    found = {"one": made_machine(memory_free=6 * GB), "two": made_machine(memory_free=4 * GB)}
    dry_run._say_room(room(**takes), "r", "c", found)
    return capsys.readouterr().out


def test_too_little_memory_is_told_of_the_fullest_machine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "too little" not in say_room(capsys, memory=4 * GB)
    text = say_room(capsys, memory=4 * GB + 1)
    assert "about 4.0 GB on a node; 4.0 GB are free on the fullest" in text
    assert "that is too little" in text


def test_room_is_told_in_megabytes(capsys: pytest.CaptureFixture[str]) -> None:
    takes = {"cache": 3_000_000, "cache_new": 1_000_000, "local": 2_000_000}
    text = say_room(capsys, **takes)
    assert "1.0 MB of features to come, 3.0 MB with those there, in c" in text
    assert "2.0 MB in /tmp of each node that fits the head" in text
    assert "fine-tun" not in text
    text = say_room(capsys, checkpoints=5_000_000, photographs=4_000_000)
    assert "4.0 MB of decoded photographs there" in text
    assert "5.0 MB of checkpoints of fine-tuning in r" in text
    assert "no decoded photographs there" in say_room(capsys, checkpoints=5_000_000)


@pytest.mark.parametrize(
    ("takes", "wanted"),
    [("local", "give fewer --views"), ("photographs", r"give less --fine_tune\.local_gb")],
)
def test_a_node_whose_disk_is_too_small_is_named(takes: str, wanted: str, tmp_path: Path) -> None:
    found = {"one": made_machine(), "two": made_machine(disk_free=7_000_000)}
    run, cache = str(tmp_path / "run"), str(tmp_path / "cache")
    dry_run._refuse_small_disks(room(**{takes: 7_000_000}), run, cache, found)
    with pytest.raises(UserError, match=f"/tmp of two has 7.0 MB free.*{wanted}") as caught:
        dry_run._refuse_small_disks(room(**{takes: 7_000_001}), run, cache, found)
    assert caught.value.reason == "disk-full"


@pytest.mark.parametrize(
    ("takes", "folder", "wanted"),
    [
        ("cache_new", "cache", r"give another --cache\.url, or fewer --views"),
        ("checkpoints", "run", "give another --out"),
    ],
)
def test_a_store_on_a_disk_that_is_too_small_is_named(
    takes: str, folder: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is that of the nearest folder that there is."""
    asked = []

    def disk_usage(path: Any) -> Any:
        asked.append(Path(path))
        return types.SimpleNamespace(free=9_000_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    run, cache = str(tmp_path / "new" / "run"), str(tmp_path / "new" / "cache")
    dry_run._refuse_small_disks(room(**{takes: 9_000_000}), run, cache, {"one": made_machine()})
    assert asked == [tmp_path, tmp_path]
    with pytest.raises(UserError, match=f"/new/{folder} has 9.0 MB free.*{wanted}"):
        dry_run._refuse_small_disks(room(**{takes: 9_000_001}), run, cache, {"one": made_machine()})
    elsewhere = room(**{takes: 10**15})
    dry_run._refuse_small_disks(elsewhere, "s3://a/run", "s3://a/cache", {"one": made_machine()})


@pytest.mark.parametrize(
    ("error", "kept"), [(None, 0), (UserError("a", "b"), 0), (RuntimeError("c"), 1)]
)
def test_a_log_stays_only_where_something_of_ours_is_wrong(
    error: Exception | None, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = pytest.raises(type(error)) if error else contextlib.nullcontext()
    with expected, dry_run._quiet():
        if error:
            raise error
    assert len(list(tmp_path.glob("leafnet-*/dry-run.log"))) == kept
    assert len(list(tmp_path.iterdir())) == kept
