"""What jobs/train.py does, in the order in which it happens."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import ray
import yaml

from leafnet.core import errors, lock, storage, terminal
from leafnet.core import settings as core_settings
from leafnet.core.errors import UserError
from leafnet.core.lock import Lock
from leafnet.core.settings import to_yaml
from leafnet.core.terminal import say
from leafnet.data import shards
from leafnet.data.shards import SPLITS, ShardIndex
from leafnet.distributed import checkpoint, resources, session
from leafnet.distributed.failures import Restart
from leafnet.distributed.group import Survival
from leafnet.evaluation import document, evaluate
from leafnet.features import cache as features_cache
from leafnet.features import extraction
from leafnet.features.cache import Part, cache_key, evict, mark_used
from leafnet.metrics import drift
from leafnet.models import bundle, classifier, openvino
from leafnet.models.classifier import Head, fold_standardisation
from leafnet.models.weights import Weights, load_weights
from leafnet.reporting import pages
from leafnet.training import dry_run, mlflow, publish, report, tensorboard
from leafnet.training.finetune import worker as finetune_worker
from leafnet.training.finetune.fit import check_batch
from leafnet.training.head import cross_validation, search
from leafnet.training.head import worker as head_worker
from leafnet.training.loop import steps_per_epoch
from leafnet.training.settings import TrainSettings, describe_stages

# Settings that change where and how fast a run computes, and not what.
_PLACEMENT = (
    *("out", "shards", "workers", "gpu", "batch_size", "dry_run", "lock_timeout", "explain"),
    *("max_failures", "hang_timeout", "note"),
    *("data.", "cache.", "checkpoint.", "mlflow.", "ray."),
)

Made = TypeVar("Made")


class _Features(NamedTuple):
    """Where the features of each split are, and what a forward pass was like."""

    root: str
    parts: dict[str, tuple[Part, ...]]
    views: int
    computed: int  # views that were not in the cache


class _Network(NamedTuple):
    """A network with its head, and how they do."""

    weights: Weights
    reference: Any  # to `weights.convolutions`, in Ray's object store
    head: Head  # on raw features
    result: head_worker.HeadResult


def run(settings: TrainSettings) -> None:
    """Train and publish a model at `out`/`name`, going on where an earlier start stopped.

    Raises:
        UserError: something in the settings, the data or the weights is wrong; another job trains
            under this name (exit code 3).
    """
    settings = settings.model_copy(
        update={"out": storage.absolute(settings.out), "shards": storage.absolute(settings.shards)}
    )
    run = storage.join(settings.out, settings.name)
    index = shards.open_index(settings.shards, settings.data)
    shards.check_sizes(index)
    _check_data(index)
    _check_search(settings, index)
    if settings.int8:
        _check_int8(index)
    mlflow.check(settings.mlflow)
    if _nothing_to_do(run, settings, index):
        return
    began = time.monotonic()
    # What can be refused is refused before there is a folder of the run, or a machine is taken.
    lock.refuse_held(run)
    weights = load_weights(settings.weights, seed=settings.seed)
    if settings.dry_run:
        dry_run.run(settings, run, index, weights, views=_views(settings))
        return
    terminal.keeps(f"features and checkpoints are kept in {settings.out}")
    with lock.hold(run, timeout_s=settings.lock_timeout) as held:
        # Another job may have had the run until now.
        if _nothing_to_do(run, settings, index):
            return
        started_before = storage.exists(storage.join(run, "config.yaml"))
        with terminal.log_to(run, "train.log"):
            say(f"run {run}" + ("   goes on where it stopped" if started_before else ""))
            storage.write_bytes(storage.join(run, "config.yaml"), to_yaml(settings).encode())
            with (
                mlflow.follow(
                    settings.mlflow,
                    run,
                    name=settings.name,
                    parameters=core_settings.flat(settings.model_dump(mode="json")),
                ) as tracker,
                session.session(settings.ray) as found,
                terminal.sigterm_interrupts(),
            ):
                nodes = session.with_gpus(found, settings.gpu, settings.workers, settings.ray, say)
                _train_on(nodes, settings, run, index, weights, began, held, tracker)


def _nothing_to_do(run: str, settings: TrainSettings, index: ShardIndex) -> bool:
    """True when the run is finished, and says so."""
    finished = _check_same_settings(run, settings) and _finished(run, index)
    if finished:
        say(f"{run} is finished: {storage.join(run, 'model')}; nothing to do")
    return finished


def _train_on(
    nodes: list[resources.Node],
    settings: TrainSettings,
    run: str,
    index: ShardIndex,
    weights: Weights,
    began: float,
    held: Lock,
    tracker: mlflow.Tracker,
) -> None:
    events = tensorboard.EventLog(run)
    seconds: dict[str, float] = {}
    machines = resources.machines(nodes, settings.gpu)
    workers, cpus = resources.workers_for(nodes, settings.workers, machines.gpus)
    precision, why = session.choose_precision(settings.precision, gpu=machines.gpus > 0)
    batch_size = resources.batch_size(settings.batch_size, gpus=machines.gpus)
    if settings.fine_tune.blocks:
        check_batch(
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

    def fit(computed: _Features) -> tuple[_Features, head_worker.HeadJob, head_worker.HeadResult]:
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
    head = classifier.fold_temperature(head, result.temperature)
    scores = publish.scores(result, index)
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
            tuned["head_alone"] = publish.short(scores)
            scores = publish.scores(network.result, index)
            tuned["fine_tuned"] = publish.short(scores)
            say(f"fine-tune {publish.gain(tuned)}")
    result = network.result
    calibrated = publish.calibrated(result, scores, index.class_names)
    held.check()
    restarts = [vars(one) for one in result.restarts]
    publish.write(run, result.state.history, tuned_history, scores, index, events, restarts)
    thresholds, effects = publish.thresholds(settings, result)
    int8, int8_review = None, None
    int8_report: dict[str, Any] = {}
    if settings.int8:
        began_stage = time.monotonic()
        int8, int8_review, int8_report = publish.quantized(
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
        provenance=publish.provenance(settings, index, weights, precision, scores, result.state)
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
    items = evaluate.after_training(
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
            "finished_at": publish.now(),
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
        parameters=core_settings.flat(settings.model_dump(mode="json")),
        fine_tune=tuned_history,
    )
    made_of = f"of epoch {result.state.best_epoch}"
    if network.weights is not weights:
        made_of = f"fine-tuned, of epoch {tuned['best_epoch']}"
    publish.say_results(run, scores, model_id, seconds["total"], made_of)
    say(f"report    {told}")
    terminal.result(
        run=run,
        model=storage.join(run, "model"),
        model_id=model_id,
        metrics=document.figures(scores),
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
    if not openvino.installed(quantizer=True):
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


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change the result, flat: dotted name -> value."""
    flat = core_settings.flat(settings)
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
    machines: resources.Machines,
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
    say(f"device    {resources.device(machines.gpus)}, {precision} ({why})")
    say(
        f"head      {settings.head.epochs} epochs of {steps} steps = "
        f"{settings.head.epochs * steps:,}; {dry_run.shared_out(batch, workers)}"
    )
    if settings.fine_tune.blocks:
        tuned = settings.fine_tune
        batch = min(tuned.batch_size, examples)
        say(
            f"fine-tune {describe_stages(tuned.blocks)}, {tuned.epochs} epochs of "
            f"{steps_per_epoch(examples, batch)} steps; global batch {batch}"
        )


