"""What jobs/train.py does, in the order in which it happens."""

import csv
import io
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import ray
import yaml

from leafnet import (
    backbone,
    bundle,
    calibration,
    checkpoint,
    cluster,
    config,
    drift,
    evaluation,
    features,
    finetune,
    fitting,
    inference,
    lock,
    metrics,
    openvino_graph,
    pages,
    rehearsal,
    report,
    review,
    search,
    shards,
    storage,
    tensorboard,
    terminal,
    tracking,
    tuning,
)
from leafnet.classifier import Head, fold_standardisation
from leafnet.config import SPLITS, TrainSettings
from leafnet.errors import UserError
from leafnet.lock import Lock
from leafnet.shards import ShardIndex
from leafnet.terminal import say
from leafnet.training import steps_per_epoch
from leafnet.workers import Restart, Survival

# Settings that change where and how fast a run computes, and not what.
_PLACEMENT = (
    *("out", "shards", "workers", "gpu", "batch_size", "dry_run", "lock_timeout", "explain"),
    *("max_failures", "hang_timeout"),
    *("data.", "cache.", "checkpoint.", "mlflow.", "ray."),
)


Made = TypeVar("Made")


class _Features(NamedTuple):
    """Where the features of each split are, and what a forward pass was like."""

    root: str
    parts: dict[str, tuple[features.Part, ...]]
    views: int
    computed: int  # views that were not in the cache


class _Network(NamedTuple):
    """A network with its head, and how they do."""

    weights: backbone.Weights
    reference: Any  # to `weights.convolutions`, in Ray's object store
    head: Head  # on raw features
    result: fitting.HeadResult


def train(settings: TrainSettings) -> None:
    """Train and publish a model at `out`/`name`, going on where an earlier start stopped.

    Raises:
        UserError: something in the settings, the data or the weights is wrong; another job trains
            under this name (exit code 3).
    """
    settings = settings.model_copy(
        update={"out": storage.absolute(settings.out), "shards": storage.absolute(settings.shards)}
    )
    run = storage.join(settings.out, settings.name)
    index = evaluation.read_index(settings.shards, settings.data)
    shards.check_sizes(index)
    _check_data(index)
    _check_search(settings, index)
    if settings.int8:
        _check_int8(index)
    tracking.check(settings.mlflow)
    if _nothing_to_do(run, settings, index):
        return
    began = time.monotonic()
    # What can be refused is refused before there is a folder of the run, or a machine is taken.
    lock.refuse_held(run)
    weights = backbone.load_weights(settings.weights, seed=settings.seed)
    if settings.dry_run:
        rehearsal.run(settings, run, index, weights, views=_views(settings))
        return
    with lock.hold(run, timeout_s=settings.lock_timeout) as held:
        # Another job may have had the run until now.
        if _nothing_to_do(run, settings, index):
            return
        started_before = storage.exists(storage.join(run, "config.yaml"))
        with terminal.log_to(run, "train.log"):
            terminal.keeps(f"features and checkpoints are kept in {settings.out}")
            say(f"run {run}" + ("   goes on where it stopped" if started_before else ""))
            storage.write_bytes(storage.join(run, "config.yaml"), config.to_yaml(settings).encode())
            with (
                tracking.follow(
                    settings.mlflow,
                    run,
                    name=settings.name,
                    parameters=config.flat(settings.model_dump(mode="json")),
                ) as tracker,
                cluster.session(settings.ray) as found,
                terminal.sigterm_interrupts(),
            ):
                nodes = cluster.with_gpus(found, settings.gpu, settings.workers, settings.ray, say)
                _train_on(nodes, settings, run, index, weights, began, held, tracker)


def _nothing_to_do(run: str, settings: TrainSettings, index: ShardIndex) -> bool:
    """True when the run is finished, and says so."""
    finished = _check_same_settings(run, settings) and _finished(run, index)
    if finished:
        say(f"{run} is finished: {storage.join(run, 'model')}; nothing to do")
    return finished


