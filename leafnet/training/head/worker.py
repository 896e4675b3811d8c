"""Fitting the head on Ray Train: the features on each node, checkpoints, and what comes back."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from leafnet.core import scratch
from leafnet.core.scratch import Shared
from leafnet.data.shards import SPLITS
from leafnet.distributed import worker
from leafnet.distributed.failures import Restart
from leafnet.distributed.worker import Place, Post
from leafnet.features import cache, moments
from leafnet.features.cache import Part, SplitFeatures
from leafnet.features.moments import BLOCK
from leafnet.metrics import calibration, thresholds
from leafnet.metrics import novelty as metrics_novelty
from leafnet.metrics.novelty import Novelty
from leafnet.metrics.scores import Tally, empty_tally, tally
from leafnet.metrics.thresholds import Outcomes
from leafnet.models import classifier
from leafnet.models.classifier import Head, fold_standardisation, head_logits
from leafnet.models.weights import FEATURES
from leafnet.training import worker as training_worker
from leafnet.training.head import fit as head_fit
from leafnet.training.head import state as head_state
from leafnet.training.head.state import TrainState, load
from leafnet.training.settings import HeadSettings
from leafnet.training.worker import Placement

_FOLDER = "head"  # Ray Train's folder in that of the run


@dataclass(frozen=True)
class HeadJob:
    """All that a worker has to know to fit the head."""

    head: HeadSettings
    class_names: tuple[str, ...]
    seed: int
    save_every_s: float
    identity: dict[str, Any]  # what a checkpoint must agree with
    cache_root: str  # CACHE/KEY
    parts: dict[str, tuple[Part, ...]]  # of each split
    views: int  # of the training split in the cache
    save_every_steps: int | None = None


class Answers(NamedTuple):
    """What the head says of every example of a split, in their order."""

    logits: NDArray[np.float32]  # [N, C]
    labels: NDArray[np.int32]  # [N]


@dataclass
class HeadResult:
    """What the workers made."""

    state: TrainState
    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]
    tallies: dict[str, Tally]  # every example of every split once, by the best head
    novelty: Novelty
    outcomes: dict[str, Outcomes]  # of each example of valid and test, in order, by the best head
    # What the best head's logits are divided by; all that is counted here is divided already.
    temperature: float
    answers: dict[str, Answers]  # of valid and test
    restarts: list[Restart] = field(default_factory=list)


def fit_head(
    job: HeadJob, placement: Placement, *, on_epoch: Callable[[dict[str, float]], None]
) -> HeadResult:
    """Fit the head with Ray Train, see `training.worker.run`.

    Args:
        job: what to fit.
        placement: of the workers.
        on_epoch: called with each row of the history, once.
    """
    tallies: list[dict[str, Tally]] = []

    def on_event(event: tuple[str, Any]) -> None:
        tallies.append(event[1])

    if not isinstance(placement.count, int):
        fewest, most = placement.count
        # Shared out, a row each at the least.
        placement = replace(placement, count=(fewest, min(most, job.head.batch_size)))
    result, restarts = training_worker.run(
        fit_and_evaluate,
        job,
        placement,
        name=_FOLDER,
        on_epoch=on_epoch,
        on_event=on_event,
        on_restart=tallies.clear,
    )
    fitted: HeadResult = result
    fitted.restarts = restarts
    for split in SPLITS:
        of_workers = (of_worker[split] for of_worker in tallies)
        fitted.tallies[split] = sum(of_workers, empty_tally(len(job.class_names)))
    return fitted


def fit_and_evaluate(job: HeadJob, place: Place, post: Post, folder_url: str) -> None:
    """What each worker does: fit the head together, then evaluate a part of every split.

    Args:
        job: what to fit.
        place: of this worker.
        post: to the driver.
        folder_url: of the checkpoints.
    """
    hooks = worker.hooks()
    hooks.long("reading the features")
    local = local_features(job)
    splits, mean, deviation = local.splits, local.mean, local.deviation
    train = splits["train"]
    gather = head_fit.cached_views(train.features, seed=job.seed)

    def report(row: dict[str, float]) -> None:
        if place.rank == 0:
            post(("epoch", row))

    def write(folder: str, state: TrainState) -> None:
        head_state.save(folder, state, identity=job.identity)

    state = head_fit.fit_head(
        head_fit.TrainingData(gather, train.labels, splits["valid"], mean, deviation),
        settings=job.head,
        num_classes=len(job.class_names),
        seed=job.seed,
        place=place,
        report=report,
        saving=training_worker.saving(job, write),
        hooks=hooks,
        state=training_worker.resumed(folder_url, lambda url: load(url, identity=job.identity)),
    )
    hooks.long("evaluating")
    head = fold_standardisation(state.best_head, mean=mean, deviation=deviation)
    temperature, head = calibrated(head, splits["valid"])
    tallies = {
        split: tally_part(of_split, head, place, len(job.class_names))
        for split, of_split in splits.items()
    }
    ray.get(post(("tallies", tallies)))
    if place.rank == 0:
        result = HeadResult(state, mean, deviation, {}, **judged(splits, head, temperature))
        ray.get(post(("result", result)))
    local.shared.release()


def tally_part(split: SplitFeatures, head: Head, place: Place, num_classes: int) -> Tally:
    """The counts of the worker's part of `split`, view 0, by `head` on raw features."""
    total = empty_tally(num_classes)
    start, stop = worker.even_split(split.labels.size, place)
    for at in range(start, stop, BLOCK):
        rows = slice(at, min(at + BLOCK, stop))
        total += tally(head_logits(head, split.features[rows, 0]), split.labels[rows])
    return total


