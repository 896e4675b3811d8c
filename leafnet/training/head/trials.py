"""Fits of the head with given settings, each in a process of its own."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.tune
from numpy.typing import NDArray

from leafnet.core import hardware, interrupts, storage, terminal
from leafnet.core.errors import DamagedParts, UserError
from leafnet.distributed import checkpoint, heartbeat
from leafnet.distributed.resources import Node
from leafnet.distributed.worker import Place
from leafnet.features import moments
from leafnet.features.cache import SplitFeatures
from leafnet.features.moments import BLOCK
from leafnet.metrics import scores as metrics_scores
from leafnet.metrics.scores import empty_tally, tally
from leafnet.models.classifier import fold_standardisation, head_logits
from leafnet.training import loop
from leafnet.training.head import fit as head_fit
from leafnet.training.head import worker
from leafnet.training.head.fit import TrainingData, fit_head
from leafnet.training.head.state import TrainState
from leafnet.training.head.worker import HeadJob, LocalFeatures
from leafnet.training.settings import HeadSettings

# A trial that is worse than the better half at a quarter or half of its epochs is stopped there.
_RUNGS = (0.25, 0.5)
DIVERGED = 1e9  # finite, because the scheduler takes percentiles
# More processes at once gain nothing on one memory bus, and each holds TensorFlow.
_MAX_PROCESSES = 16


class Fit(NamedTuple):
    """A head fit: on train and scored on valid, or on all of both but a fold and scored on it."""

    head: HeadSettings
    held_out: NDArray[np.bool_] | None  # [N] over train and valid


def run_trials(
    job: HeadJob,
    fits: Mapping[int, Fit],
    keep: Callable[[int, Mapping[str, Any]], None],
    *,
    title: str,
    unit: str,
    nodes: list[Node],
    run: str,
    stop_early: bool,
) -> None:
    """Do `fits`, calling `keep` with the number and the result of each that ends."""
    if not fits:
        return
    board = heartbeat.Board()
    errors: list[Exception] = []
    total = sum(int(node.cpus) for node in nodes)
    processes = min(len(fits), max(1, total), _MAX_PROCESSES)
    # A whole number of threads, unless the cluster has less than one CPU.
    cpus = max(1, total // processes) if total else max(node.cpus for node in nodes)
    # Tune's own answer to Ctrl-C ends the search as if it were done, and it is kept after that: the
    # best trial so far was published, and a later Ctrl-C was lost.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    with terminal.progress(title, len(fits), unit=unit) as advance:

        class Keep(ray.tune.Callback):
            def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
                interrupts.raise_if_asked()

            def on_trial_complete(
                self, iteration: int, trials: list[Any], trial: Any, **info: Any
            ) -> None:
                keep(trial.config["number"], trial.last_result)
                advance(1)

        tuner = ray.tune.Tuner(
            ray.tune.with_resources(
                ray.tune.with_parameters(
                    _fit, job=job, fits=dict(fits), threads=max(1, int(cpus)), board=board.handle
                ),
                {"CPU": cpus},
            ),
            param_space={"number": ray.tune.grid_search(list(fits))},
            tune_config=ray.tune.TuneConfig(
                metric="valid_loss",
                mode="min",
                scheduler=_stops_early(job.head.epochs) if stop_early else None,
                max_concurrent_trials=processes,
                reuse_actors=True,
            ),
            run_config=ray.tune.RunConfig(
                name=title,
                storage_path=run,
                callbacks=[Keep()],
                failure_config=ray.tune.FailureConfig(fail_fast=True),
                verbose=0,
            ),
        )
        with board.follow(errors.append):
            results = tuner.fit()
    # What Tune keeps of a trial is in our own table; its folder would only confuse.
    folder = storage.join(run, title)
    storage.delete_folder(folder, mark=storage.join(folder, "tuner.pkl"))
    if errors:
        raise errors[0]
    if results.errors:
        raise results.errors[0]


def _stops_early(epochs: int) -> ray.tune.schedulers.ASHAScheduler:
    return ray.tune.schedulers.ASHAScheduler(
        time_attr="epoch",
        grace_period=max(1, round(epochs * _RUNGS[0])),
        max_t=epochs + 1,
        reduction_factor=round(_RUNGS[1] / _RUNGS[0]),
    )


def _fit(
    config: dict[str, Any], *, job: HeadJob, fits: dict[int, Fit], threads: int, board: Any
) -> None:
    """One fit, in a process that does many."""
    number = int(config["number"])
    try:
        hardware.limit_threads(threads, gpu=False)
        local = worker.local_features(job)
        fit = fits[number]
        if fit.held_out is None:
            _fit_trial(job, fit.head, local, report_early=number > 0)
        else:
            _fit_fold(job, fit.head, local, fit.held_out)
    except (UserError, DamagedParts) as error:
        ray.get(board.post.remote(error))
        raise


def _fit_trial(
    job: HeadJob, head: HeadSettings, local: LocalFeatures, *, report_early: bool
) -> None:
    """Fit on train; the lowest validation loss is the result.

    Args:
        job: for all but the head settings.
        head: the settings.
        local: the features.
        report_early: tell the scheduler how it goes, so that it can stop the fit. The given
            settings are never stopped, so what is chosen is not worse than they are.
    """
    rungs = {max(1, round(head.epochs * rung)) for rung in _RUNGS} if report_early else set()
    began = time.monotonic()
    best: dict[str, Any] = {"best_epoch": 0, "valid_loss": DIVERGED, "valid_accuracy": 0.0}

    def result(epoch: float, *, whole: bool) -> dict[str, Any]:
        seconds = round(time.monotonic() - began, 2)
        return {"epoch": int(epoch), "whole": whole, "seconds": seconds, **best}

    def report(row: dict[str, float]) -> None:
        if row["valid_loss"] < best["valid_loss"]:
            best.update(
                best_epoch=int(row["epoch"]),
                valid_loss=row["valid_loss"],
                valid_accuracy=row["valid_accuracy"],
            )
        if row["epoch"] in rungs:
            ray.tune.report(result(row["epoch"], whole=False))

    train = local.splits["train"]
    data = TrainingData(
        head_fit.cached_views(train.features, seed=job.seed),
        train.labels,
        local.splits["valid"],
        local.mean,
        local.deviation,
    )
    epoch = 0.0
    try:
        epoch = _fit_alone(job, head, data, report).epoch
    except UserError as error:
        if error.reason != "loss-not-finite":
            raise
        best["valid_loss"] = DIVERGED
    ray.tune.report(result(epoch, whole=True))


def _fit_fold(
    job: HeadJob, head: HeadSettings, local: LocalFeatures, held_out: NDArray[np.bool_]
) -> None:
    """Fit on all but the fold `held_out` [N] and score it."""
    began = time.monotonic()
    train, valid = local.splits["train"], local.splits["valid"]
    data = fold_data(train, valid, held_out, seed=job.seed)
    state = _fit_alone(job, head, data, lambda row: None)
    first_valid = train.labels.size
    folded = fold_standardisation(state.head, mean=data.mean, deviation=data.deviation)
    total = empty_tally(len(job.class_names))
    for split, chosen in (
        (train, np.flatnonzero(held_out[:first_valid])),
        (valid, np.flatnonzero(held_out[first_valid:])),
    ):
        for start in range(0, chosen.size, BLOCK):
            some = chosen[start : start + BLOCK]
            total += tally(head_logits(folded, split.features[some, 0]), split.labels[some])
    scores = metrics_scores.scores(total, job.class_names)
    kept = ("examples", "accuracy", "macro_f1", "log_loss", "confusion")
    ray.tune.report(
        {
            "epoch": state.epoch,
            "valid_loss": scores["log_loss"],
            "scores": {name: scores[name] for name in kept},
            "seconds": round(time.monotonic() - began, 2),
        }
    )


def fold_data(
    train: SplitFeatures, valid: SplitFeatures, held_out: NDArray[np.bool_], *, seed: int
) -> TrainingData:
    """What a head learns from when the examples `held_out` [N] of train and valid are left out.

    Mean and deviation too are of the rest only. Nothing is held back to choose an epoch on.
    """
    first_valid = train.labels.size
    assert held_out.size == first_valid + valid.labels.size, "folds are of another data set"
    rows = np.flatnonzero(~held_out)
    sums = [moments.moments(train.features, rows[rows < first_valid])]
    if (rows >= first_valid).any():
        sums.append(moments.moments(valid.features, rows[rows >= first_valid] - first_valid))
    mean, deviation = moments.statistics(*sums)
    of_train = head_fit.cached_views(train.features, seed=seed)

    def gather(indices: NDArray[np.int64], epoch: int) -> NDArray[np.floating]:
        wanted = rows[indices]
        out = np.empty((wanted.size, mean.size), np.float16)
        in_train = wanted < first_valid
        out[in_train] = of_train(wanted[in_train], epoch)
        out[~in_train] = valid.features[wanted[~in_train] - first_valid, 0]
        return out

    labels = np.concatenate([train.labels, valid.labels])[rows]
    none = SplitFeatures(valid.features[:0], valid.labels[:0])
    return TrainingData(gather, labels, none, mean, deviation)


def _fit_alone(
    job: HeadJob, head: HeadSettings, data: TrainingData, report: loop.Report
) -> TrainState:
    return fit_head(
        data,
        settings=head,
        num_classes=len(job.class_names),
        seed=job.seed,
        place=Place(0, 1),
        report=report,
    )


def stored(url: str, job: HeadJob) -> dict[int, dict[str, Any]]:
    """What an earlier start of the run finished, by number."""
    try:
        document = storage.read_json(url)
    except FileNotFoundError:
        return {}
    checkpoint.compare_identity(document["identity"], job.identity, where=url)
    return {i: row for i, row in enumerate(document["rows"]) if row is not None}


def store(url: str, job: HeadJob, done: Mapping[int, Mapping[str, Any]], **more: Any) -> None:
    rows = [done.get(i) for i in range(max(done) + 1)]
    storage.write_json(url, {**more, "rows": rows, "identity": job.identity})
