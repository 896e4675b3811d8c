"""The stages of a run that learn: features, the search, the head, and fine-tuning."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import ray
import ray.exceptions

from leafnet.core import storage, terminal
from leafnet.core.errors import DamagedParts, UserError
from leafnet.core.terminal import say
from leafnet.data.shards import SPLITS
from leafnet.distributed.failures import Restart
from leafnet.features import extraction
from leafnet.features.cache import Part, evict, mark_used
from leafnet.models import classifier
from leafnet.models.classifier import Head, fold_standardisation
from leafnet.training import publish
from leafnet.training.check import identity
from leafnet.training.finetune import worker as finetune_worker
from leafnet.training.head import cross_validation, search
from leafnet.training.head import worker as head_worker
from leafnet.training.head.worker import HeadJob, HeadResult
from leafnet.training.run import Network, Run
from leafnet.training.settings import HeadSettings, TrainSettings

# Parts of the cache that turn out damaged are computed again this often; more is no accident.
_REPAIRS = 2

Result = TypeVar("Result")


@dataclass(frozen=True)
class Features:
    """Where the features of each split by a network are."""

    network: Network
    root: str  # CACHE/KEY
    parts: dict[str, tuple[Part, ...]]
    views: int  # of each training image
    computed: int  # views that were not in the cache


@dataclass(frozen=True)
class Fitted:
    """A network with its head, and how they do."""

    settings: TrainSettings  # of the run, with those of the head that a search found
    network: Network
    head: Head  # on raw features
    result: HeadResult
    scores: dict[str, Any]  # of each split
    tuning: dict[str, Any] = field(default_factory=dict)  # what fine-tuning did, if it ran
    tuning_history: list[dict[str, float]] = field(default_factory=list)

    @property
    def tuned(self) -> bool:
        """True where the network is a fine-tuned one."""
        return bool(self.tuning) and self.tuning["published"]


def extract(run: Run, network: Network, *, views: int) -> Features:
    """Compute what the cache lacks of the features by `network`."""
    plan, resources = run.plan, run.resources
    cached = plan.features_of(network.weights, precision=resources.precision, views=views)
    mark_used(cached.root)
    if plan.settings.cache.max_gb is not None:
        key = cached.root.rpartition("/")[2]
        for name in evict(plan.cache, max_gb=plan.settings.cache.max_gb, keep=key):
            say(f"evicted {storage.join(plan.cache, name)} from the cache")
    total = sum(part.views for part in cached.parts)
    missing = sum(part.views for part in cached.missing)
    if missing < total:
        say(f"features  {total - missing:,} of {total:,} views are in the cache {cached.root}")
    if cached.missing:
        with terminal.progress("features", missing, unit="views") as advance:
            extraction.extract(
                plan.index,
                cached,
                network.reference,
                image_size=plan.settings.image_size,
                precision=resources.precision,
                batch_size=resources.batch_size,
                machines=resources.machines,
                advance=advance,
            )
    parts = {
        split: tuple(part for part in cached.parts if part.shard.split == split) for split in SPLITS
    }
    return Features(network, cached.root, parts, views, missing)


def _on_whole(run: Run, features: Features, use: Callable[[Features], Result]) -> Result:
    """`use` of `features`; parts that turn out damaged are computed again."""
    for _ in range(_REPAIRS):
        try:
            return use(features)
        except DamagedParts as error:
            say(f"{error}; computing them again")
            for name in error.names:
                storage.delete(storage.join(features.root, name))
            with run.stage("features"):
                features = extract(run, features.network, views=features.views)
    return use(features)


def _head_job(run: Run, features: Features, searched: HeadSettings | None = None) -> HeadJob:
    settings, resources, index = run.plan.settings, run.resources, run.plan.index
    agreed = identity(settings, index, features.network.weights, precision=resources.precision)
    if searched:
        values = searched.model_dump(mode="json").items()
        agreed |= {f"searched.{name}": value for name, value in values}
    return HeadJob(
        head=searched or settings.head,
        class_names=index.class_names,
        seed=settings.seed,
        save_every_s=settings.checkpoint.every_seconds,
        save_every_steps=settings.checkpoint.every_steps,
        identity=agreed,
        cache_root=features.root,
        parts=features.parts,
        views=features.views,
    )


def choose_head(run: Run, features: Features) -> HeadSettings | None:
    """The head settings that a search finds, if one is asked for; and the accuracy over folds."""
    settings, nodes = run.plan.settings, run.resources.nodes

    def choose(features: Features) -> HeadSettings | None:
        searched = None
        if settings.head.search:
            job = _head_job(run, features)
            searched = search.search(job, count=settings.head.search, nodes=nodes, run=run.url)
        if settings.cross_validate:
            cross_validation.cross_validate(
                _head_job(run, features, searched),
                run.plan.index,
                count=settings.cross_validate,
                nodes=nodes,
                run=run.url,
            )
        return searched

    return _on_whole(run, features, choose)


def fit_head(run: Run, features: Features, searched: HeadSettings | None) -> Fitted:
    """Fit the head, with the settings that a search found if there was one."""
    settings = run.plan.settings
    if searched:
        settings = settings.model_copy(update={"head": searched})
    result = _on_whole(
        run, features, lambda features: _fit_head(run, _head_job(run, features, searched))
    )
    head = fold_standardisation(
        result.state.best_head, mean=result.mean, deviation=result.deviation
    )
    head = classifier.fold_temperature(head, result.temperature)
    scores = publish.scores(result, run.plan.index)
    return Fitted(settings, features.network, head, result, scores)


def _fit_head(run: Run, job: HeadJob) -> HeadResult:
    best = float("inf")
    with terminal.progress("head", job.head.epochs, unit="epochs") as advance:

        def on_epoch(row: dict[str, float]) -> None:
            nonlocal best
            is_best = row.get("valid_loss", best) < best
            best = min(best, row.get("valid_loss", best))
            say(_epoch_line(row, job.head.epochs) + ("   best" if is_best else ""))
            run.events.epoch(row)
            run.tracker.epoch(row)
            advance(1)

        return head_worker.fit_head(job, run.placement, on_epoch=on_epoch)


def _epoch_line(row: Mapping[str, float], epochs: int) -> str:
    line = (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}   "
        f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.3f}"
    )
    if "valid_loss" in row:
        line += f"   valid loss {row['valid_loss']:.4f} accuracy {row['valid_accuracy']:.3f}"
    return line


def fine_tune(run: Run, fitted: Fitted) -> Fitted:
    """Train the last stages with the head; `fitted`'s network where validation did not gain."""
    index = run.plan.index
    storage.write_json(storage.join(run.url, "metrics_head.json"), fitted.scores)
    with run.stage("fine_tune"):
        tuned, restarts = _fine_tune(run, fitted)
    storage.write_bytes(storage.join(run.url, "fine_tune.csv"), publish.csv_bytes(tuned.history))
    tuning = _described(tuned, run.plan.settings, examples=index.examples("train"))
    fitted = replace(
        fitted,
        result=replace(fitted.result, restarts=fitted.result.restarts + restarts),
        tuning=tuning,
        tuning_history=tuned.history,
    )
    if not fitted.tuned:
        say("fine-tune validation did not improve over the head alone, which is published")
        return fitted
    with run.stage("fine_tuned_features"):
        network = Network.of(finetune_worker.merged(fitted.network.weights, tuned))
        judged = _judge(run, network, tuned.head, fitted.result)
    result = replace(fitted.result, **judged.changes)
    scores = publish.scores(result, index)
    tuning = tuning | {
        "fingerprint": network.weights.fingerprint,
        "head_alone": publish.short(fitted.scores),
        "fine_tuned": publish.short(scores),
    }
    say(f"fine-tune {publish.gain(tuning)}")
    return replace(
        fitted,
        network=network,
        head=judged.head,
        result=result,
        scores=scores,
        tuning=tuning,
    )