def _train_on(
    nodes: list[cluster.Node],
    settings: TrainSettings,
    run: str,
    index: ShardIndex,
    weights: backbone.Weights,
    began: float,
    held: Lock,
    tracker: tracking.Tracker,
) -> None:
    events = tensorboard.EventLog(run)
    seconds: dict[str, float] = {}
    machines = cluster.machines(nodes, settings.gpu)
    workers, cpus = cluster.workers_for(nodes, settings.workers, machines.gpus)
    precision, why = cluster.choose_precision(settings.precision, gpu=machines.gpus > 0)
    batch_size = cluster.batch_size(settings.batch_size, gpus=machines.gpus)
    if settings.fine_tune.blocks:
        finetune.check_batch(
            settings.fine_tune,
            examples=index.examples("train"),
            workers=workers if isinstance(workers, int) else workers[1],
        )
    _say_plan(settings, index, machines, workers, precision, why)
    seconds["start"] = time.monotonic() - began

    survival = Survival(settings.max_failures, settings.hang_timeout, settings.checkpoint.keep)
    reference = ray.put(weights.convolutions)

    def compute() -> _Features:
        began_stage = time.monotonic()
        computed = _features(settings, index, weights, reference, precision, batch_size, machines)
        seconds["features"] = seconds.get("features", 0.0) + time.monotonic() - began_stage
        return computed

    def fit(computed: _Features) -> tuple[_Features, fitting.HeadJob, fitting.HeadResult]:
        began_stage = time.monotonic()
        job = _head_job(
            settings,
            index,
            weights,
            reference,
            computed,
            precision=precision,
            batch_size=batch_size,
        )
        job = _search(job, settings, index, nodes, run, seconds)
        result = _fit_head(
            job,
            run,
            workers=workers,
            cpus=cpus,
            gpu=machines.gpus > 0,
            watchers=(events.epoch, tracker.epoch),
            survival=survival,
        )
        seconds["head"] = time.monotonic() - began_stage - seconds.get("search", 0.0)
        return computed, job, result

    computed, job, result = _on_whole_features(compute, fit)

    # What is published is described by the settings that were found, if there was a search.
    settings = settings.model_copy(update={"head": job.head})
    head = fold_standardisation(
        result.state.best_head, mean=result.mean, deviation=result.deviation
    )
    head = calibration.fold_temperature(head, result.temperature)
    scores = _scores(result, index)
    network = _Network(weights, reference, head, result)
    tuned: dict[str, Any] = {}
    tuned_history: list[dict[str, float]] = []
    if settings.fine_tune.blocks:
        storage.write_json(storage.join(run, "metrics_head.json"), scores)
        network, tuned, tuned_history = _fine_tune(
            settings,
            index,
            network,
            precision=precision,
            batch_size=batch_size,
            machines=machines,
            workers=workers,
            cpus=cpus,
            survival=survival,
            run=run,
            seconds=seconds,
            watchers=(events.fine_tune_epoch, tracker.fine_tune_epoch),
        )
        if network.weights is not weights:
            tuned["head_alone"] = _short(scores)
            scores = _scores(network.result, index)
            tuned["fine_tuned"] = _short(scores)
            say(f"fine-tune {_gain(tuned)}")
    result = network.result
    calibrated = _calibration(result, scores, index.class_names)
    held.check()
    restarts = [vars(one) for one in result.restarts]
    _write_results(run, result.state.history, tuned_history, scores, index, events, restarts)
    thresholds, effects = _review(settings, result)
    int8, int8_review = None, None
    int8_report: dict[str, Any] = {}
    if settings.int8:
        began_stage = time.monotonic()
        int8, int8_review, int8_report = _quantize(
            settings, index, network.reference, network.head, result, machines
        )
        seconds["int8"] = time.monotonic() - began_stage
    began_stage = time.monotonic()
    held.check()
    model_id = bundle.save(
        storage.join(run, "model"),
        convolutions=network.weights.convolutions,
        head=network.head,
        class_names=index.class_names,
        image_size=settings.image_size,
        provenance=_provenance(settings, index, weights, precision, scores, result.state)
        | ({"temperature": calibrated} if calibrated else {})
        | ({"fine_tune": tuned} if tuned else {})
        | ({"review": effects} if thresholds else {})
        | ({"reference": drift.reference(result.outcomes["valid"])} if thresholds else {})
        | ({"int8": int8_report} if int8_report else {}),
        novelty=result.novelty if thresholds else None,
        review=thresholds,
        int8=int8,
        int8_review=int8_review,
    )
    seconds["publish"] = time.monotonic() - began_stage
    began_stage = time.monotonic()
    items = evaluation.after_training(
        storage.join(run, "evaluation"),
        index,
        answers=result.answers,
        model_url=storage.join(run, "model"),
        model_id=model_id,
        convolutions=network.reference,
        head=network.head,
        image_size=settings.image_size,
        precision=precision,
        machines=machines,
        # What random weights see says nothing.
        explain=settings.explain and settings.weights != "random",
    )
    seconds["evaluation"] = time.monotonic() - began_stage
    seconds["total"] = time.monotonic() - began
    storage.write_json(
        storage.join(run, "run.json"),
        {
            "model_id": model_id,
            "finished_at": _now(),
            "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
            "images_per_second": {
                "features": round(computed.computed / seconds["features"], 1),
                "head": round(result.state.epoch * index.examples("train") / seconds["head"], 1),
            },
            "command": shlex.join(["python", *sys.argv]),
            "workers": workers if isinstance(workers, int) else settings.workers,
            "restarts": restarts,
            "gpus": machines.gpus,
            "precision": precision,
            "epochs": result.state.epoch,
            "best_epoch": result.state.best_epoch,
            "versions": bundle.versions(),
        }
        | ({"fine_tune": tuned} if tuned else {}),
    )
    # Its samples of each class are of the training split, which is what was learnt from.
    shown = [item for item in items if item.kind != "sample"]
    told = pages.place_of(lambda: report.write(run, shown))
    tracker.results(
        result.state.history,
        scores,
        tags={"model_id": model_id, "model": storage.join(run, "model")},
        parameters=config.flat(settings.model_dump(mode="json")),
        fine_tune=tuned_history,
    )
    _say_results(run, scores, model_id, seconds["total"], result.state)
    say(f"report    {told}")
    terminal.result(
        run=run,
        model=storage.join(run, "model"),
        model_id=model_id,
        metrics=evaluation.figures(scores),
    )