def _on_whole_features(compute: Callable[[], _Features], use: Callable[[_Features], Made]) -> Made:
    """`use` of the features of `compute`; parts that turn out damaged are computed again."""
    for last in (False, False, True):
        computed = compute()
        try:
            return use(computed)
        except errors.DamagedParts as error:
            if last:
                raise
            say(f"{error}; computing them again")
            for name in error.names:
                storage.delete(storage.join(computed.root, name))
    raise AssertionError("the last attempt returns or raises")


def _features(
    settings: TrainSettings,
    index: ShardIndex,
    weights: Weights,
    reference: Any,
    precision: str,
    batch_size: int,
    machines: resources.Machines,
) -> _Features:
    """Compute what the cache lacks."""
    cache = storage.absolute(settings.cache.url or storage.join(settings.out, "features"))
    key = cache_key(
        weights_fingerprint=weights.fingerprint,
        image_size=settings.image_size,
        precision=precision,
    )
    root, views = storage.join(cache, key), _views(settings)
    wanted = [(shard, views if shard.split == "train" else 1) for shard in index.shards]
    plan = features_cache.plan(root, wanted, seed=settings.seed)
    mark_used(root)
    if settings.cache.max_gb is not None:
        for name in evict(cache, max_gb=settings.cache.max_gb, keep=key):
            say(f"evicted {storage.join(cache, name)} from the cache")
    total = sum(part.rows * (part.stop - part.first) for part in plan.parts)
    missing = sum(part.rows * (part.stop - part.first) for part in plan.missing)
    if missing < total:
        say(f"features  {total - missing:,} of {total:,} views are in the cache {root}")
    if plan.missing:
        with terminal.progress("features", missing, unit="views") as advance:
            extraction.extract(
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
    weights: Weights,
    reference: Any,
    computed: _Features,
    *,
    precision: str,
    batch_size: int,
) -> head_worker.HeadJob:
    online = None
    if settings.features == "online":
        online = head_worker.Online(
            root=index.root,
            shards=index.of_split("train"),
            weights=reference,
            image_size=settings.image_size,
            precision=precision,
            augment=settings.augment,
            batch_size=batch_size,
            shards_cache=index.cache,
        )
    return head_worker.HeadJob(
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
    job: head_worker.HeadJob,
    settings: TrainSettings,
    index: ShardIndex,
    nodes: list[resources.Node],
    run: str,
    seconds: dict[str, float],
) -> head_worker.HeadJob:
    """`job` with the head settings that a search found; and the accuracy over folds."""
    began = time.monotonic()
    if settings.head.search:
        head = search.search(job, count=settings.head.search, nodes=nodes, run=run)
        searched = {
            f"searched.{name}": value for name, value in head.model_dump(mode="json").items()
        }
        job = replace(job, head=head, identity=job.identity | searched)
    if settings.cross_validate:
        cross_validation.cross_validate(
            job, index, count=settings.cross_validate, nodes=nodes, run=run
        )
    if settings.head.search or settings.cross_validate:
        seconds["search"] = time.monotonic() - began
    return job


