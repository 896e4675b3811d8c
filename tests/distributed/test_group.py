"""What is decided about a group of workers, without one: when it starts again, and from where."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.exceptions
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.distributed import checkpoint, ray_train, worker
from leafnet.distributed import group as distributed_group
from leafnet.distributed.failures import (
    End,
    Restart,
    _short,
    is_no_failure,
    port_was_taken,
    read_restarts,
    reason_of,
)
from leafnet.distributed.group import RestartPolicy, _Group
from leafnet.distributed.heartbeat import Seen, Sign, Stuck
from leafnet.training.worker import each_once


def sign(rank: int, *, started: bool = True) -> Sign:
    return Sign(rank, 100 + rank, "n", "10.0.0.7", "step 5", 0.0, True, started, 1.0, 1.0, None)


class FailedWorkers(Exception):
    """As Ray Train's error, which says what became of each worker."""

    def __init__(self, failures: dict[int, Exception]) -> None:
        super().__init__("some workers failed")
        self.worker_failures = failures


def test_a_row_of_the_history_is_told_once() -> None:
    """After a restart epochs come again from the one after the checkpoint."""
    told: list[float] = []
    on_row = each_once(lambda row: told.append(row["epoch"]))
    for epoch in (1, 2, 3, 2, 3, 4):
        on_row({"epoch": epoch})
    assert told == [1, 2, 3, 4]


def test_restarts_are_read_again(tmp_path: Path) -> None:
    stored = [Restart("2026-01-01", "why", True, 2, "the beginning", 20.5, 18.0)]
    folder = str(tmp_path)
    assert read_restarts(folder) == []
    storage.write_json(f"{folder}/restarts.json", [vars(one) for one in stored])
    assert read_restarts(folder) == stored
    for half in ('[{"at": "2026', '[{"at": "2026-01-01", "other": 1}]'):
        (tmp_path / "restarts.json").write_text(half)
        assert read_restarts(folder) == []


def test_what_a_store_is_to_blame_for_may_pass() -> None:
    for reason in ("no-keys", "disk-full"):
        assert worker.passes(UserError(reason, "away"))
    assert not worker.passes(UserError("loss-not-finite", "no"))
    assert not worker.passes(OSError("no-keys"))


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (End(asked="told to end", left=True), "told to end"),
        (
            End(asked="told to end"),
            "told to end, and the state could not be saved in time",
        ),
        (
            End(killed=[Stuck(sign(0), "first"), Stuck(sign(1), "second")]),
            "first; second",
        ),
        (End(raised=[ValueError("a"), ValueError("b")]), "a worker met: b"),
        (End(error=ValueError("no  such\n thing")), "ValueError: no such thing"),
        (End(error=RuntimeError("told already")), "told already"),
        (
            End(error=FailedWorkers({1: KeyError("x")}), signs=[sign(0), sign(1)]),
            "worker 1 (process 101 on 10.0.0.7), step 5: KeyError: 'x'",
        ),
        (
            End(error=FailedWorkers({3: KeyError("x")}), signs=[sign(0)]),
            "worker 3: KeyError: 'x'",
        ),
        (
            End(error=FailedWorkers({0: KeyError("x")}), silent=[Seen(sign(1), 7.4)]),
            "worker 1 (process 101 on 10.0.0.7) gave no sign of life for 7 s, last: step 5",
        ),
    ],
)
def test_why_an_attempt_ended_is_told_in_a_line(end: End, why: str) -> None:
    assert reason_of(end) == why


def test_the_worker_that_died_is_told_before_those_that_lost_it() -> None:
    died = ray.exceptions.RayActorError()
    end = End(error=FailedWorkers({0: ValueError("lost"), 2: died}), signs=[sign(2)])
    assert reason_of(end).startswith("worker 2 (process 102 on 10.0.0.7), step 5: ")
    assert "lost" not in reason_of(end)


def test_a_group_without_room_is_no_failure() -> None:
    late = WorkerGroupStartupTimeoutError(num_workers=5)
    error = SimpleNamespace(controller_failure=late)
    assert is_no_failure(error)  # type: ignore[arg-type]
    assert _short(late) == "there is no room for 5 workers yet"
    assert not is_no_failure(ValueError("broken"))
    assert not is_no_failure(None)


def test_a_port_that_was_taken_is_known_by_what_tensorflow_says() -> None:
    taken = FailedWorkers({0: ValueError("lost"), 1: RuntimeError("Could not start gRPC server")})
    assert port_was_taken(taken)
    assert not port_was_taken(FailedWorkers({0: ValueError("lost")}))
    assert not port_was_taken(None)


