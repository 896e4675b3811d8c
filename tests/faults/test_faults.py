"""Real processes are killed, stopped and cut off while a head is fitted on several raylets.

What comes out has to be what an uninterrupted fit gives, and nobody may wait for ever. `make test`
has the short form, `make test-faults` all of it, with the table of cluster/FAULTS.md at its end.
"""

import datetime
import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leafnet.data.shards import ShardIndex
from leafnet.distributed import checkpoint
from leafnet.distributed.worker import Place
from leafnet.features import cache as features_cache
from leafnet.features.cache import read_part
from leafnet.training.head import fit, worker
from leafnet.training.head.fit import TrainingData
from tests.faults.processes import Job, LocalCluster, alive, flat, local_cluster
from tests.support.made_features import head_jobs

pytestmark = pytest.mark.ray

SHORT = {"epochs": 40, "save_every_steps": 2}  # of three steps each
LONG = {"epochs": 150, "save_every_steps": 2}
# What may come between a fault and the start of the next group, beside what Ray itself takes to see
# that a machine is gone. On a machine at rest; the starts themselves vary more than that on others.
BETWEEN_S = 10.0

# Fault, what happened, what was lost, seconds until training again, of these those of a start.
ROWS: list[tuple[str, str, str, float, float]] = []


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return head_jobs(str(tmp_path_factory.mktemp("cache") / "key"))


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what was done and what came of it, at the end."""
    yield
    lines = [
        "| fault | what happened | lost | training again [s] | of it a start [s] | rest [s] |",
        "|---|---|---|--:|--:|--:|",
        *(f"| {a} | {b} | {c} | {d:.1f} | {e:.1f} | {d - e:.1f} |" for a, b, c, d, e in ROWS),
    ]
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + "\n".join(lines))


def uninterrupted(job: worker.HeadJob) -> tuple[np.ndarray, list[dict[str, float]]]:
    """The head and the history of a fit in this process, on one worker."""
    local = worker.local_features(job)
    train = local.splits["train"]
    state = fit.fit_head(
        TrainingData(
            fit.cached_views(train.features, seed=job.seed),
            train.labels,
            local.splits["valid"],
            local.mean,
            local.deviation,
        ),
        settings=job.head,
        num_classes=len(job.class_names),
        seed=job.seed,
        place=Place(0, 1),
        report=lambda row: None,
    )
    return flat(state.head), state.history


def started(cluster: LocalCluster, folder: Path, job: Any, **spec: Any) -> Job:
    """A slow job that has saved some steps."""
    folder.mkdir(parents=True)
    (folder / "slow").touch()
    made = Job(cluster, folder, job, **spec)
    made.wait(lambda: made.steps() > 0, "the first checkpoint")
    return made


def interrupt(job: Job, fault: str, what: str, act: Callable[[], None]) -> float:
    """Do something to the job, and wait until it trains again; the seconds without the start."""
    again, steps = job.said("training again"), job.steps()
    began = time.time()
    act()
    job.wait(lambda: job.said("training again") > again, f"training after {fault}")
    line = [line for line in job.log.splitlines() if "training again" in line][-1]
    at = datetime.datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()
    start_s = float(line.split()[-2])
    ROWS.append((fault, what, "nothing", at - began, start_s))
    job.wait(lambda: job.steps() > steps, f"new steps after {fault}")
    return at - began - start_s


def is_whole(job: Job, of: worker.HeadJob) -> None:
    """What came out is what an uninterrupted fit gives."""
    assert job.finish() == 0, job.tail()
    head, history = uninterrupted(of)
    np.testing.assert_allclose(job.head(), head, rtol=0, atol=1e-5)
    result = job.result()
    assert [row["step"] for row in result["history"]] == [row["step"] for row in history]
    for row, other in zip(result["history"], history, strict=True):
        assert row == pytest.approx(other, abs=1e-4)
    assert result["examples"] == {"train": 48, "valid": 13, "test": 7}


def test_killed_stopped_and_cut_off(cache: Any, tmp_path: Path) -> None:
    """The short form: a killed worker, a stopped one, and a machine that is gone."""
    of = cache(**SHORT)
    with local_cluster(1, 1, 1) as cluster:
        job = started(cluster, tmp_path / "job", of)
        try:
            interrupt(
                job,
                "kill -9 of rank 1",
                "group restarted",
                lambda: os.kill(job.worker(1), signal.SIGKILL),
            )
            stopped = job.worker(0)
            interrupt(
                job,
                "SIGSTOP of rank 0, hang_timeout 5 s",
                "watchdog killed it, group restarted",
                lambda: os.kill(stopped, signal.SIGSTOP),
            )
            assert not alive(stopped)
            node = _away(cluster, job)
            interrupt(
                job,
                "kill -9 of a raylet",
                "group restarted on the nodes that are left",
                lambda: cluster.kill_raylet(node),
            )
            is_whole(job, of)
        finally:
            job.end()
    told = job.result()["restarts"]
    assert "its process died" in told[0]["why"]
    assert "gave no sign of life" in told[1]["why"]
    # The stop may fall into a step or into the saving between two: the log has to say which.
    doing = told[1]["why"].partition("last: ")[2]
    assert doing.startswith(("training, epoch", "saving the state after step")), told[1]["why"]
    assert [one["counted"] for one in told] == [True] * 3


@pytest.mark.faults
def test_twenty_kills_at_random_times(cache: Any, tmp_path: Path) -> None:
    of = cache(**LONG)
    chance = random.Random(0)
    kinds = [
        *["kill -9 of rank 0", "kill -9 of rank 1"] * 5,
        *["kill -9 of a raylet"] * 4,
        *["kill -9 of the driver, run again"] * 4,
        *["kill -9 of Ray Train's controller"] * 2,
    ]
    chance.shuffle(kinds)
    with local_cluster(1, 1, 1) as cluster:
        job = started(cluster, tmp_path / "job", of)
        try:
            for kind in kinds:
                time.sleep(chance.uniform(0, 3))
                if kind == "kill -9 of the driver, run again":
                    workers, began = [job.worker(rank) for rank in (0, 1)], time.monotonic()
                    job.end()
                    job.start()
                    job.wait(lambda pids=workers: not any(map(alive, pids)), "its workers' end")  # type: ignore[misc]
                    steps = job.steps()
                    job.wait(lambda steps=steps: job.steps() > steps, f"steps after {kind}")  # type: ignore[misc]
                    ROWS.append((kind, "went on", "nothing", time.monotonic() - began, 0.0))
                else:
                    kill = functools.partial(_kill, kind, cluster, job)
                    rest = interrupt(job, kind, "group restarted", kill)
                    assert rest < BETWEEN_S + (20 if "raylet" in kind else 0), ROWS[-1]
                if "raylet" in kind:
                    cluster.add(1)
            is_whole(job, of)
        finally:
            job.end()


def _kill(kind: str, cluster: LocalCluster, job: Job) -> None:
    if "raylet" in kind:
        cluster.kill_raylet(_away(cluster, job))
    elif "controller" in kind:
        os.kill(_process_of(cluster, b"TrainController"), signal.SIGKILL)
    else:
        os.kill(job.worker(int(kind[-1])), signal.SIGKILL)


def _away(cluster: LocalCluster, job: Job) -> str:
    """A node that has a worker and is not the driver's."""
    first = next(iter(cluster.raylets))
    nodes = [cluster.node_of(job.worker(rank)) for rank in (0, 1)]
    return next(node for node in nodes if node != first)