def _fit_head(
    job: head_worker.HeadJob,
    run: str,
    *,
    workers: int | tuple[int, int],
    cpus: float,
    gpu: bool,
    survival: Survival,
    watchers: Sequence[Callable[[dict[str, float]], None]],
) -> head_worker.HeadResult:
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

        return head_worker.fit_head(
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


def _fine_tune(
    settings: TrainSettings,
    index: ShardIndex,
    before: _Network,
    *,
    precision: str,
    batch_size: int,
    machines: resources.Machines,
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
    job = finetune_worker.TuneJob(
        settings=settings.fine_tune,
        class_names=index.class_names,
        class_weights=settings.head.class_weights,
        seed=settings.seed,
        save_every_s=settings.checkpoint.every_seconds,
        save_every_steps=settings.checkpoint.every_steps,
        identity=_identity(settings, index, before.weights, precision),
        index=index,
        weights=before.reference,
        probe=ray.put(
            finetune_worker.Probe(state.best_head, before.result.mean, before.result.deviation)
        ),
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
    storage.write_bytes(storage.join(run, "fine_tune.csv"), publish.csv_bytes(made.history))
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
    weights = finetune_worker.merged(before.weights, made)
    told["fingerprint"] = weights.fingerprint
    reference = ray.put(weights.convolutions)
    mean, deviation = before.result.mean, before.result.deviation
    head = fold_standardisation(made.head, mean=mean, deviation=deviation)
    plain = settings.model_copy(update={"views": 1})

    def judge(computed: _Features) -> finetune_worker.Judged:
        judged = _head_job(
            plain,
            index,
            weights,
            reference,
            computed,
            precision=precision,
            batch_size=batch_size,
        )
        return finetune_worker.judge(judged, head)

    found = _on_whole_features(
        lambda: _features(plain, index, weights, reference, precision, batch_size, machines), judge
    )
    result = replace(before.result, **found.changes)
    seconds["fine_tuned_features"] = time.monotonic() - began
    return _Network(weights, reference, found.head, result), told, made.history


def _tune_stages(
    job: finetune_worker.TuneJob,
    run: str,
    *,
    workers: int | tuple[int, int],
    cpus: float,
    gpu: bool,
    survival: Survival,
    watchers: Sequence[Callable[[dict[str, float]], None]],
) -> tuple[finetune_worker.Tuned, list[Restart]]:
    examples, epochs = job.index.examples("train"), job.settings.epochs
    batch = min(job.settings.batch_size, examples)
    total = epochs * steps_per_epoch(examples, batch) * batch
    with terminal.progress("fine-tune", total) as advance:

        def on_epoch(row: dict[str, float]) -> None:
            say(_epoch_line(row, epochs) + ("   best" if row["best"] else ""))
            for watch in watchers:
                watch(row)

        return finetune_worker.fine_tune(
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
    settings: TrainSettings, index: ShardIndex, weights: Weights, precision: str
) -> dict[str, Any]:
    """What a checkpoint must agree with."""
    return _decisive(settings.model_dump(mode="json")) | {
        "data": index.fingerprint,
        "weights_fingerprint": weights.fingerprint,
        "precision": precision,
    }
