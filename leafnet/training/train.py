"""What jobs/train.py does, in the order in which it happens."""

import shlex
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from leafnet.core import lock, storage, terminal
from leafnet.core import settings as core_settings
from leafnet.core.terminal import say
from leafnet.evaluation import document, evaluate
from leafnet.metrics import drift
from leafnet.metrics.thresholds import Review
from leafnet.models import bundle, openvino
from leafnet.reporting import pages
from leafnet.training import dry_run, publish, report
from leafnet.training.check import check, finished
from leafnet.training.run import Run, open_run
from leafnet.training.settings import TrainSettings
from leafnet.training.stages import Features, Fitted, choose_head, extract, fine_tune, fit_head


@dataclass(frozen=True)
class _Int8:
    """The quantized network, and what model.json says of it."""

    model: openvino.Int8 | None = None  # None: not asked for, or refused
    review: Review | None = None  # thresholds of its own
    report: dict[str, Any] = field(default_factory=dict)


def run(settings: TrainSettings) -> None:
    """Train and publish a model at `out`/`name`, going on where an earlier start stopped.

    Raises:
        UserError: something in the settings, the data or the weights is wrong; another job trains
            under this name (exit code 3).
    """
    began = time.monotonic()
    plan = check(settings)  # refuses what can be refused, before a machine is taken
    if plan is None:
        return  # the run is finished
    settings = plan.settings
    if settings.dry_run:
        dry_run.run(plan)
        return
    with lock.hold(plan.url, timeout_s=settings.lock_timeout) as held:
        if finished(settings, plan.index):
            return  # by another job, which had the run until now
        with open_run(plan, held, began) as run:
            with run.stage("features"):
                features = extract(run, run.network, views=plan.views)
            searched = None
            if settings.head.search or settings.cross_validate:
                with run.stage("search"):
                    searched = choose_head(run, features)
            with run.stage("head"):
                fitted = fit_head(run, features, searched)
            if settings.fine_tune.blocks:
                fitted = fine_tune(run, fitted)  # the head alone where validation did not gain
            with run.stage("publish"):
                model_id = _publish(run, fitted)
            with run.stage("evaluation"):
                _evaluate(run, fitted, model_id)
            _finish(run, features, fitted, model_id)


def _publish(run: Run, fitted: Fitted) -> str:
    """Write the scores and the model; returns its id."""
    plan, result, scores = run.plan, fitted.result, fitted.scores
    temperature = publish.calibrated(result, scores, plan.index.class_names)
    run.lock.check()
    restarts = [vars(one) for one in result.restarts]
    publish.write(run.url, result.state.history, scores, restarts)
    review, effects = publish.thresholds(fitted.settings, result)
    int8 = _quantize(run, fitted)
    provenance = publish.provenance(
        fitted.settings, plan.index, plan.weights, run.resources.precision, scores, result.state
    )
    sections = {
        "temperature": temperature,
        "fine_tune": fitted.tuning,
        "review": effects,
        "reference": drift.reference(result.outcomes["valid"]) if review else {},
        "int8": int8.report,
        "prevalence": publish.bias(result),
    }
    run.lock.check()
    return bundle.save(
        storage.join(run.url, "model"),
        convolutions=fitted.network.weights.convolutions,
        head=fitted.head,
        class_names=plan.index.class_names,
        image_size=plan.settings.image_size,
        provenance=provenance | {name: value for name, value in sections.items() if value},
        novelty=result.novelty if review else None,
        review=review,
        int8=int8.model,
        int8_review=int8.review,
    )


def _quantize(run: Run, fitted: Fitted) -> _Int8:
    if not fitted.settings.int8:
        return _Int8()
    with run.stage("int8"):
        return _Int8(
            *publish.quantized(
                fitted.settings,
                run.plan.index,
                fitted.network.reference,
                fitted.head,
                fitted.result,
                run.resources.machines,
            )
        )


def _evaluate(run: Run, fitted: Fitted, model_id: str) -> None:
    """Write the pictures, and the evaluation with its gallery."""
    settings = run.plan.settings
    publish.draw(
        run.url,
        fitted.result.state.history,
        fitted.tuning_history,
        fitted.scores,
        run.plan.index,
        run.events,
    )
    evaluate.after_training(
        storage.join(run.url, "evaluation"),
        run.plan.index,
        answers=fitted.result.answers,
        model_url=storage.join(run.url, "model"),
        model_id=model_id,
        convolutions=fitted.network.reference,
        head=fitted.head,
        image_size=settings.image_size,
        precision=run.resources.precision,
        machines=run.resources.machines,
        # What random weights see says nothing.
        explain=settings.explain and settings.weights != "random",
    )


def _finish(run: Run, features: Features, fitted: Fitted, model_id: str) -> None:
    """Write run.json, which says that the run is finished, and the report; print the results."""
    state, scores = fitted.result.state, fitted.scores
    model, seconds = storage.join(run.url, "model"), time.monotonic() - run.began
    storage.write_json(
        storage.join(run.url, "run.json"), _facts(run, features, fitted, model_id, seconds)
    )
    report_url = pages.place_of(lambda: report.write(run.url))
    run.tracker.results(
        state.history,
        scores,
        tags={"model_id": model_id, "model": model},
        parameters=core_settings.flat(fitted.settings.model_dump(mode="json")),
        fine_tune=fitted.tuning_history,
    )
    epoch = f"of epoch {state.best_epoch}"
    if fitted.tuned:
        epoch = f"fine-tuned, of epoch {fitted.tuning['best_epoch']}"
    publish.say_results(run.url, scores, model_id, seconds, epoch)
    say(f"report    {report_url}")
    terminal.result(run=run.url, model=model, model_id=model_id, metrics=document.figures(scores))


def _facts(
    run: Run, features: Features, fitted: Fitted, model_id: str, seconds: float
) -> dict[str, Any]:
    """What run.json says."""
    state, resources = fitted.result.state, run.resources
    examples = run.plan.index.examples("train")
    of_stages = run.seconds | {"total": seconds}
    return {
        "model_id": model_id,
        "finished_at": publish.now(),
        "seconds": {stage: round(value, 2) for stage, value in of_stages.items()},
        "images_per_second": {
            "features": round(features.computed / run.seconds["features"], 1),
            "head": round(state.epoch * examples / run.seconds["head"], 1),
        },
        "command": shlex.join(["python", *sys.argv]),
        "workers": resources.workers
        if isinstance(resources.workers, int)
        else run.plan.settings.workers,
        "restarts": [vars(one) for one in fitted.result.restarts],
        "gpus": resources.machines.gpus,
        "precision": resources.precision,
        "epochs": state.epoch,
        "best_epoch": state.best_epoch,
        "versions": bundle.versions(),
    } | ({"fine_tune": fitted.tuning} if fitted.tuning else {})