def _process_of(cluster: LocalCluster, title: bytes) -> int:
    raylets = set(cluster.raylets.values())
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                if int(stat[1]) in raylets and title in (folder / "cmdline").read_bytes():
                    return int(folder.name)
            except (FileNotFoundError, ProcessLookupError):
                continue
    raise AssertionError(f"no process {title!r}")


@pytest.mark.faults
def test_an_actor_of_feature_extraction_is_killed(data_set: ShardIndex, tmp_path: Path) -> None:
    wanted = [(shard, 6) for shard in data_set.shards]
    seconds: list[float] = []
    with local_cluster(2, 2) as cluster:
        command = [sys.executable, "-m", "tests.faults.processes", "features", data_set.root]
        for name in ("whole", "killed"):
            cache, began = str(tmp_path / name), time.monotonic()
            with open(tmp_path / f"{name}.log", "wb") as log:
                process = subprocess.Popen(
                    [*command, cache, cluster.address],
                    env=cluster.environment,
                    stdout=log,
                    stderr=log,
                )
                try:
                    while name == "killed" and not list(Path(cache).rglob("*.parquet")):
                        assert process.poll() is None
                        time.sleep(0.02)
                    if name == "killed":
                        os.kill(_process_of(cluster, b"MapWorker"), signal.SIGKILL)
                    assert process.wait(180) == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
                finally:
                    process.kill()
            seconds.append(time.monotonic() - began)
    ROWS.append(
        (
            "kill -9 of an actor of the features",
            "Ray Data took another",
            "nothing",
            seconds[1],
            seconds[0],
        )
    )
    for part in features_cache.plan(str(tmp_path / "whole"), wanted, seed=0).parts:
        whole = read_part(str(tmp_path / "whole"), part)
        killed = read_part(str(tmp_path / "killed"), part)
        assert whole is not None
        assert killed is not None
        np.testing.assert_array_equal(killed[0], whole[0])
        np.testing.assert_array_equal(killed[1], whole[1])


@pytest.mark.faults
def test_preempted_by_signal_and_by_notice_is_no_failure(cache: Any, tmp_path: Path) -> None:
    """With no failure allowed: SIGTERM in a worker, and a node that is drained."""
    of = cache(epochs=60)  # nothing is saved but at the end of an epoch
    with local_cluster(1, 1, 1) as cluster:
        job = started(cluster, tmp_path / "job", of, max_failures=0)
        try:
            interrupt(
                job,
                "SIGTERM of rank 1",
                "saved at the next step, group restarted",
                lambda: os.kill(job.worker(1), signal.SIGTERM),
            )
            node = _away(cluster, job)
            interrupt(
                job,
                "node drained (notice of 60 s)",
                "saved at the next step, group restarted elsewhere",
                lambda: _drain(cluster, node),
            )
            assert node not in map(cluster.node_of, map(job.worker, (0, 1)))
            is_whole(job, of)
        finally:
            job.end()
    told = job.result()["restarts"]
    assert [one["counted"] for one in told] == [False, False]
    assert "was asked to end by SIGTERM" in told[0]["why"]
    assert "takes machine" in told[1]["why"]