def calibrated(head: Head, valid: SplitFeatures) -> tuple[float, Head]:
    """The temperature of `head`, on raw features, and the head it is folded into.

    Every worker finds the same. It is 1 where there is no validation split.
    """
    if not valid.labels.size:
        return 1.0, head
    temperature = calibration.fit_temperature(_logits(valid, head), valid.labels)
    return temperature, classifier.fold_temperature(head, temperature)


def judged(splits: dict[str, SplitFeatures], head: Head, temperature: float) -> dict[str, Any]:
    """What one process says of `head`, its temperature folded: fields of `HeadResult`."""
    distance = metrics_novelty.fit(splits["train"].features[:, 0])
    return {
        "novelty": distance,
        "outcomes": outcomes_of(splits, head, distance),
        "temperature": temperature,
        "answers": answers_of(splits, head),
    }


def answers_of(splits: dict[str, SplitFeatures], head: Head) -> dict[str, Answers]:
    """Logits and labels of valid and test, where they have some."""
    return {
        split: Answers(_logits(splits[split], head), splits[split].labels)
        for split in ("valid", "test")
        if splits[split].labels.size
    }


def outcomes_of(
    splits: dict[str, SplitFeatures], head: Head, distance: Novelty
) -> dict[str, Outcomes]:
    """What `head` makes of each example of valid and test, where they have some."""
    return {
        split: _outcomes(splits[split], head, distance)
        for split in ("valid", "test")
        if splits[split].labels.size
    }


def _outcomes(split: SplitFeatures, head: Head, distance: Novelty) -> Outcomes:
    parts = []
    for at in range(0, split.labels.size, BLOCK):
        rows = slice(at, at + BLOCK)
        vectors = np.asarray(split.features[rows, 0], np.float32)
        logits = head_logits(head, vectors)
        parts.append(thresholds.outcomes(logits, split.labels[rows], distance.distance(vectors)))
    return Outcomes(*map(np.concatenate, zip(*parts, strict=True)))


def _logits(split: SplitFeatures, head: Head) -> NDArray[np.float32]:
    """Logits [N, C] of the plain views, a block at a time: the features may exceed memory."""
    starts = range(0, split.labels.size, BLOCK)
    return np.concatenate([head_logits(head, split.features[at : at + BLOCK, 0]) for at in starts])


class LocalFeatures(NamedTuple):
    """Every split's features, memory-mapped from a folder on this node's disk."""

    shared: Shared  # to be released once the features are not needed any more
    splits: dict[str, SplitFeatures]
    mean: NDArray[np.float32]  # [D] of the training features
    deviation: NDArray[np.float32]  # [D]


def local_features(job: HeadJob) -> LocalFeatures:
    """The features that `job` names; all processes of a node share one copy.

    Raises:
        DamagedParts: the cache has to be repaired first.
    """

    def fill(folder: Path) -> None:
        for split in SPLITS:
            views = job.views if split == "train" else 1
            place = str(folder / f"{split}.npy")
            found = cache.assemble(job.cache_root, job.parts[split], views, path=place)
            np.save(folder / f"{split}.labels.npy", found.labels)
            if split == "train":
                statistics = moments.statistics(moments.moments(found.features))
                np.save(folder / "statistics.npy", np.stack(statistics))

    names = [part.name for split in SPLITS for part in job.parts[split]]
    content = json.dumps([job.cache_root, job.views, names])
    shared = scratch.share(hashlib.sha256(content.encode()).hexdigest()[:16], fill)
    splits = {}
    for split in SPLITS:
        labels = np.load(shared.path / f"{split}.labels.npy")
        features = np.zeros((0, 1, FEATURES), np.float16)
        if labels.size:
            features = np.load(shared.path / f"{split}.npy", mmap_mode="r")
        splits[split] = SplitFeatures(features, labels)
    mean, deviation = np.load(shared.path / "statistics.npy")
    return LocalFeatures(shared, splits, mean, deviation)