def _check_data(index: ShardIndex) -> None:
    if not index.examples("train"):
        raise UserError("no-training-data", f"{index.root} has no training images")
    if len(index.class_names) < 2:
        raise UserError(
            "one-class",
            f"{index.root} has one class only, {index.class_names[0]}; a classifier "
            "needs at least two",
        )


def _check_search(settings: TrainSettings, index: ShardIndex) -> None:
    wanted = "--head.search" if settings.head.search else "--cross_validate"
    if not settings.head.search and not settings.cross_validate:
        return
    if settings.features == "online":
        raise UserError("search-online", f"{wanted} needs --features cached, found online")
    if settings.head.search and not index.examples("valid"):
        raise UserError(
            "no-validation",
            f"--head.search chooses on the validation split, and {index.root} has none; prepare "
            "it with --split 80/10/10, or leave --head.search out",
        )
    folds = settings.cross_validate or 0
    for name in index.class_names:
        found = sum(index.counts[split][name] for split in ("train", "valid"))
        if found < folds:
            raise UserError(
                "too-many-folds",
                f"--cross_validate {folds}, but class {name} has only {found} images in train and "
                "valid; give fewer folds",
            )


def _check_int8(index: ShardIndex) -> None:
    if not openvino_graph.installed(quantizer=True):
        raise UserError(
            "no-openvino",
            "--int8 needs OpenVINO and NNCF, which are not installed: pip install "
            '"leafnet[openvino]"',
        )
    if not index.examples("valid"):
        raise UserError(
            "int8-unchecked",
            f"--int8 is checked on the validation split, and {index.root} has none; prepare the "
            "data set with one, or train without --int8",
        )