@pytest.mark.parametrize(("gpu", "room"), [(False, 2 + 1), (True, 1 + 1)])
def test_room_is_whole_workers_on_machines_that_stay(
    gpu: bool, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of 1.5 CPUs: 3 CPUs have room for two of them, 2.9 for one."""
    free = {
        "a": {"CPU": 3.0, "GPU": 1.0},
        "b": {"CPU": 2.9, "GPU": 4.0},
        "leaves": {"CPU": 30.0, "GPU": 8.0},
        "dead": {"CPU": 30.0, "GPU": 8.0},
        "full": {"GPU": 8.0},
    }
    state = SimpleNamespace(available_resources_per_node=lambda: free)
    monkeypatch.setattr(ray._private.state, "state", state)
    monkeypatch.setattr(ray_train, "draining", lambda: {"leaves": 20.0})
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"NodeID": name, "Alive": name != "dead"} for name in free]
    )
    assert distributed_group._room(1.5, gpu) == room


class Group(_Group):
    """One whose attempts end as they are told to, and whose waits take no time."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
        self.waited: list[float] = []
        monkeypatch.setattr(distributed_group, "Desk", lambda: None)
        monkeypatch.setattr(time, "sleep", self.waited.append)
        settings: dict[str, Any] = {"workers": (2, 2), "policy": RestartPolicy(), **more}
        super().__init__(
            lambda *args: None,
            None,
            name="head",
            cpus=1.0,
            gpu=False,
            storage_path=str(folder),
            on_event=lambda event: None,
            **settings,
        )
        self.ends: list[End] = []
        self.saved: dict[int, int] = {}  # attempt: the step of the checkpoint that it leaves

    def _try(self) -> End:
        self._attempt += 1
        if self._attempt in self.saved:
            save(Path(self._folder), self.saved[self._attempt])
        return self.ends.pop(0) if self.ends else End()


def save(folder: Path, step: int) -> str:
    name = checkpoint.name(step, "aaaa")
    checkpoint.write(folder / name, {}, {}, identity={})
    return name


def failed(why: str = "broken") -> End:
    return End(error=ValueError(why))


def test_a_group_that_fails_is_started_again_after_longer_and_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(tmp_path, monkeypatch, policy=RestartPolicy(max_failures=8))
    group.ends = [failed() for _ in range(8)]
    cleared: list[bool] = []
    group.until_done(lambda: cleared.append(True))
    assert group.waited == [1, 2, 4, 8, 16, 32, 60, 60]
    assert len(cleared) == len(group.restarts) == 8
    assert group.restarts[0].why == "ValueError: broken"
    assert group.restarts[0].goes_on_from == "the beginning"
    assert (group.restarts[0].counted, group.restarts[0].workers) == (True, 2)
    assert read_restarts(str(tmp_path / "head")) == []  # no mark of a shared disk there


def test_a_group_that_fails_too_often_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three failures are borne by default, the fourth is not."""
    group = Group(tmp_path, monkeypatch)
    group.ends = [failed() for _ in range(4)]
    with pytest.raises(RuntimeError, match=r"head failed 4 times .*, at last: ValueError: broken"):
        group.until_done(lambda: None)
    assert len(group.restarts) == 3


def test_what_a_person_can_mend_is_raised_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(tmp_path, monkeypatch, policy=RestartPolicy(max_failures=0))
    group.ends = [End(error=ValueError("x"), raised=[UserError("no-keys", "no keys")])]
    with pytest.raises(UserError, match="no keys"):
        group.until_done(lambda: None)


def test_failures_count_from_the_last_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(tmp_path, monkeypatch, policy=RestartPolicy(max_failures=2))
    group.ends = [failed() for _ in range(5)]
    group.saved = {2: 10, 4: 20}
    group.until_done(lambda: None)
    begin, ten, twenty = "the beginning", checkpoint.name(10, "aaaa"), checkpoint.name(20, "aaaa")
    found = [one.goes_on_from for one in group.restarts]
    assert found == [begin, ten, ten, twenty, twenty]
    assert group.waited == [1, 1, 2, 1, 2]


def test_a_group_that_was_asked_to_leave_starts_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also more often than failures are borne; the same reason twice in a row is kept once."""
    group = Group(tmp_path, monkeypatch, policy=RestartPolicy(max_failures=0))
    group.ends = [End(asked=why, left=True) for why in ("room", "room", "away")]
    group.until_done(lambda: None)
    assert group.waited == [0, 0, 0]
    assert [(one.why, one.counted) for one in group.restarts] == [("room", False), ("away", False)]


def test_a_port_taken_five_times_is_no_failure_the_sixth_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(tmp_path, monkeypatch, policy=RestartPolicy(max_failures=0))
    error = FailedWorkers({0: RuntimeError("Address already in use")})
    group.ends = [End(error=error) for _ in range(6)]
    with pytest.raises(RuntimeError, match="failed 1 times"):
        group.until_done(lambda: None)
    assert group.waited == [0] * 5


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_checkpoints_are_kept_from_the_newest_whole_one_on(
    keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of step 50 is damaged, and is none of them."""
    group = Group(tmp_path, monkeypatch, policy=RestartPolicy(keep=keep))
    folder = tmp_path / "head"
    names = [save(folder, step) for step in (50, 40, 30, 20, 10)]
    (folder / names[0] / "arrays.npz").write_bytes(b"")
    assert group._choose_checkpoint() == names[1]
    assert checkpoint.names(str(folder)) == names[: 1 + keep]
    account = json.loads((folder / "checkpoint_manager_snapshot.json").read_text())
    assert account["latest_checkpoint_result"]["checkpoint_dir_name"] == names[1]


def test_two_checkpoints_are_kept_by_default() -> None:
    assert RestartPolicy().keep == 2


def test_checkpoints_that_are_gone_are_no_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is not mounted looks like a run that has not begun."""
    monkeypatch.setattr(worker, "STORE_S", -1.0)  # not waited for
    group = Group(tmp_path, monkeypatch)
    name = save(tmp_path / "head", 10)
    assert group._choose_checkpoint() == name
    group._attempt = 1
    checkpoint.delete(str(tmp_path / "head" / name))
    with pytest.raises(UserError, match="has no whole checkpoint any more"):
        group._choose_checkpoint()


def test_as_many_workers_start_as_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed_group, "_room", lambda cpus, gpu: 9)
    assert Group(tmp_path, monkeypatch, workers=(3, 3))._wait_for_room() == 3
    assert Group(tmp_path, monkeypatch, workers=(2, 5))._wait_for_room() == 5
    monkeypatch.setattr(distributed_group, "_SETTLE_S", -1.0)
    monkeypatch.setattr(distributed_group, "_room", lambda cpus, gpu: 4)
    assert Group(tmp_path, monkeypatch, workers=(2, 5))._wait_for_room() == 4
    assert Group(tmp_path, monkeypatch, workers=(4, 5))._wait_for_room() == 4


def test_a_group_grows_by_what_is_free_and_to_its_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(tmp_path, monkeypatch, workers=(1, 5))
    monkeypatch.setattr(distributed_group, "_room", lambda cpus, gpu: 3)
    grown = []
    for group._count in (1, 3, 5):
        grown.append(group._room_for_more())
    assert grown == [3, 2, 0]


class Driver:
    """What a worker posts to."""

    def __init__(self) -> None:
        self.posted: list[Any] = []

    def post(self, event: Any) -> Any:
        self.posted.append(event)


def test_a_checkpoint_is_uploaded_manifest_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write_bytes = storage.write_bytes
    folder, run = tmp_path / "local", tmp_path / "run"
    run.mkdir()
    (run / ".validate_storage_marker").write_text("")
    checkpoint.write(folder, {}, {}, identity={})
    (folder / "zeros").write_bytes(b"0")

    def noted(url: str, data: bytes) -> None:
        written.append(url.rsplit("/", 1)[1])
        write_bytes(url, data)

    monkeypatch.setattr(storage, "write_bytes", noted)
    worker._upload(folder, f"{run}/there", Driver())  # type: ignore[arg-type]
    assert sorted(written) == ["arrays.npz", "manifest.json", "zeros"]
    assert written[-1] == "manifest.json"
    assert checkpoint.read(run / "there", identity={}) == ({}, {})


def test_a_store_that_is_away_is_tried_again_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a checkpoint is deleted before the next try; waits double."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(worker, "check_shared", lambda url: None)
    folder, driver = tmp_path / "local", Driver()
    checkpoint.write(folder, {}, {}, identity={})
    tries: list[str] = []
    write_bytes = storage.write_bytes

    def full(url: str, data: bytes) -> None:
        tries.append(url)
        write_bytes(url, data)
        if len(tries) <= 3:
            raise UserError("disk-full", "the disk is full")

    monkeypatch.setattr(storage, "write_bytes", full)
    worker._upload(folder, f"{tmp_path}/there", driver)  # type: ignore[arg-type]
    assert waited == [1, 2, 4]
    assert [kind for kind, _ in driver.posted] == ["store"] * 3
    assert "the disk is full; training goes on, tried again in 2 s" in driver.posted[1][1]
    assert checkpoint.read(tmp_path / "there", identity={}) == ({}, {})


def test_a_store_that_stays_away_ends_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(worker, "STORE_S", 0.5)  # the first wait is longer
    checkpoint.write(tmp_path / "local", {}, {}, identity={})
    driver = Driver()
    monkeypatch.setattr(ray_train, "node_ip", lambda: "10.0.0.7")
    # The folder of the run has no mark of the driver's: it is another disk.
    with pytest.raises(UserError, match=r"not shared with the machine 10\.0\.0\.7") as caught:
        worker._upload(tmp_path / "local", f"{tmp_path}/run/there", driver)  # type: ignore[arg-type]
    assert driver.posted[-1] == ("error", caught.value)
    assert not (tmp_path / "run").exists()
