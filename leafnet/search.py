"""More head fits on the cached features: a search over settings, and cross-validation.

Both are lists of fits that do not depend on each other, run by Ray Tune. A process of its own for
each would spend more time on starting TensorFlow than on fitting, so processes are used again, and
all of a node's map the same features.
"""

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.tune
from numpy.typing import NDArray

from leafnet import (
    backbone,
    checkpoint,
    cluster,
    features,
    fitting,
    metrics,
    prepare,
    shards,
    storage,
    terminal,
    training,
)
from leafnet.classifier import fold_standardisation, head_logits
from leafnet.cluster import Node
from leafnet.config import HeadSettings
from leafnet.errors import UserError
from leafnet.features import BLOCK, SplitFeatures
from leafnet.fitting import HeadJob, LocalFeatures
from leafnet.shards import ShardIndex
from leafnet.terminal import say
from leafnet.training import Place, TrainingData

SEARCH, CROSS_VALIDATION = "search.json", "cross_validation.json"

# What the search draws from. Widths and rates on a logarithmic scale: a doubling matters as much
# at one end as at the other. AdamW's decay is multiplied by the rate, so below 1e-3 it does little.
WIDTHS = (128, 256, 512, 1024)
LEARNING_RATE = (1e-4, 1e-2)
WEIGHT_DECAY = (1e-4, 1.0)
DROPOUT = (0.0, 0.6)
LABEL_SMOOTHING = (0.0, 0.05, 0.1, 0.2)
SEARCHED = ("units", "learning_rate", "weight_decay", "dropout", "label_smoothing")

# A trial that is worse than the better half at a quarter or half of its epochs is stopped there.
_RUNGS = (0.25, 0.5)
_DIVERGED = 1e9  # finite, because the scheduler takes percentiles
# More processes at once gain nothing on one memory bus, and each holds TensorFlow.
_MAX_PROCESSES = 16
_SHOWN = 10


def draw(given: HeadSettings, count: int, *, seed: int) -> list[HeadSettings]:
    """The settings [count] of a search: first those given, then random ones.

    Trial i is a function of (seed, i), so a longer search begins with the shorter one.
    """
    trials = [given]
    for i in range(1, count):
        generator = np.random.default_rng([seed, 0x5EA4C, i])
        drawn = {
            "units": (int(generator.choice(WIDTHS)),),
            "learning_rate": _rounded(_log_uniform(generator, *LEARNING_RATE)),
            "weight_decay": _rounded(_log_uniform(generator, *WEIGHT_DECAY)),
            "dropout": round(float(generator.uniform(*DROPOUT)), 2),
            "label_smoothing": float(generator.choice(LABEL_SMOOTHING)),
        }
        trials.append(given.model_copy(update=drawn))
    return trials


def _log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(generator.uniform(math.log(low), math.log(high))))


def _rounded(value: float) -> float:
    """Two significant digits: what a person would write down."""
    return float(f"{value:.1e}")


def search(job: HeadJob, *, count: int, nodes: list[Node], run: str) -> HeadSettings:
    """The head settings with the lowest validation loss of `count`, and all trials.

    The loss and not the accuracy: on some hundred validation images accuracy moves in steps and
    many trials tie, and it is the loss that chooses the epoch within a fit. Test is not looked at.
    Trials that an earlier start of the run finished are read from the run's search.json.

    Raises:
        UserError: no trial has a finite loss, or the stored trials are of other settings.
        features.DamagedParts: the cache has to be repaired first.
    """
    trials = draw(job.head, count, seed=job.seed)
    url = storage.join(run, SEARCH)
    done = _stored(url, job)

    def keep(number: int, result: Mapping[str, Any]) -> None:
        settings = trials[number].model_dump(mode="json", include=set(SEARCHED))
        diverged = result["valid_loss"] >= _DIVERGED
        done[number] = {
            "trial": number,
            "settings": settings,
            "epochs": result["epoch"],
            "stopped_early": not result["whole"],
            "best_epoch": result["best_epoch"],
            "valid_loss": None if diverged else result["valid_loss"],
            "valid_accuracy": None if diverged else result["valid_accuracy"],
            "seconds": result["seconds"],
        }
        _store(url, job, done)

    began = time.monotonic()
    fits = {i: _Fit(trials[i], None) for i in range(count) if i not in done}
    _run(job, fits, keep, title="search", unit="trials", nodes=nodes, run=run, stop_early=True)
    ranked = sorted(done.values(), key=lambda row: (_loss(row), row["trial"]))
    if ranked[0]["valid_loss"] is None:
        raise UserError(
            "loss-not-finite", f"no trial of {url} has a finite loss; lower --head.learning_rate"
        )
    _say_search(ranked, url, time.monotonic() - began)
    return trials[int(ranked[0]["trial"])]


def _loss(row: Mapping[str, Any]) -> float:
    return math.inf if row["valid_loss"] is None else float(row["valid_loss"])