def _calibration(
    result: fitting.HeadResult, scores: dict[str, Any], class_names: Sequence[str]
) -> dict[str, Any]:
    """What the temperature did, for model.json; {} where there was nothing to fit it on.

    Adds to `scores` of validation and test what they were without it, and the accuracy of the most
    confident 90 %.
    """
    for split, outcomes in result.outcomes.items():
        name = f"selective_accuracy_{100 * evaluation.COVERAGE:.0f}"
        scores[split][name] = calibration.selective_accuracy(
            outcomes.confidence, outcomes.correct, coverage=evaluation.COVERAGE
        )
    if "valid" not in result.outcomes:
        return {}
    told: dict[str, Any] = {
        "value": result.temperature,
        "fitted_on": "valid",
        "examples": len(result.answers["valid"].labels),
        "folded_into": "the last layer of the head",
        "ece": {},
    }
    for split, (logits, labels) in result.answers.items():
        raw = np.asarray(logits * np.float32(result.temperature))
        before = metrics.scores(metrics.tally(raw, labels), class_names)
        scores[split]["before_temperature"] = {
            name: before[name] for name in ("log_loss", "ece", "calibration")
        }
        told["ece"][split] = {"before": before["ece"], "after": scores[split]["ece"]}
    shown = ", ".join(
        f"{split} ECE {ece['before']:.3f} -> {ece['after']:.3f}"
        for split, ece in told["ece"].items()
    )
    say(f"calibrate temperature {result.temperature:.3f}: {shown}")
    return told


def _review(
    settings: TrainSettings, result: fitting.HeadResult
) -> tuple[review.Review | None, dict[str, Any]]:
    """Thresholds, and what they do to validation and test; none without a validation split."""
    if "valid" not in result.outcomes:
        say("review    no thresholds: they are chosen on the validation split, which is empty")
        return None, {}
    chosen = review.choose(result.outcomes["valid"], precision_target=settings.precision_target)
    effects = {
        split: review.effect(outcomes, chosen) for split, outcomes in result.outcomes.items()
    }
    for split, effect in effects.items():
        say(f"review    {split}: {review.describe(effect)}")
    if chosen.confidence == review.REVIEW_ALL:
        say(
            f"          no confidence gives {settings.precision_target:.0%} right predictions: "
            "every photograph is for review; lower --precision_target or train better"
        )
    return chosen, {"share_reviewed": effects["valid"]["share_reviewed"], "splits": effects}