def _drain(cluster: LocalCluster, node: str) -> None:
    code = (
        "import ray, sys, time; from ray.core.generated import autoscaler_pb2 as a; "
        "c = ray._raylet.GcsClient(address=sys.argv[1]); "
        "print(c.drain_node(sys.argv[2], a.DrainNodeReason.Value("
        "'DRAIN_NODE_REASON_PREEMPTION'), 'spot', int(time.time() * 1000) + 60000))"
    )
    subprocess.run(
        [sys.executable, "-c", code, cluster.address, node],
        check=True,
        env=cluster.environment,
        timeout=60,
    )


@pytest.mark.faults
def test_grows_and_shrinks_with_the_cluster(cache: Any, tmp_path: Path) -> None:
    of = cache(**SHORT)
    with local_cluster(1) as cluster:
        job = started(cluster, tmp_path / "job", of, workers=[1, 3])
        try:
            restarts = job.said("restart ")
            cluster.add(1)
            job.wait(lambda: job.said("restart ") > restarts, "growing")
            job.wait(lambda: job.said("training again") > restarts, "training after growing")
            assert alive(job.worker(1))
            node = _away(cluster, job)
            interrupt(
                job,
                "workers 1..3, a node less",
                "went on with 1 worker",
                lambda: cluster.kill_raylet(node),
            )
            is_whole(job, of)
        finally:
            job.end()
    assert [one["workers"] for one in job.result()["restarts"]] == [1, 2]


@pytest.mark.faults
def test_a_port_in_use_and_a_death_on_import(cache: Any, tmp_path: Path) -> None:
    of = cache(epochs=3)
    with local_cluster(1, 1) as cluster:
        folder = tmp_path / "job"
        folder.mkdir()
        (folder / "port-in-use").touch()
        (Path(cluster.environment["FAULT_FOLDER"]) / "die-on-import").touch()
        job = Job(cluster, folder, of)
        try:
            is_whole(job, of)
        finally:
            job.end()
    told = [one["why"] for one in job.result()["restarts"]]
    assert len(told) == 2, told
    assert told[0] == "a worker died while it started"
    assert not (folder / "port-in-use").exists()


@pytest.mark.faults
def test_sigterm_of_the_driver_saves_and_says_how_to_go_on(cache: Any, tmp_path: Path) -> None:
    of = cache(epochs=60)
    with local_cluster(1, 1) as cluster:
        job = started(cluster, tmp_path / "job", of)
        try:
            steps = job.steps()
            job.process.send_signal(signal.SIGTERM)
            assert job.process.wait(60) == 143, job.tail()
            assert (
                "run the same command again to continue" in (job.folder / "driver.err").read_text()
            )
            kept = checkpoint.newest(str(job.folder / "head"), print)
            assert kept is not None
            assert job.steps() > steps
            assert f"kept      {job.folder / 'head' / kept}" in job.log
            job.start()
            is_whole(job, of)
        finally:
            job.end()


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which takes root")
def test_a_full_disk_and_a_store_that_is_away(cache: Any, tmp_path: Path) -> None:
    of = cache(**SHORT)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)]).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        with local_cluster(1, 1) as cluster:
            job = started(cluster, tmp_path / "job", of, storage=str(disk))
            try:
                began = time.monotonic()
                # Without a buffer, which would be written, and fail, once more at the end.
                with open(disk / "filler", "wb", buffering=0) as filler, suppress(OSError):
                    while True:
                        filler.write(b"x" * 4096)
                job.wait(lambda: job.said("No space left") > 0, "the full disk")
                # Training goes on beside it, unless Ray Train's own account of the checkpoints was
                # what found no room: then the group is started again once there is some.
                time.sleep(5)
                (disk / "filler").unlink()
                steps = job.steps()
                job.wait(lambda: job.steps() > steps, "a checkpoint after the full disk")
                seconds = time.monotonic() - began
                told = "training went on, saved when there was room"
                if job.said("restart "):
                    told = "group restarted when there was room"
                ROWS.append(("disk full in a checkpoint", told, "nothing", seconds, 0.0))

                began, away = time.monotonic(), tmp_path / "away"
                away.mkdir()
                _move_mount(disk, away)
                time.sleep(30)
                _move_mount(away, disk)
                steps = job.steps()
                job.wait(lambda: job.steps() > steps, "a checkpoint after the store was away")
                seconds = time.monotonic() - began
                ROWS.append(("storage away for 30 s", "waited for", "nothing", seconds, 0.0))
                is_whole(job, of)
            finally:
                job.end()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def _move_mount(source: Path, target: Path) -> None:
    subprocess.run(["mount", "--move", str(source), str(target)], check=True)
