"""When a worker is taken for one that hangs; what is done then is tested in test_faults.py."""

from leafnet.distributed import heartbeat
from leafnet.distributed.heartbeat import Seen, Sign


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