def _quantize(
    settings: TrainSettings,
    index: ShardIndex,
    reference: Any,
    head: Head,
    result: fitting.HeadResult,
    machines: cluster.Machines,
) -> tuple[openvino_graph.Int8 | None, review.Review | None, dict[str, Any]]:
    """The quantized backbone and its thresholds, None where it is refused; what is told of it."""
    made = inference.quantize(
        index,
        reference,
        head,
        result.novelty,
        image_size=settings.image_size,
        machines=machines,
    )
    count = made.outcomes.correct.size
    accuracy = float(made.outcomes.correct.mean())
    of_float = float(result.outcomes["valid"].correct[:count].mean())
    accepted = inference.accept_int8(accuracy, of_float)
    told_of: dict[str, Any] = {
        "accepted": accepted,
        "calibration_examples": made.calibration_examples,
        "valid_examples": count,
        "valid_accuracy": accuracy,
        "valid_accuracy_float": of_float,
    }
    told = f"validation accuracy {accuracy:.4f}, {of_float:.4f} in floating point"
    if not accepted:
        say(f"int8      {told}: refused, it falls by more than 0.5 points; published without int8")
        return None, None, told_of
    say(f"int8      {told}: kept")
    # Rounding to 8 bits moves every photograph away from the training features.
    chosen = review.choose(made.outcomes, precision_target=settings.precision_target)
    effect = review.effect(made.outcomes, chosen)
    say(f"review    valid in int8: {review.describe(effect)}")
    told_of["review"] = {"share_reviewed": effect["share_reviewed"], "splits": {"valid": effect}}
    told_of["reference"] = drift.reference(made.outcomes)
    return made.int8, chosen, told_of


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change the result, flat: dotted name -> value."""
    flat = config.flat(settings)
    return {name: value for name, value in flat.items() if not name.startswith(_PLACEMENT)}


def _check_same_settings(run: str, settings: TrainSettings) -> bool:
    """True when the run was started before, with the same settings."""
    try:
        stored = yaml.safe_load(storage.read_bytes(storage.join(run, "config.yaml")))
    except (FileNotFoundError, NotADirectoryError):
        return False
    found, wanted = _decisive(stored), _decisive(settings.model_dump(mode="json"))
    checkpoint.compare_identity(found, wanted, where=f"run {run}")
    return True


def _finished(run: str, index: ShardIndex) -> bool:
    """True when the run's model is published, for the data set as it is.

    Raises:
        UserError: the data set is another one than the model was trained on.
    """
    try:
        description = storage.read_json(storage.join(run, "model", "model.json"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    if description["data"]["fingerprint"] != index.fingerprint:
        raise UserError(
            "other-data",
            f"run {run} was trained on another data set than {index.root} holds now; train under "
            "another --name",
        )
    return storage.exists(storage.join(run, "run.json"))


def _views(settings: TrainSettings) -> int:
    # Online draws its own; without augmentation all views are the plain one.
    cached = settings.features == "cached" and settings.augment
    return settings.views if cached else 1


def _say_plan(
    settings: TrainSettings,
    index: ShardIndex,
    machines: cluster.Machines,
    workers: int | tuple[int, int],
    precision: str,
    why: str,
) -> None:
    examples = index.examples("train")
    batch = min(settings.head.batch_size, examples)
    steps = steps_per_epoch(examples, batch)
    counts = "/".join(f"{index.examples(split):,}" for split in SPLITS)
    say(f"data      {counts} images for train/valid/test, {len(index.class_names)} classes")
    note = ": a check of the pipeline, not of accuracy" if settings.weights == "random" else ""
    say(f"backbone  ResNet50, {settings.weights} weights{note}, {settings.image_size} pixels")
    say(f"device    {cluster.device(machines.gpus)}, {precision} ({why})")
    shared = (
        f"on {workers[0]} to {workers[1]} workers"
        if isinstance(workers, tuple)
        else (f"{batch / workers:g} on each of {workers} worker{'s' * (workers > 1)}")
    )
    say(
        f"head      {settings.head.epochs} epochs of {steps} steps = "
        f"{settings.head.epochs * steps:,}; global batch {batch}, {shared}"
    )
    if settings.fine_tune.blocks:
        tuned = settings.fine_tune
        batch = min(tuned.batch_size, examples)
        stages = "all stages" if tuned.blocks == "all" else f"the last {tuned.blocks} of 4 stages"
        say(
            f"fine-tune {stages}, {tuned.epochs} epochs of {steps_per_epoch(examples, batch)} "
            f"steps; global batch {batch}"
        )


def _on_whole_features(compute: Callable[[], _Features], use: Callable[[_Features], Made]) -> Made:
    """`use` of the features of `compute`; parts that turn out damaged are computed again."""
    for last in (False, False, True):
        computed = compute()
        try:
            return use(computed)
        except features.DamagedParts as error:
            if last:
                raise
            say(f"{error}; computing them again")
            for name in error.names:
                storage.delete(storage.join(computed.root, name))
    raise AssertionError("the last attempt returns or raises")


def _features(
    settings: TrainSettings,
    index: ShardIndex,
    weights: backbone.Weights,
    reference: Any,
    precision: str,
    batch_size: int,
    machines: cluster.Machines,
) -> _Features:
    """Compute what the cache lacks."""
    cache = storage.absolute(settings.cache.url or storage.join(settings.out, "features"))
    key = features.cache_key(
        weights_fingerprint=weights.fingerprint,
        image_size=settings.image_size,
        precision=precision,
    )
    root, views = storage.join(cache, key), _views(settings)
    wanted = [(shard, views if shard.split == "train" else 1) for shard in index.shards]
    plan = features.plan(root, wanted, seed=settings.seed)
    features.mark_used(root)
    if settings.cache.max_gb is not None:
        for name in features.evict(cache, max_gb=settings.cache.max_gb, keep=key):
            say(f"evicted {storage.join(cache, name)} from the cache")
    total = sum(part.rows * (part.stop - part.first) for part in plan.parts)
    missing = sum(part.rows * (part.stop - part.first) for part in plan.missing)
    if missing < total:
        say(f"features  {total - missing:,} of {total:,} views are in the cache {root}")
    if plan.missing:
        with terminal.progress("features", missing, unit="views") as advance:
            inference.extract(
                index,
                plan,
                reference,
                image_size=settings.image_size,
                precision=precision,
                batch_size=batch_size,
                machines=machines,
                advance=advance,
            )
    parts = {
        split: tuple(part for part in plan.parts if part.shard.split == split) for split in SPLITS
    }
    return _Features(root, parts, views, missing)


def _head_job(
    settings: TrainSettings,
    index: ShardIndex,
    weights: backbone.Weights,
    reference: Any,
    computed: _Features,
    *,
    precision: str,
    batch_size: int,
) -> fitting.HeadJob:
    online = None
    if settings.features == "online":
        online = fitting.Online(
            root=index.root,
            shards=index.of_split("train"),
            weights=reference,
            image_size=settings.image_size,
            precision=precision,
            augment=settings.augment,
            batch_size=batch_size,
            shards_cache=index.cache,
        )
    return fitting.HeadJob(
        head=settings.head,
        class_names=index.class_names,
        seed=settings.seed,
        save_every_s=settings.checkpoint.every_seconds,
        save_every_steps=settings.checkpoint.every_steps,
        identity=_identity(settings, index, weights, precision),
        cache_root=computed.root,
        parts=computed.parts,
        views=computed.views,
        online=online,
    )


def _search(
    job: fitting.HeadJob,
    settings: TrainSettings,
    index: ShardIndex,
    nodes: list[cluster.Node],
    run: str,
    seconds: dict[str, float],
) -> fitting.HeadJob:
    """`job` with the head settings that a search found; and the accuracy over folds."""
    began = time.monotonic()
    if settings.head.search:
        head = search.search(job, count=settings.head.search, nodes=nodes, run=run)
        searched = {
            f"searched.{name}": value for name, value in head.model_dump(mode="json").items()
        }
        job = replace(job, head=head, identity=job.identity | searched)
    if settings.cross_validate:
        search.cross_validate(job, index, count=settings.cross_validate, nodes=nodes, run=run)
    if settings.head.search or settings.cross_validate:
        seconds["search"] = time.monotonic() - began
    return job


def _fit_head(
    job: fitting.HeadJob,
    run: str,
    *,
    workers: int | tuple[int, int],
    cpus: float,
    gpu: bool,
    survival: Survival,
    watchers: Sequence[Callable[[dict[str, float]], None]],
) -> fitting.HeadResult:
    best = float("inf")
    with terminal.progress("head", job.head.epochs, unit="epochs") as advance:

        def on_epoch(row: dict[str, float]) -> None:
            nonlocal best
            is_best = row.get("valid_loss", best) < best
            best = min(best, row.get("valid_loss", best))
            say(_epoch_line(row, job.head.epochs) + ("   best" if is_best else ""))
            for watch in watchers:
                watch(row)
            advance(1)

        return fitting.fit_head(
            job,
            count=workers,
            cpus_per_worker=cpus,
            gpu=gpu,
            storage_path=run,
            on_epoch=on_epoch,
            survival=survival,
        )


def _epoch_line(row: Mapping[str, float], epochs: int) -> str:
    line = (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}   "
        f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.3f}"
    )
    if "valid_loss" in row:
        line += f"   valid loss {row['valid_loss']:.4f} accuracy {row['valid_accuracy']:.3f}"
    return line


def _scores(result: fitting.HeadResult, index: ShardIndex) -> dict[str, Any]:
    """The scores of each split that has examples, all of which must have been evaluated."""
    for split in SPLITS:
        if result.tallies[split].examples != index.examples(split):
            raise RuntimeError(
                f"evaluated {result.tallies[split].examples} examples of {split}, which has "
                f"{index.examples(split)}"
            )
    return {
        split: metrics.scores(result.tallies[split], index.class_names)
        for split in reversed(SPLITS)
        if index.examples(split)
    }


def _short(scores: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each split what two models are compared by."""
    names = ("accuracy", "log_loss", "ece")
    return {split: {name: of_split[name] for name in names} for split, of_split in scores.items()}


