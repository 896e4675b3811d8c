"""Fine-tuning on Ray Train: the photographs on each node, checkpoints, and what comes back."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
import ray.exceptions
from numpy.typing import NDArray

from leafnet.core.errors import DamagedParts
from leafnet.data.shards import ShardIndex
from leafnet.distributed import worker as distributed_worker
from leafnet.distributed.failures import Restart
from leafnet.distributed.worker import Place, Post
from leafnet.models.classifier import Head
from leafnet.models.weights import Weights, fingerprint
from leafnet.training import worker as training_worker
from leafnet.training.finetune import fit, pixels
from leafnet.training.finetune import state as finetune_state
from leafnet.training.finetune.state import Convolutions, TuneState, initial_arrays, load
from leafnet.training.finetune.tuner import TuningData
from leafnet.training.head import worker as head_worker
from leafnet.training.head.worker import HeadJob
from leafnet.training.settings import FineTuneSettings
from leafnet.training.worker import Placement

_FOLDER = "fine_tune"  # Ray Train's folder in that of the run
_POST_S = 0.5  # between two reports of progress


class Probe(NamedTuple):
    """The head that was fitted on frozen features, and what standardised them."""

    head: Head
    mean: NDArray[Any]  # [D]
    deviation: NDArray[Any]  # [D]


@dataclass(frozen=True)
class TuneJob:
    """All that a worker has to know to fine-tune."""

    settings: FineTuneSettings
    class_names: tuple[str, ...]
    class_weights: str
    seed: int
    save_every_s: float
    identity: dict[str, Any]  # what a checkpoint must agree with
    index: ShardIndex
    weights: Any  # reference to `backbone.Weights.convolutions`
    probe: Any  # reference to a Probe
    precision: str
    image_size: int
    threads: int  # of each worker, to decode
    save_every_steps: int | None = None


class Tuned(NamedTuple):
    """What fine-tuning came to."""

    convolutions: Convolutions  # of the trained stages, by the best epoch
    head: Head  # on standardised features
    epoch: int
    best_epoch: int  # 0: none was better on validation than the head alone
    head_alone: dict[str, float]
    history: list[dict[str, float]]


def fine_tune(
    job: TuneJob,
    placement: Placement,
    *,
    on_epoch: Callable[[dict[str, float]], None],
    on_images: Callable[[int], None],
) -> tuple[Tuned, list[Restart]]:
    """Fine-tune with Ray Train, see `training.worker.run`.

    Args:
        job: what to train.
        placement: of the workers.
        on_epoch: called with each row of the history.
        on_images: called with counts of images as they are trained on, each image of an epoch once.

    Returns:
        What it came to, and why the workers were started again on the way.
    """
    images = 0

    def on_event(event: tuple[str, Any]) -> None:
        nonlocal images
        _, count = event
        if count > images:  # after a restart some come again
            on_images(count - images)
            images = count

    tuned, restarts = training_worker.run(
        _fine_tune, job, placement, name=_FOLDER, on_epoch=on_epoch, on_event=on_event
    )
    return tuned, restarts


def _fine_tune(job: TuneJob, place: Place, post: Post, folder_url: str) -> None:
    hooks = distributed_worker.hooks()
    hooks.long("reading the photographs")
    weights: Convolutions = ray.get(job.weights)
    probe: Probe = ray.get(job.probe)
    train, valid = (
        pixels.open_split(
            job.index.root,
            job.index.of_split(split),
            image_size=job.image_size,
            threads=job.threads,
            max_local=job.settings.local_gb * 1e9,
            cache=job.index.cache,
        )
        for split in ("train", "valid")
    )
    advance = _Progress(post if place.rank == 0 else None)

    def report(row: dict[str, float]) -> None:
        advance.flush()
        if place.rank == 0:
            post(("epoch", row))

    def write(folder: str, state: TuneState) -> None:
        finetune_state.save(folder, state, identity=job.identity)

    def read(url: str) -> TuneState:
        return load(
            url, initial_arrays(weights, probe.head, job.settings.blocks), identity=job.identity
        )

    state = fit.fine_tune(
        TuningData(train, valid, probe.mean, probe.deviation),
        weights=weights,
        head=probe.head,
        settings=job.settings,
        class_weights=job.class_weights,
        precision=job.precision,
        image_size=job.image_size,
        num_classes=len(job.class_names),
        seed=job.seed,
        place=place,
        report=report,
        advance=advance,
        saving=training_worker.saving(job, write),
        hooks=hooks,
        state=training_worker.resumed(folder_url, read),
    )
    if place.rank == 0:
        tuned = Tuned(
            finetune_state.convolutions(state.best),
            finetune_state.head(state.best),
            state.epoch,
            state.best_epoch,
            state.head_alone,
            state.history,
        )
        ray.get(post(("result", tuned)))
    for split in (train, valid):
        if split.shared:
            split.shared.release()


class _Progress:
    """The count of images of the whole stage to the driver, now and then."""

    def __init__(self, post: Post | None) -> None:
        self._post, self._images, self._last = post, 0, 0.0

    def __call__(self, count: int) -> None:
        self._images += count
        if time.monotonic() - self._last >= _POST_S:
            self.flush()

    def flush(self) -> None:
        if self._post:
            self._post(("images", self._images))
        self._last = time.monotonic()


def merged(weights: Weights, tuned: Tuned) -> Weights:
    """The whole network with the stages that were trained."""
    convolutions = weights.convolutions | tuned.convolutions
    return Weights(convolutions, fingerprint(convolutions), weights.source)


class Judged(NamedTuple):
    """A head with its temperature, and how it does on every example."""

    head: Head  # on raw features
    changes: dict[str, Any]  # the fields of `HeadResult` that another network changes


def judge(job: HeadJob, head: Head) -> Judged:
    """Judge `head`, on raw features, by the plain views of the cached features that `job` names.

    One task on one node, which reads the features alone.

    Raises:
        DamagedParts: the cache has to be repaired first.
    """
    try:
        judged: Judged = ray.get(ray.remote(num_cpus=0.5)(_judge).remote(job, head))
        return judged
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DamagedParts):
            raise error.cause from None
        raise


def _judge(job: HeadJob, head: Head) -> Judged:
    local = head_worker.local_features(job)
    temperature, head = head_worker.calibrated(head, local.splits["valid"])
    tallies = {
        split: head_worker.tally_part(of_split, head, Place(0, 1), len(job.class_names))
        for split, of_split in local.splits.items()
    }
    changes = {"tallies": tallies, **head_worker.judged(local.splits, head, temperature)}
    local.shared.release()
    return Judged(head, changes)
