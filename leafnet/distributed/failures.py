"""Why an attempt of the workers ended, in one line, and what is kept of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import ray
import ray.exceptions
import ray.train

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.distributed import heartbeat, ray_train
from leafnet.distributed.heartbeat import Seen, Sign

RESTARTS = "restarts.json"
_PORT_TAKEN = ("Could not start gRPC server", "Address already in use")
_SNIPPET = 300  # characters of an error in a line


@dataclass
class Restart:
    """Why and how a group of workers was started again."""

    at: str  # UTC
    why: str
    counted: bool  # False: planned, such as on a notice that a machine is taken away
    workers: int  # of the group that ended
    goes_on_from: str  # name of the checkpoint, or "the beginning"
    seconds: float | None = None  # until steps were taken again
    start_seconds: float | None = None  # of these, Ray Train's and TensorFlow's start


@dataclass
class End:
    """How an attempt ended; all of it empty: as it should."""

    error: BaseException | None = None
    asked: str | None = None  # why the workers were asked to leave, if they were
    left: bool = False  # they saved and left
    killed: list[heartbeat.Stuck] = field(default_factory=list)
    raised: list[Exception] = field(default_factory=list)  # by workers, for a person
    signs: list[Sign] = field(default_factory=list)
    silent: list[Seen] = field(default_factory=list)  # gave no sign of life when others failed


def read_restarts(folder: str) -> list[Restart]:
    """The restarts of a stage of a run, whose checkpoints are in `folder`."""
    try:
        return [Restart(**one) for one in storage.read_json(storage.join(folder, RESTARTS))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (UserError, TypeError):  # half written, by a machine that died
        return []


def reason_of(end: End) -> str:
    """Why an attempt ended, in one line."""
    if end.left or end.asked:
        return f"{end.asked}" + ("" if end.left else ", and the state could not be saved in time")
    if end.killed:
        return "; ".join(one.why for one in end.killed)
    if end.raised:
        return f"a worker met: {end.raised[-1]}"
    doing = {sign.rank: f"{sign}, {sign.doing}" for sign in end.signs}
    failures: Mapping[int, Exception] = getattr(end.error, "worker_failures", {})
    if not failures:
        died = "Ray Train's controller: " * isinstance(end.error, ray.exceptions.RayActorError)
        return died + _short(controller_failure(end.error) or end.error)
    # Those that died before those that only lost them.
    told = {rank: error for rank, error in failures.items() if _died(error)}
    if not told and end.silent:
        return "; ".join(
            f"{sign} gave no sign of life for {age_s:.0f} s, last: {sign.doing}"
            for sign, age_s in end.silent
        )
    told = told or dict(failures)
    return "; ".join(
        f"{doing.get(rank, f'worker {rank}')}: {_short(error)}" for rank, error in told.items()
    )


def _died(error: Exception) -> bool:
    inner = getattr(error, "health_check_failure", error)
    return isinstance(inner, ray.exceptions.RayActorError)


def _short(error: BaseException | None) -> str:
    """One line of an error; of Ray's long ones, the part that differs."""
    error = getattr(error, "health_check_failure", error)
    text = " ".join(str(error).split())
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        return _short(error.cause)
    if isinstance(error, ray_train.NoRoom):
        return f"there is no room for {error.num_workers} workers yet"
    if isinstance(error, ray_train.DiedAtStart):
        return "a worker died while it started"
    if isinstance(error, ray.exceptions.RayActorError):
        detail = re.search(r"Worker exit detail: (.*?)(?: There are some| Some common|$)", text)
        if detail:
            return f"its process died ({detail[1].rstrip('. ')[:_SNIPPET]})"
        gone = re.search(r"(?:because )?((?:its|the) node [^.]*)", text, re.IGNORECASE)
        return gone[1] if gone else text[:_SNIPPET]
    if type(error) is RuntimeError:  # as `_work` puts it
        return text[:_SNIPPET]
    return f"{type(error).__name__}: {text[:_SNIPPET]}"


def controller_failure(error: BaseException | None) -> BaseException | None:
    found: BaseException | None = getattr(error, "controller_failure", None)
    return found


def is_no_failure(error: BaseException | None) -> bool:
    """True where the group only waits for room, or its machine was taken away."""
    waits = isinstance(controller_failure(error), ray_train.NoRoom)
    return waits or isinstance(error, ray.train.PreemptionError)


def port_was_taken(error: BaseException | None) -> bool:
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    return any(text in str(one) for one in failures.values() for text in _PORT_TAKEN)