def _gain(tuned: Mapping[str, Any]) -> str:
    """Accuracy of the head alone and after fine-tuning.

    >>> of = {"test": {"accuracy": 0.9}}
    >>> _gain({"head_alone": of, "fine_tuned": {"test": {"accuracy": 0.95}}, "best_epoch": 7})
    'of epoch 7: test accuracy 0.900 -> 0.950'
    """
    gains = (
        f"{split} accuracy {before['accuracy']:.3f} -> {tuned['fine_tuned'][split]['accuracy']:.3f}"
        for split, before in tuned["head_alone"].items()
    )
    return f"of epoch {tuned['best_epoch']}: {', '.join(gains)}"


def _fine_tune(
    settings: TrainSettings,
    index: ShardIndex,
    before: _Network,
    *,
    precision: str,
    batch_size: int,
    machines: cluster.Machines,
    workers: int | tuple[int, int],
    cpus: float,
    survival: Survival,
    run: str,
    seconds: dict[str, float],
    watchers: Sequence[Callable[[dict[str, float]], None]],
) -> tuple[_Network, dict[str, Any], list[dict[str, float]]]:
    """(the network to publish, what is told of it, the history).

    The network is `before` itself where tuning did not help.
    """
    began, state = time.monotonic(), before.result.state
    job = tuning.TuneJob(
        settings=settings.fine_tune,
        class_names=index.class_names,
        class_weights=settings.head.class_weights,
        seed=settings.seed,
        save_every_s=settings.checkpoint.every_seconds,
        save_every_steps=settings.checkpoint.every_steps,
        identity=_identity(settings, index, before.weights, precision),
        index=index,
        weights=before.reference,
        probe=ray.put(tuning.Probe(state.best_head, before.result.mean, before.result.deviation)),
        precision=precision,
        image_size=settings.image_size,
        threads=max(1, round(cpus)),
    )
    made, restarts = _tune_stages(
        job,
        run,
        workers=workers,
        cpus=cpus,
        gpu=machines.gpus > 0,
        survival=survival,
        watchers=watchers,
    )
    # With those of the head, whose result the network to publish goes on from.
    before = before._replace(
        result=replace(before.result, restarts=before.result.restarts + restarts)
    )
    seconds["fine_tune"] = time.monotonic() - began
    storage.write_bytes(storage.join(run, "fine_tune.csv"), _csv(made.history))
    images = len(made.history) * index.examples("train")
    told: dict[str, Any] = {
        "blocks": settings.fine_tune.blocks,
        "published": made.best_epoch > 0,
        "epochs": made.epoch,
        "best_epoch": made.best_epoch,
        # Without temperature, as the history; {} without a validation split.
        "head_alone_valid": made.head_alone,
        "images_per_s": images
        / sum(index.examples("train") / row["images_per_s"] for row in made.history),
        "waited": sum(row["waited"] for row in made.history) / len(made.history),
    }
    if not made.best_epoch:
        say("fine-tune validation did not improve over the head alone, which is published")
        return before, told, made.history
    began = time.monotonic()
    weights = tuning.merged(before.weights, made)
    told["fingerprint"] = weights.fingerprint
    reference = ray.put(weights.convolutions)
    mean, deviation = before.result.mean, before.result.deviation
    head = fold_standardisation(made.head, mean=mean, deviation=deviation)
    plain = settings.model_copy(update={"views": 1})

    def judge(computed: _Features) -> tuning.Judged:
        judged = _head_job(
            plain,
            index,
            weights,
            reference,
            computed,
            precision=precision,
            batch_size=batch_size,
        )
        return tuning.judge(judged, head)

    found = _on_whole_features(
        lambda: _features(plain, index, weights, reference, precision, batch_size, machines), judge
    )
    result = replace(before.result, **found.changes)
    seconds["fine_tuned_features"] = time.monotonic() - began
    return _Network(weights, reference, found.head, result), told, made.history


