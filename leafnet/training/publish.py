"""What a finished fit says and leaves: scores, thresholds, int8, the files and lines of a run."""

import csv
import io
import subprocess
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from leafnet.core import storage, terminal
from leafnet.core.terminal import say
from leafnet.data.groups import groups_of_split
from leafnet.data.shards import SPLITS, ShardIndex
from leafnet.distributed import resources
from leafnet.evaluation import document, tables
from leafnet.metrics import calibration, drift, prevalence
from leafnet.metrics import scores as metrics_scores
from leafnet.metrics import thresholds as metrics_thresholds
from leafnet.metrics.scores import tally
from leafnet.metrics.thresholds import REVIEW_ALL, Outcomes, Review, choose, describe
from leafnet.models import bundle, openvino
from leafnet.models.classifier import Head
from leafnet.models.weights import Weights
from leafnet.training import quantize, tensorboard
from leafnet.training.head import worker
from leafnet.training.head.state import TrainState
from leafnet.training.settings import TrainSettings

# More have no biases for corrected shares: of each a row of their covariance would be published.
_MAX_CORRECTED = 100


def scores(result: worker.HeadResult, index: ShardIndex) -> dict[str, Any]:
    """The scores of each split that has examples, all of which must have been evaluated."""
    for split in SPLITS:
        if result.tallies[split].examples != index.examples(split):
            raise RuntimeError(
                f"evaluated {result.tallies[split].examples} examples of {split}, which has "
                f"{index.examples(split)}"
            )
    of_splits = {
        split: metrics_scores.scores(result.tallies[split], index.class_names)
        for split in reversed(SPLITS)
        if index.examples(split)
    }
    for split, (logits, labels) in result.answers.items():
        groups = groups_of_split(index, split)
        correct = logits.argmax(axis=1) == labels
        of_splits[split] |= document.grouped(of_splits[split], correct, labels, groups)
    return of_splits


def calibrated(
    result: worker.HeadResult, scores: dict[str, Any], class_names: Sequence[str]
) -> dict[str, Any]:
    """What the temperature did, for model.json; {} where there was nothing to fit it on.

    Adds to `scores` of validation and test what they were without it, and the accuracy of the most
    confident 90 %.
    """
    for split, outcomes in result.outcomes.items():
        name = f"selective_accuracy_{100 * document.COVERAGE:.0f}"
        scores[split][name] = calibration.selective_accuracy(
            outcomes.confidence, outcomes.correct, coverage=document.COVERAGE
        )
    if "valid" not in result.outcomes:
        return {}
    temperature: dict[str, Any] = {
        "value": result.temperature,
        "fitted_on": "valid",
        "examples": len(result.answers["valid"].labels),
        "folded_into": "the last layer of the head",
        "ece": {},
    }
    for split, (logits, labels) in result.answers.items():
        raw = np.asarray(logits * np.float32(result.temperature))
        before = metrics_scores.scores(tally(raw, labels), class_names)
        scores[split]["before_temperature"] = {
            name: before[name] for name in ("log_loss", "ece", "calibration")
        }
        temperature["ece"][split] = {"before": before["ece"], "after": scores[split]["ece"]}
    shown = ", ".join(
        f"{split} ECE {ece['before']:.3f} -> {ece['after']:.3f}"
        for split, ece in temperature["ece"].items()
    )
    say(f"calibrate temperature {result.temperature:.3f}: {shown}")
    return temperature


def bias(result: worker.HeadResult) -> dict[str, Any]:
    """What corrects the shares of nights, for model.json; {} where no example was held out."""
    held_out = [result.answers[split] for split in ("valid", "test") if split in result.answers]
    if not held_out:
        return {}
    logits, labels = (np.concatenate(part) for part in zip(*held_out, strict=True))
    if logits.shape[1] > _MAX_CORRECTED:
        return {}
    return prevalence.document(prevalence.fit_bias(logits, labels))


def thresholds(
    settings: TrainSettings, result: worker.HeadResult
) -> tuple[Review | None, dict[str, Any]]:
    """Thresholds, and what they do to validation and test; none without a validation split."""
    if "valid" not in result.outcomes:
        say("review    no thresholds: they are chosen on the validation split, which is empty")
        return None, {}
    chosen = _choose(settings, result.outcomes["valid"])
    effects = {
        split: metrics_thresholds.effect(outcomes, chosen)
        for split, outcomes in result.outcomes.items()
    }
    for split, effect in effects.items():
        say(f"review    {split}: {describe(effect)}")
    if chosen.confidence == REVIEW_ALL:
        say(
            f"          no confidence gives {settings.precision_target:.0%} right predictions: "
            "every photograph is for review; lower --precision_target or train better"
        )
    elif settings.precision_guarantee is None:
        say(
            "          chosen and counted on the same validation split: on new photographs the "
            "target is missed"
        )
        say("          about as often as met; --precision_guarantee 0.9 asks for more")
    _, unlike = metrics_thresholds.novelty_rank(len(result.outcomes["valid"].novelty))
    return chosen, {
        "share_reviewed": effects["valid"]["share_reviewed"],
        "splits": effects,
        "precision_guarantee": settings.precision_guarantee,
        "share_unlike_expected": unlike,
    }


def _choose(settings: TrainSettings, valid: Outcomes) -> Review:
    return choose(
        valid,
        precision_target=settings.precision_target,
        guarantee=settings.precision_guarantee,
    )