def cross_validate(
    job: HeadJob, index: ShardIndex, *, count: int, nodes: list[Node], run: str
) -> dict[str, Any]:
    """The accuracy over `count` folds of train and valid, each scored by a head that never saw it.

    A fold is scored on the plain view. The head is the one after the last epoch: choosing the
    epoch needs examples of its own, and choosing it on the fold would flatter the result. Mean and
    deviation come from the other folds. Photographs of the validation split have one view in the
    cache, so they are learned from without augmentation; more views of them would cost more time
    than all the fits.

    Raises:
        UserError: fewer groups than folds, or the stored folds are of other settings.
        features.DamagedParts: the cache has to be repaired first.
    """
    labels, groups, how = _grouped(index)
    fold_of = folds(labels, groups, count, seed=job.seed)
    url = storage.join(run, CROSS_VALIDATION)
    done = _stored(url, job)

    def keep(number: int, result: Mapping[str, Any]) -> None:
        scores = dict(result["scores"])
        done[number] = {"fold": number, **scores, "seconds": result["seconds"]}
        _store(url, job, done)

    fits = {i: _Fit(job.head, fold_of == i) for i in range(count) if i not in done}
    _run(job, fits, keep, title="folds", unit="folds", nodes=nodes, run=run, stop_early=False)
    rows = [done[i] for i in range(count)]
    summary = {
        name: {
            "mean": float(np.mean([row[name] for row in rows])),
            "deviation": float(np.std([row[name] for row in rows], ddof=1)),
        }
        for name in ("accuracy", "macro_f1", "log_loss")
    }
    _store(url, job, done, summary=summary, grouped_by=how)
    _say_folds(rows, summary, how, url)
    return summary