def _tune_stages(
    job: tuning.TuneJob,
    run: str,
    *,
    workers: int | tuple[int, int],
    cpus: float,
    gpu: bool,
    survival: Survival,
    watchers: Sequence[Callable[[dict[str, float]], None]],
) -> tuple[tuning.Tuned, list[Restart]]:
    examples, epochs = job.index.examples("train"), job.settings.epochs
    batch = min(job.settings.batch_size, examples)
    total = epochs * steps_per_epoch(examples, batch) * batch
    with terminal.progress("fine-tune", total) as advance:

        def on_epoch(row: dict[str, float]) -> None:
            say(_epoch_line(row, epochs) + ("   best" if row["best"] else ""))
            for watch in watchers:
                watch(row)

        return tuning.fine_tune(
            job,
            count=workers,
            cpus_per_worker=cpus,
            gpu=gpu,
            storage_path=run,
            on_epoch=on_epoch,
            on_images=advance,
            survival=survival,
        )


def _identity(
    settings: TrainSettings, index: ShardIndex, weights: backbone.Weights, precision: str
) -> dict[str, Any]:
    """What a checkpoint must agree with."""
    return _decisive(settings.model_dump(mode="json")) | {
        "data": index.fingerprint,
        "weights_fingerprint": weights.fingerprint,
        "precision": precision,
    }