def quantized(
    settings: TrainSettings,
    index: ShardIndex,
    reference: Any,
    head: Head,
    result: worker.HeadResult,
    machines: resources.Machines,
) -> tuple[openvino.Int8 | None, Review | None, dict[str, Any]]:
    """The quantized backbone and its thresholds, None if refused; and a report."""
    candidate = quantize.quantize(
        index,
        reference,
        head,
        result.novelty,
        image_size=settings.image_size,
        machines=machines,
    )
    count = candidate.outcomes.correct.size
    accuracy = float(candidate.outcomes.correct.mean())
    of_float = float(result.outcomes["valid"].correct[:count].mean())
    accepted = quantize.accept_int8(accuracy, of_float)
    report: dict[str, Any] = {
        "accepted": accepted,
        "calibration_examples": candidate.calibration_examples,
        "valid_examples": count,
        "valid_accuracy": accuracy,
        "valid_accuracy_float": of_float,
    }
    comparison = f"validation accuracy {accuracy:.4f}, {of_float:.4f} in floating point"
    if not accepted:
        say(
            f"int8      {comparison}: refused, it falls by more than 0.5 points; "
            "published without int8"
        )
        return None, None, report
    say(f"int8      {comparison}: kept")
    # Rounding to 8 bits moves every photograph away from the training features.
    chosen = _choose(settings, candidate.outcomes)
    effect = metrics_thresholds.effect(candidate.outcomes, chosen)
    say(f"review    valid in int8: {describe(effect)}")
    report["review"] = {"share_reviewed": effect["share_reviewed"], "splits": {"valid": effect}}
    report["reference"] = drift.reference(candidate.outcomes)
    return candidate.int8, chosen, report


def short(scores: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each split what two models are compared by."""
    names = ("accuracy", "log_loss", "ece")
    return {split: {name: of_split[name] for name in names} for split, of_split in scores.items()}


def gain(tuned: Mapping[str, Any]) -> str:
    """Accuracy of the head alone and after fine-tuning.

    >>> of = {"test": {"accuracy": 0.9}}
    >>> gain({"head_alone": of, "fine_tuned": {"test": {"accuracy": 0.95}}, "best_epoch": 7})
    'of epoch 7: test accuracy 0.900 -> 0.950'
    """
    gains = (
        f"{split} accuracy {before['accuracy']:.3f} -> {tuned['fine_tuned'][split]['accuracy']:.3f}"
        for split, before in tuned["head_alone"].items()
    )
    return f"of epoch {tuned['best_epoch']}: {', '.join(gains)}"


def write(
    run: str,
    history: Sequence[dict[str, float]],
    scores: Mapping[str, Any],
    restarts: Sequence[Mapping[str, Any]],
) -> None:
    """Write metrics.json and the history of a run."""
    storage.write_bytes(storage.join(run, "history.csv"), csv_bytes(history))
    # Beside the splits only where there is something to tell.
    more = {"restarts": restarts} if restarts else {}
    storage.write_json(storage.join(run, "metrics.json"), {**scores, **more})


def draw(
    run: str,
    history: Sequence[dict[str, float]],
    tuned_history: Sequence[dict[str, float]],
    scores: Mapping[str, Any],
    index: ShardIndex,
    events: tensorboard.EventLog,
) -> None:
    """Write the pictures of a run, and end its TensorBoard log.

    Whatever goes wrong is told and no more: the model is published before.
    """
    try:
        _draw(run, history, tuned_history, scores, index, events)
    except Exception as error:
        traceback.print_exc()
        say(f"warning   no pictures of the run: {type(error).__name__}: {error}")


def _draw(
    run: str,
    history: Sequence[dict[str, float]],
    tuned_history: Sequence[dict[str, float]],
    scores: Mapping[str, Any],
    index: ShardIndex,
    events: tensorboard.EventLog,
) -> None:
    from leafnet.reporting import plots  # matplotlib, which takes half a second to import

    storage.write_bytes(storage.join(run, "curves.png"), plots.curves_png(history))
    shown = next(iter(scores))
    confusion = plots.confusion_png(
        scores[shown]["confusion"],
        scores[shown]["confusion_classes"],
        title=f"{shown} split",
        of=len(index.class_names),
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


def csv_bytes(history: Sequence[Mapping[str, float]]) -> bytes:
    """A row an epoch, under the names of the first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]))
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def provenance(
    settings: TrainSettings,
    index: ShardIndex,
    weights: Weights,
    precision: str,
    scores: Mapping[str, Any],
    state: TrainState,
) -> dict[str, Any]:
    """What model.json tells of where a model comes from."""
    return {
        "trained_at": now(),
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


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def say_results(
    run: str,
    scores: Mapping[str, Any],
    model_id: str,
    seconds: float,
    made_of: str,
) -> None:
    """Print the scores, and where to find what was made."""
    tables.say_scores(scores)
    say()
    say(f"model     {storage.join(run, 'model')}   id {model_id}, {made_of}")
    say(f"also in   {run}: metrics.json history.csv curves.png confusion.png reliability.png")
    say("          config.yaml, and evaluation/ with the mistakes worth a look")
    say(f"log       {storage.join(run, 'train.log')}")
    say(f"done in {terminal.duration(seconds)}")