def _fine_tune(run: Run, fitted: Fitted) -> tuple[finetune_worker.Tuned, list[Restart]]:
    settings, resources, steps = fitted.settings, run.resources, run.plan.tuning_steps
    result = fitted.result
    job = finetune_worker.TuneJob(
        settings=settings.fine_tune,
        class_names=run.plan.index.class_names,
        class_weights=settings.head.class_weights,
        seed=settings.seed,
        save_every_s=settings.checkpoint.every_seconds,
        save_every_steps=settings.checkpoint.every_steps,
        identity=identity(
            settings, run.plan.index, fitted.network.weights, precision=resources.precision
        ),
        index=run.plan.index,
        weights=fitted.network.reference,
        probe=ray.put(finetune_worker.Probe(result.state.best_head, result.mean, result.deviation)),
        precision=resources.precision,
        image_size=settings.image_size,
        threads=resources.threads_per_worker,
    )
    with terminal.progress("fine-tune", steps.total * steps.batch) as advance:

        def on_epoch(row: dict[str, float]) -> None:
            say(_epoch_line(row, steps.epochs) + ("   best" if row["best"] else ""))
            run.events.fine_tune_epoch(row)
            run.tracker.fine_tune_epoch(row)

        return finetune_worker.fine_tune(job, run.placement, on_epoch=on_epoch, on_images=advance)


def _described(
    tuned: finetune_worker.Tuned, settings: TrainSettings, *, examples: int
) -> dict[str, Any]:
    seconds = sum(examples / row["images_per_s"] for row in tuned.history)
    return {
        "blocks": settings.fine_tune.blocks,
        "published": tuned.best_epoch > 0,
        "epochs": tuned.epoch,
        "best_epoch": tuned.best_epoch,
        # Without temperature, as the history; {} without a validation split.
        "head_alone_valid": tuned.head_alone,
        "images_per_s": len(tuned.history) * examples / seconds,
        "waited": sum(row["waited"] for row in tuned.history) / len(tuned.history),
    }


def _judge(
    run: Run, network: Network, tuned_head: Head, result: HeadResult
) -> finetune_worker.Judged:
    """How the fine-tuned network does on the plain views, which it computes for that."""
    head = fold_standardisation(tuned_head, mean=result.mean, deviation=result.deviation)
    try:
        return _on_whole(
            run,
            extract(run, network, views=1),
            lambda features: finetune_worker.judge(_head_job(run, features), head),
        )
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, UserError) or error.cause.reason != extraction.NOT_FINITE:
            raise
        rate = run.plan.settings.fine_tune.learning_rate
        raise UserError(
            "fine-tuning-diverged",
            f"fine-tuning has driven the network's features beyond all bounds, at "
            f"--fine_tune.learning_rate {rate:g}; train under another --name with a lower one",
        ) from None