def folds(
    labels: NDArray[np.int32], groups: NDArray[np.int64], count: int, *, seed: int
) -> NDArray[np.int64]:
    """The fold [N] of each example: classes evenly over folds, no group in two of them.

    Raises:
        UserError: fewer groups than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    distinct = np.unique(groups).size
    if distinct < count:
        raise UserError(
            "too-many-folds",
            f"--cross_validate {count}, but train and valid have only {distinct} independent "
            "groups of photographs; give fewer folds",
        )
    options = {"n_splits": count, "shuffle": True, "random_state": seed}
    if distinct == labels.size:
        # The same where every example is a group of its own, and linear in their number.
        split = StratifiedKFold(**options).split(labels, labels)
    else:
        split = StratifiedGroupKFold(**options).split(labels, labels, groups)
    fold_of = np.empty(labels.size, np.int64)
    for number, (_, held_out) in enumerate(split):
        fold_of[held_out] = number
    return fold_of


def _grouped(index: ShardIndex) -> tuple[NDArray[np.int32], NDArray[np.int64], str]:
    """Labels [N] and groups [N] of train and valid, in that order, and what the groups are.

    What prepare kept together: photographs with the same match of its --group, and those that its
    table of duplicates ties.
    """
    keys: list[str] = []
    labels = []
    for shard in (*index.of_split("train"), *index.of_split("valid")):
        table = shards.read_columns(index.root, shard, ["key", "label"])
        keys += table.column("key").to_pylist()
        labels.append(table.column("label").to_numpy())
    row_of = {key: row for row, key in enumerate(keys)}
    a, b = [], []
    pattern = shards.prepared(index.root).get("settings", {}).get("group")
    if pattern is not None:
        compiled = re.compile(pattern)
        first: dict[str, int] = {}
        for row, key in enumerate(keys):
            match = compiled.search(key)
            if match:
                a.append(row)
                b.append(first.setdefault(match.group(min(compiled.groups, 1)), row))
    by_group = len(a)
    for key_a, key_b in shards.duplicates(index.root):
        if key_a in row_of and key_b in row_of:
            a.append(row_of[key_a])
            b.append(row_of[key_b])
    tied = prepare.components(len(keys), np.array(a, np.int64), np.array(b, np.int64))
    how = [f"a match of {pattern!r}"] if by_group else []
    how += ["looking alike"] if len(a) > by_group else []
    return np.concatenate(labels).astype(np.int32), tied, " and ".join(how)


class _Fit(NamedTuple):
    """A head fit: on train and scored on valid, or on all of both but a fold and scored on it."""

    head: HeadSettings
    held_out: NDArray[np.bool_] | None  # [N] over train and valid


def _run(
    job: HeadJob,
    fits: Mapping[int, _Fit],
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
    board = cluster.Board()
    errors: list[Exception] = []
    total = sum(int(node.cpus) for node in nodes)
    processes = min(len(fits), max(1, total), _MAX_PROCESSES)
    # A whole number of threads, unless the cluster has less than one CPU.
    cpus = max(1, total // processes) if total else max(node.cpus for node in nodes)
    scheduler = None
    if stop_early:
        epochs = job.head.epochs
        scheduler = ray.tune.schedulers.ASHAScheduler(
            time_attr="epoch",
            grace_period=max(1, round(epochs * _RUNGS[0])),
            max_t=epochs + 1,
            reduction_factor=round(_RUNGS[1] / _RUNGS[0]),
        )
    # Tune's own answer to Ctrl-C ends the search as if it were done, and it is kept after that: the
    # best trial so far was published, and a later Ctrl-C was lost.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    with terminal.progress(title, len(fits), unit=unit) as advance:

        class Keep(ray.tune.Callback):
            def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
                terminal.raise_if_asked()

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
                scheduler=scheduler,
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
    storage.delete(storage.join(run, title))
    if errors:
        raise errors[0]
    if results.errors:
        raise results.errors[0]


def _fit(
    config: dict[str, Any], *, job: HeadJob, fits: dict[int, _Fit], threads: int, board: Any
) -> None:
    """One fit, in a process that does many."""
    number = int(config["number"])
    try:
        backbone.limit_threads(threads, gpu=False)
        local = fitting.local_features(job)
        fit = fits[number]
        if fit.held_out is None:
            _fit_trial(job, fit.head, local, report_early=number > 0)
        else:
            _fit_fold(job, fit.head, local, fit.held_out)
    except (UserError, features.DamagedParts) as error:
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
    best: dict[str, Any] = {"best_epoch": 0, "valid_loss": _DIVERGED, "valid_accuracy": 0.0}

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
        training.cached_views(train.features, seed=job.seed),
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
        best["valid_loss"] = _DIVERGED
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
    total = metrics.empty_tally(len(job.class_names))
    for split, chosen in (
        (train, np.flatnonzero(held_out[:first_valid])),
        (valid, np.flatnonzero(held_out[first_valid:])),
    ):
        for start in range(0, chosen.size, BLOCK):
            some = chosen[start : start + BLOCK]
            total += metrics.tally(head_logits(folded, split.features[some, 0]), split.labels[some])
    scores = metrics.scores(total, job.class_names)
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
    sums = [features.moments(train.features, rows[rows < first_valid])]
    if (rows >= first_valid).any():
        sums.append(features.moments(valid.features, rows[rows >= first_valid] - first_valid))
    mean, deviation = features.statistics(*sums)
    of_train = training.cached_views(train.features, seed=seed)

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
    job: HeadJob, head: HeadSettings, data: TrainingData, report: training.Report
) -> checkpoint.TrainState:
    return training.fit_head(
        data,
        settings=head,
        num_classes=len(job.class_names),
        seed=job.seed,
        place=Place(0, 1),
        report=report,
    )


def _stored(url: str, job: HeadJob) -> dict[int, dict[str, Any]]:
    """What an earlier start of the run finished, by number."""
    try:
        document = storage.read_json(url)
    except FileNotFoundError:
        return {}
    checkpoint.compare_identity(document["identity"], job.identity, where=url)
    return {i: row for i, row in enumerate(document["rows"]) if row is not None}


def _store(url: str, job: HeadJob, done: Mapping[int, Mapping[str, Any]], **more: Any) -> None:
    rows = [done.get(i) for i in range(max(done) + 1)]
    storage.write_json(url, {**more, "rows": rows, "identity": job.identity})


def _say_search(ranked: Sequence[Mapping[str, Any]], url: str, seconds: float) -> None:
    best, given = ranked[0], next(row for row in ranked if row["trial"] == 0)
    shown = [*ranked[:_SHOWN], *([given] if given not in ranked[:_SHOWN] else [])]
    terminal.table(
        "",
        ["trial", "units", "rate", "decay", "dropout", "smooth", "epochs", "loss", "accuracy"],
        [
            [
                "0 given" if row["trial"] == 0 else str(row["trial"]),
                ",".join(map(str, row["settings"]["units"])) or "none",
                *(f"{row['settings'][name]:g}" for name in SEARCHED[1:]),
                f"{row['epochs']}{'-' if row['stopped_early'] else ''}",
                "not finite" if row["valid_loss"] is None else f"{row['valid_loss']:.4f}",
                "" if row["valid_accuracy"] is None else f"{row['valid_accuracy']:.3f}",
            ]
            for row in shown
        ],
    )
    spent = sum(row["seconds"] for row in ranked)
    say(
        f"search    trial {best['trial']} of {len(ranked)} has the lowest validation loss "
        f"({sum(row['stopped_early'] for row in ranked)} stopped early, -); "
        f"{terminal.duration(spent)} of fits in {terminal.duration(seconds)}; all in {url}"
    )


def _say_folds(
    rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], how: str, url: str
) -> None:
    terminal.table(
        "",
        ["fold", "images", "accuracy", "macro F1", "log loss"],
        [
            [
                str(row["fold"]),
                f"{row['examples']:,}",
                f"{row['accuracy']:.3f}",
                f"{row['macro_f1']:.3f}",
                f"{row['log_loss']:.3f}",
            ]
            for row in rows
        ],
    )
    accuracy = summary["accuracy"]
    kept = f", kept together by {how}" if how else ""
    say(
        f"folds     accuracy {accuracy['mean']:.3f} ± {accuracy['deviation']:.3f} over {len(rows)} "
        f"folds of train and valid{kept}; {url}"
    )
