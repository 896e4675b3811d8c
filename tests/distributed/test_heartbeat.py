"""When a worker is taken for one that hangs; what is done then is tested in test_faults.py."""

import os
import signal
import subprocess
import sys

import pytest

from leafnet.distributed import heartbeat
from leafnet.distributed.heartbeat import Seen, Sign

HUNG = """
import sys, threading, time
from leafnet.distributed import heartbeat
heartbeat.write_stacks_on_signal()
def stuck_in_a_sum():
    print("hangs", flush=True)
    time.sleep(100)
threading.Thread(target=stuck_in_a_sum).start()
threading.Event().wait()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_that_hangs_tells_where_before_it_is_ended(stopped: bool) -> None:
    """One that is stopped cannot, and is ended all the same."""
    with subprocess.Popen(
        [sys.executable, "-c", HUNG, "ray::hung"], stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout
        assert worker.stdout.readline() == "hangs\n"
        if stopped:
            os.kill(worker.pid, signal.SIGSTOP)
        stacks = heartbeat._kill_here(worker.pid)
        assert worker.wait(10) == -signal.SIGKILL
    assert ("in stuck_in_a_sum" in stacks) == (not stopped)
    assert stacks.count("(most recent call first)") == (0 if stopped else 2)


def test_no_other_process_is_ended() -> None:
    with subprocess.Popen(["sleep", "100"]) as other:
        assert heartbeat._kill_here(other.pid) == ""
        assert other.poll() is None
        other.kill()


def seen(rank: int, *, idle_s: float = 0.0, age_s: float = 0.5, **more: object) -> Seen:
    values = {
        "rank": rank,
        "pid": 100 + rank,
        "node_id": "a",
        "node_ip": "10.0.0.1",
        "doing": "training, epoch 2, step 17 to 20",
        "idle_s": idle_s,
        "watched": True,
        "started": True,
        "longest_start_s": 8.0,
        "longest_s": 1.0,
        "asked": None,
        **more,
    }
    return Seen(Sign(**values), age_s)  # type: ignore[arg-type]


def why(*signs: Seen, timeout: float = 10.0) -> list[str]:
    return [one.why for one in heartbeat.stuck(signs, hang_timeout_s=timeout)]


def test_all_is_well() -> None:
    assert why(seen(0, idle_s=9), seen(1, idle_s=3)) == []
    assert why() == []


def test_the_silent_one_is_ended_and_not_the_one_that_waits_for_it() -> None:
    told = why(seen(0, idle_s=16), seen(1, age_s=11))
    assert told == [
        "worker 1 (process 101 on 10.0.0.1) gave no sign of life for 11 s, last: training, "
        "epoch 2, step 17 to 20"
    ]


def test_one_that_gets_nowhere() -> None:
    assert why(seen(0, idle_s=14)) == []
    assert (
        "worker 0 (process 100 on 10.0.0.1) got nowhere for 16 s: training"
        in why(seen(0, idle_s=16))[0]
    )


def test_the_limit_is_never_shorter_than_a_start_nor_three_steps() -> None:
    assert why(seen(0, age_s=19, longest_start_s=20.0)) == []
    assert len(why(seen(0, age_s=21, longest_start_s=20.0))) == 1
    assert why(seen(0, idle_s=59, longest_s=20.0)) == []
    assert len(why(seen(0, idle_s=66, longest_s=20.0))) == 1


def test_a_start_may_take_long_and_what_is_not_watched_any_time() -> None:
    assert why(seen(0, idle_s=290, started=False)) == []
    assert len(why(seen(0, idle_s=310, started=False))) == 1
    assert why(seen(0, idle_s=1e6, watched=False)) == []
    assert len(why(seen(0, age_s=11, watched=False))) == 1


def test_one_that_fell_silent_before_it_told_that_it_has_started() -> None:
    told = why(seen(0, age_s=11, started=False), seen(1, idle_s=10.5))
    assert [line[:8] for line in told] == ["worker 0"]


def test_the_first_step_on_a_gpu_may_compile_kernels() -> None:
    sign = Sign(0, 1, "n", "ip", "step 1", 1000.0, True, False, 0.0, 0.0, None)
    seen = [Seen(sign, 1.0)]
    assert [one.sign for one in heartbeat.stuck(seen, hang_timeout_s=60)] == [sign]
    assert heartbeat.stuck(seen, hang_timeout_s=60, gpu=True) == []
    later = [Seen(sign._replace(started=True), 1.0)]
    assert len(heartbeat.stuck(later, hang_timeout_s=60, gpu=True)) == 1