def _csv(history: Sequence[Mapping[str, float]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]))
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def _write_results(
    run: str,
    history: Sequence[dict[str, float]],
    tuned_history: Sequence[dict[str, float]],
    scores: Mapping[str, Any],
    index: ShardIndex,
    events: tensorboard.EventLog,
    restarts: Sequence[Mapping[str, Any]],
) -> None:
    from leafnet import plots  # matplotlib, which takes half a second to import

    storage.write_bytes(storage.join(run, "history.csv"), _csv(history))
    # Beside the splits only where there is something to tell.
    told = {"restarts": restarts} if restarts else {}
    storage.write_json(storage.join(run, "metrics.json"), {**scores, **told})
    storage.write_bytes(storage.join(run, "curves.png"), plots.curves_png(history))
    shown = next(iter(scores))
    confusion = plots.confusion_png(
        scores[shown]["confusion"], index.class_names, title=f"{shown} split"
    )
    storage.write_bytes(storage.join(run, "confusion.png"), confusion)
    events.results(
        history,
        scores,
        images={"confusion": confusion},
        samples=tensorboard.sample_photographs(index, shown),
        fine_tune=tuned_history,
    )
    before = scores[shown].get("before_temperature", {"calibration": (), "ece": 0.0})
    storage.write_bytes(
        storage.join(run, "reliability.png"),
        plots.reliability_png(
            scores[shown]["calibration"],
            ece=scores[shown]["ece"],
            before=before["calibration"],
            ece_before=before["ece"],
        ),
    )


def _provenance(
    settings: TrainSettings,
    index: ShardIndex,
    weights: backbone.Weights,
    precision: str,
    scores: Mapping[str, Any],
    state: checkpoint.TrainState,
) -> dict[str, Any]:
    return {
        "trained_at": _now(),
        "precision": precision,
        "head": ", ".join(map(str, [*settings.head.units, len(index.class_names)])) + " units",
        "backbone": {"source": weights.source, "fingerprint": weights.fingerprint},
        "data": {
            "shards": index.root,
            "fingerprint": index.fingerprint,
            "examples": {split: index.examples(split) for split in SPLITS},
        },
        "best_epoch": state.best_epoch,
        "metrics": dict(scores),
        "settings": settings.model_dump(mode="json"),
        "versions": bundle.versions(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _say_results(
    run: str,
    scores: Mapping[str, Any],
    model_id: str,
    seconds: float,
    state: checkpoint.TrainState,
) -> None:
    say_scores(scores)
    say()
    say(f"model     {storage.join(run, 'model')}   id {model_id}, of epoch {state.best_epoch}")
    say(f"also in   {run}: metrics.json history.csv curves.png confusion.png reliability.png")
    say("          config.yaml, and evaluation/ with the mistakes worth a look")
    say(f"log       {storage.join(run, 'train.log')}")
    say(f"done in {terminal.duration(seconds)}")


def say_scores(scores: Mapping[str, Any]) -> None:
    """Print a table of results: a row a split, then the classes of the first split."""
    say()
    terminal.table(
        "",
        ["split", "images", "accuracy", "95 % interval", "macro F1", "log loss", "ECE"],
        [
            [
                split,
                f"{of_split['examples']:,}",
                f"{of_split['accuracy']:.3f}",
                f"{of_split['accuracy_low']:.3f} to {of_split['accuracy_high']:.3f}",
                f"{of_split['macro_f1']:.3f}",
                f"{of_split['log_loss']:.3f}",
                f"{of_split['ece']:.3f}",
            ]
            for split, of_split in scores.items()
        ],
    )
    first = next(iter(scores))
    say()
    terminal.table(
        "",
        [f"class ({first})", "images", "precision", "recall", "F1"],
        [
            [
                name,
                f"{of_class['support']:,}",
                f"{of_class['precision']:.3f}",
                f"{of_class['recall']:.3f}",
                f"{of_class['f1']:.3f}",
            ]
            for name, of_class in scores[first]["per_class"].items()
        ],
    )
