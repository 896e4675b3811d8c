"""What runs in each Ray Train worker: its place, its hooks, and how it saves checkpoints."""

import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train

from leafnet.core import storage
from leafnet.core.errors import DamagedParts, UserError
from leafnet.core.hardware import limit_threads
from leafnet.distributed import checkpoint, ray_train
from leafnet.distributed.heartbeat import Teller


@dataclass(frozen=True)
class Hooks:
    """What a fit tells the process around it, and asks it between two pieces."""

    doing: Callable[[str], None] = lambda what: None  # what comes next: the sign that it goes on
    long: Callable[[str], None] = lambda what: None  # the same of what may take any time
    started: Callable[[], None] = lambda: None  # the first steps are taken
    leave: Callable[[], bool] = lambda: False  # True on a worker that was asked to save and stop


class Leaving(Exception):
    """A worker was asked to leave: all of them have saved their state, and stopped."""


@dataclass(frozen=True)
class Place:
    """Which of how many workers this is."""

    rank: int
    workers: int


def even_split(count: int, place: Place) -> tuple[int, int]:
    """(start, stop) of the worker's part of `count` things; parts differ by one at the most.

    >>> [even_split(10, Place(rank, 4)) for rank in range(4)]
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    return (
        count * place.rank // place.workers,
        count * (place.rank + 1) // place.workers,
    )


# Called from a worker with (kind, value); the driver gets each in the order in which they come.
Post = Callable[[tuple[str, Any]], Any]
# What each worker does, with the job, its place among the workers, and the folder of checkpoints.
Loop = Callable[[Any, Place, Post, str], None]
STORE_S = 300.0  # one that is away or full is tried again for so long
LONGEST_WAIT_S = 60.0


class _Here:
    """What belongs to this worker's process."""

    def __init__(self, teller: Teller, folder: str) -> None:
        self.teller, self.folder = teller, folder
        self.on_their_way = 0  # checkpoints, saved here and not yet in the store


_here: _Here | None = None


def hooks() -> Hooks:
    """How the loop of this worker is followed, and when it has to leave by raising `Leaving`.

    A loop that never calls them is only watched for signs of life.
    """
    assert _here is not None, "only in a worker of `run`"
    teller = _here.teller
    return Hooks(teller.doing, teller.long, teller.started, teller.leave)


def newest_checkpoint(folder_url: str) -> str | None:
    """The URL of the checkpoint to go on from, in the folder that the loop was called with."""
    found = ray.train.get_checkpoint()
    if found is None:
        return None
    return storage.join(folder_url, found.path.rstrip("/").rsplit("/", 1)[-1])


def uploaded() -> bool:
    """True when all that was given to `keep` is in the store."""
    assert _here is not None, "only in a worker of `run`"
    return not _here.on_their_way


def keep(write: Callable[[str], None] | None, *, step: int) -> None:
    """Save a checkpoint after `step` steps; every worker calls it at the same place.

    Args:
        write: writes it into a local folder, with `checkpoint.write`; none on all workers but one.
        step: of the whole stage; of two checkpoints the one with the higher is the newer.
    """
    here, saved = _here, None
    assert here is not None, "only in a worker of `run`"
    if write is not None:
        folder = tempfile.mkdtemp(prefix="leafnet-checkpoint-")
        write(folder)
        saved = ray.train.Checkpoint.from_directory(folder)
        here.on_their_way += 1

    def upload(saved: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        _upload(Path(saved.path), storage.join(here.folder, name), here.teller)
        here.on_their_way -= 1
        # Ray Train compares filesystems, and two of the same settings are not equal.
        managed = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(
            f"{managed.experiment_fs_path}/{name}", managed.storage_filesystem
        )

    ray.train.report(
        {"step": step},
        checkpoint=saved,
        checkpoint_dir_name=checkpoint.name(step, uuid.uuid4().hex[:6]),  # that of rank 0 counts
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
        # Ray's own way is `pyarrow.fs.copy_files`, which to an fsspec filesystem loses the errors
        # of writing (pyarrow 26): a checkpoint would count that is not there.
        checkpoint_upload_fn=upload,
    )


def _upload(folder: Path, url: str, teller: Teller) -> None:
    """Copy a checkpoint to `url`, manifest last; a store that is away or full is waited for.

    Raises:
        UserError: it still was after `_STORE_S`, or refused.
    """
    deadline, wait = time.monotonic() + STORE_S, 1.0
    while True:
        try:
            check_shared(url)
            for file in sorted(folder.iterdir(), key=lambda one: one.name == checkpoint.MANIFEST):
                storage.write_bytes(storage.join(url, file.name), file.read_bytes())
            return
        except (UserError, OSError) as caught:
            error = caught
            if not isinstance(caught, UserError):
                error = UserError("store-failed", f"cannot write {url}: {caught}")
            with suppress(UserError, OSError):
                checkpoint.delete(url)  # the room of what is half written
            if not passes(error) or time.monotonic() + wait > deadline:
                ray.get(teller.post(("error", error)))
                raise error from None
            teller.post(("store", f"{error}; training goes on, tried again in {wait:g} s"))
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_S / 2)


def check_shared(url: str) -> None:
    """Refuse a local path of this machine that is not the driver's, which left its mark there."""
    above = url.rsplit("/", 1)[0]
    mark = storage.join(above, ray_train.STORAGE_MARKER)
    if storage.is_local(url) and not storage.exists(mark):
        raise UserError(
            "store-failed",
            f"cannot write {url}: {above} is away, or not shared with the machine "
            f"{ray_train.node_ip()}; give a disk that all machines share, or a URL such as s3://",
        )


def work(config: dict[str, Any]) -> None:
    """What Ray Train calls in each worker."""
    global _here
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size())
    teller = Teller(config["desk"], config["attempt"], place.rank)
    _here = _Here(teller, config["folder"])
    lost: str | None = None
    try:
        teller.doing("importing TensorFlow")
        limit_threads(_threads(), gpu=config["gpu"])
        teller.long("at work")
        config["loop"](config["job"], place, teller.post, config["folder"])
        teller.long("done, waiting for the others")
    except Leaving:
        ray.get(teller.post(("left", place.rank)))
    except (UserError, DamagedParts) as error:
        ray.get(teller.post(("error", error)))
        # Only what may pass is raised. Other workers may not have met it and wait for this one;
        # Ray Train ends them and tries again. All else fails every time.
        if passes(error):
            raise
    except Exception as error:
        traceback.print_exc()
        lost = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if lost is not None:
        # Not the error itself: one of TensorFlow's makes the controller and the driver import it,
        # which takes longer than all the rest of a restart.
        raise RuntimeError(lost)


def passes(error: Exception) -> bool:
    """True for what a store is to blame for."""
    return isinstance(error, UserError) and error.reason in storage.OF_STORES


def _threads() -> int:
    resources: dict[str, float] = ray.get_runtime_context().get_assigned_resources()
    return max(1, round(resources.get("CPU", 1)))
