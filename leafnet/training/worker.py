"""What the Ray Train workers of the head and of fine-tuning have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from leafnet.distributed import group, worker
from leafnet.distributed.failures import Restart
from leafnet.distributed.group import RestartPolicy
from leafnet.distributed.worker import Loop
from leafnet.training.loop import Saving, State


@dataclass(frozen=True)
class Placement:
    """The workers of a fit, and where its checkpoints go."""

    count: int | tuple[int, int]  # how many, or the fewest and the most
    cpus_per_worker: float  # that Ray sets aside for each; also its threads
    gpu: bool  # a GPU for each
    storage_path: str  # folder or URL of the run
    policy: RestartPolicy | None = None  # when they are started again; none: the defaults


class Job(Protocol):
    """What a worker has to know to save checkpoints."""

    @property
    def save_every_s(self) -> float:
        """Seconds between two of them."""

    @property
    def save_every_steps(self) -> int | None:
        """Steps between two of them."""


def run(
    loop: Loop,
    job: Any,
    placement: Placement,
    *,
    name: str,
    on_epoch: Callable[[dict[str, float]], None],
    on_event: Callable[[tuple[str, Any]], None],
    on_restart: Callable[[], None] = lambda: None,
) -> tuple[Any, list[Restart]]:
    """Fit with Ray Train, from the newest checkpoint below the run if there is one.

    Args:
        loop: what each worker does with `job`.
        job: what to fit.
        placement: of the workers.
        name: of the folder of checkpoints.
        on_epoch: called with each row of the history, once.
        on_event: called with what the workers post beside rows (`epoch`) and their `result`.
        on_restart: called before the workers start again.

    Returns:
        The result that the last workers posted, and why they were started again on the way.

    Raises:
        UserError: the loss is not finite, or a checkpoint belongs to other settings.
        DamagedParts: the cache has to be repaired first.
        RuntimeError: the workers failed too often.
    """
    results: list[Any] = []
    on_row = each_once(on_epoch)

    def receive(event: tuple[str, Any]) -> None:
        kind, value = event
        if kind == "epoch":
            on_row(value)
        elif kind == "result":
            results.append(value)
        else:
            on_event(event)

    def restart() -> None:
        results.clear()
        on_restart()

    restarts = group.run(
        loop,
        job,
        name=name,
        workers=placement.count,
        cpus_per_worker=placement.cpus_per_worker,
        gpu=placement.gpu,
        storage_path=placement.storage_path,
        on_event=receive,
        on_restart=restart,
        policy=placement.policy,
    )
    return results[-1], restarts


def saving(job: Job, write: Callable[[str, State], None]) -> Saving[State]:
    """When a worker saves, and how: `write` puts a state into a local folder."""

    def save(state: State | None) -> None:
        if state is None:
            worker.keep(None, step=0)
        else:
            worker.keep(lambda folder: write(folder, state), step=state.step)

    return Saving(save, job.save_every_s, job.save_every_steps, worker.uploaded)


def resumed(folder_url: str, load: Callable[[str], State]) -> State | None:
    """The state to go on from, that `load` reads; None: there is none."""
    url = worker.newest_checkpoint(folder_url)
    return None if url is None else load(url)


def each_once(on_epoch: Callable[[dict[str, float]], None]) -> Callable[[dict[str, float]], None]:
    """`on_epoch` for rows of a history of which some come twice, after a restart."""
    told = 0.0

    def on_row(row: dict[str, float]) -> None:
        nonlocal told
        if row["epoch"] > told:
            told = row["epoch"]
            on_epoch(row)

    return on_row
