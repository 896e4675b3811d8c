"""What jobs/evaluate.py does, and what jobs/train.py says of its model at the end.

An evaluation is a document of plain JSON, `evaluation.json`, and a gallery of small photographs
beside it. `describe` makes of predictions all that can be said without the photographs.
"""

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from leafnet import (
    background,
    bundle,
    calibration,
    cluster,
    engine,
    gallery,
    inference,
    metrics,
    mistakes,
    openvino_graph,
    resampling,
    shards,
    slices,
    storage,
    terminal,
)
from leafnet.bundle import Bundle
from leafnet.classifier import Head
from leafnet.cluster import Machines
from leafnet.config import SPLITS, DataSettings, EvaluateSettings
from leafnet.errors import UserError
from leafnet.evaluation_tables import say_background, say_evaluation
from leafnet.images import decode
from leafnet.inference import Evaluated, Predictions
from leafnet.local_cache import LocalCache
from leafnet.metrics import softmax
from leafnet.shards import ShardIndex
from leafnet.terminal import say

DOCUMENT = "evaluation.json"
VERSION = 1
COVERAGE = 0.9
_LISTED = 50  # errors, suspected labels and disagreements that are kept, each
# Photographs that the probe of the background looks at when a run ends: one reading of a shard.
_PROBED = 400

Scores = dict[str, Any]


class Described(NamedTuple):
    """The examples of a split, with what is known of them beside the model's answers."""

    keys: Sequence[str]  # N
    labels: NDArray[np.integer]  # [N]
    logits: NDArray[np.float32]  # [N, C]
    sizes: NDArray[np.int32]  # [N, 2], width and height in pixels


def describe(
    examples: Described,
    class_names: Sequence[str],
    *,
    pattern: re.Pattern[str] | None = None,
    groups: NDArray[np.integer] | None = None,
) -> Scores:
    """`metrics.scores` and what else can be said of a split, ready for JSON.

    Args:
        examples: N >= 1 of them.
        class_names: [C].
        pattern: see `slices.by_pattern`.
        groups: [N], of examples that are not independent, see `resampling.intervals`.
    """
    keys, labels, logits, sizes = examples
    probabilities = softmax(logits)
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    correct = predicted == labels
    scores = metrics.scores(metrics.tally(logits, labels.astype(np.int64)), class_names)
    found = resampling.intervals(logits, labels, groups=groups)
    suspects = mistakes.likely_wrong_labels(probabilities, labels)
    columns = slices.columns_of(
        keys, sizes[:, 0], sizes[:, 1], known={*class_names, *SPLITS, "val"}, pattern=pattern
    )
    return scores | {
        f"selective_accuracy_{100 * COVERAGE:.0f}": calibration.selective_accuracy(
            confidence, correct, coverage=COVERAGE
        ),
        "ece_if_calibrated": calibration.ece_if_calibrated(confidence),
        "intervals": {name: list(interval) for name, interval in found.items()},
        "resampled_by_group": groups is not None,
        "confused_pairs": mistakes.confused_pairs(np.array(scores["confusion"]), class_names),
        "confident_errors": [
            {
                "key": keys[row],
                "label": class_names[labels[row]],
                "predicted": class_names[predicted[row]],
                "confidence": float(confidence[row]),
            }
            for row in mistakes.confident_errors(probabilities, labels)[:_LISTED]
        ],
        "likely_wrong_labels": {
            "examples": len(suspects.rows),
            "first": [
                {
                    "key": keys[row],
                    "label": class_names[labels[row]],
                    "suggested": class_names[suggested],
                    "self_confidence": float(self_confidence),
                }
                for row, suggested, self_confidence in zip(*suspects, strict=True)
            ][:_LISTED],
        },
        "slices": {name: slices.accuracies(column, correct) for name, column in columns.items()},
    }


def compare(
    ours: Described, theirs: NDArray[np.float32], class_names: Sequence[str], *, groups: Any = None
) -> dict[str, Any]:
    """Two models on the same examples, ready for JSON.

    Args:
        ours: with the logits of the model that is judged.
        theirs: [N, C], of the other.
        class_names: [C].
        groups: as in `describe`.
    """
    labels = ours.labels
    mine, other = ours.logits.argmax(axis=1), theirs.argmax(axis=1)
    found = resampling.compare(mine == labels, other == labels, groups=groups)
    differ = np.flatnonzero(mine != other)
    kinds, counts = np.unique(
        np.stack([labels[differ], mine[differ], other[differ]], axis=1), axis=0, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    return {
        "accuracy": float((other == labels).mean()),
        "difference": found.difference,
        "interval": list(found.interval),
        "only_ours": found.only_ours,
        "only_theirs": found.only_theirs,
        "mcnemar_p": found.p_value,
        "disagreements": len(differ),
        "kinds": [
            {
                **dict(
                    zip(("label", "ours", "theirs"), (class_names[i] for i in kind), strict=True)
                ),
                "count": int(count),
            }
            for kind, count in zip(kinds[order].tolist(), counts[order].tolist(), strict=True)
        ],
        "first": [
            {
                "key": ours.keys[row],
                "label": class_names[labels[row]],
                "ours": class_names[mine[row]],
                "theirs": class_names[other[row]],
            }
            for row in differ[:_LISTED]
        ],
    }


# jobs/evaluate.py


def run(settings: EvaluateSettings) -> None:
    """Evaluate a published model on a split of a data set, every image once.

    Raises:
        UserError: no model, no data set, or they have other classes; a regular expression that is
            none or finds nothing; an engine that cannot be run.
    """
    model = bundle.load(settings.model)
    index = read_index(settings.shards, settings.data)
    shards.check_sizes(index)
    other = bundle.load(settings.against) if settings.against else None
    for each in filter(None, (model, other)):
        if each.class_names != index.class_names:
            raise UserError(
                "other-classes",
                f"the model {each.url} has the classes {', '.join(each.class_names)}; the data set "
                f"{index.root} has {', '.join(index.class_names)}",
            )
    splits = [
        split
        for split in reversed(SPLITS)
        if settings.split in (split, "all") and index.examples(split)
    ]
    if not splits:
        raise UserError("empty-split", f"{index.root} has no images in the {settings.split} split")
    pattern = None
    if settings.slice_by is not None:
        pattern = slices.compile_pattern(settings.slice_by, flag="--slice_by")
    # What cannot be run is told before a machine is taken.
    for each in filter(None, (model, other)):
        _choose(settings, each, gpu=settings.gpu is True, best_float="float32")
    terminal.keeps("nothing of the evaluation is kept")
    with _log(settings.out) as log, cluster.session(settings.ray) as found:
        nodes = cluster.with_gpus(found, settings.gpu, "auto", settings.ray, say)
        document = _run_on(nodes, settings, model, other, index, splits, pattern)
        terminal.result(
            model=model.url, model_id=model.model_id, metrics=figures(document["splits"])
        )
        say(f"log       {log}")


def read_index(root: str, settings: DataSettings) -> ShardIndex:
    """`shards.read_index` with the cache of the settings."""
    cache = None
    if settings.local_cache is not None:
        cache = LocalCache(settings.local_cache, settings.local_cache_gb)
    return replace(shards.read_index(root), cache=cache)


def figures(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Of each split what is a number."""
    return {
        split: {name: value for name, value in of_split.items() if isinstance(value, int | float)}
        for split, of_split in scores.items()
    }


@contextmanager
def _log(out: str | None) -> Iterator[Path]:
    """In the folder of the results, or beside a file of them under its name; else temporary."""
    if out is None:
        path = Path(tempfile.mkdtemp(prefix="leafnet-")) / "evaluate.log"
        with terminal.chatter_to(path):
            yield path
        return
    folder, name = storage.absolute(out), "evaluate.log"
    if folder.endswith(".json"):
        folder, _, name = folder.removesuffix(".json").rpartition("/")
        name += ".log"
    with terminal.log_to(folder, name) as path:
        yield path


def _run_on(
    nodes: list[cluster.Node],
    settings: EvaluateSettings,
    model: Bundle,
    other: Bundle | None,
    index: ShardIndex,
    splits: Sequence[str],
    pattern: re.Pattern[str] | None,
) -> dict[str, Any]:
    machines = cluster.machines(nodes, settings.gpu)
    made, choice = _predict(settings, model, index, splits, machines)
    document: dict[str, Any] = {
        "version": VERSION,
        "model": {"url": model.url, "model_id": model.model_id},
        "data": {"shards": index.root, "fingerprint": index.fingerprint},
        "engine": choice.engine,
        "precision": choice.precision,
        "splits": {},
    }
    theirs: Evaluated | None = None
    if other is not None:
        say(f"against   {other.url}   id {other.model_id}")
        theirs, _ = _predict(settings, other, index, splits, machines)
        document["against"] = {"url": other.url, "model_id": other.model_id}
    for split, predictions in made.splits.items():
        examples = _described(predictions)
        groups = groups_of(index, examples.keys)
        scores = describe(examples, index.class_names, pattern=pattern, groups=groups)
        scores["background"] = background.probe(
            predictions.border, predictions.labels, model_accuracy=scores["accuracy"]
        )
        if theirs is not None:
            scores["against"] = compare(
                examples, theirs.splits[split].logits, index.class_names, groups=groups
            )
        if settings.tta > 1:
            scores["tta"] = _gain(predictions, made, views=settings.tta)
        document["splits"][split] = scores
    say_evaluation(document)
    if settings.out and settings.out.endswith(".json"):
        storage.write_json(settings.out, document)
        say(f"written   {settings.out}")
    elif settings.out:
        first = splits[0]
        items = inference.make_gallery(
            index,
            first,
            gallery.choose(made.splits[first].logits, made.splits[first].labels),
            convolutions=ray.put(model.convolutions),
            head=model.head,
            image_size=model.image_size,
            precision=cluster.choose_precision("auto", gpu=machines.gpus > 0)[0],
            machines=machines,
            explain=settings.explain and _sees_something(model),
        )
        write(settings.out, document, first, items)
        say(f"written   {storage.join(settings.out, DOCUMENT)} and {len(items)} photographs")
    return document


def write(folder: str, document: dict[str, Any], split: str, items: Sequence[gallery.Item]) -> None:
    """Store an evaluation in `folder`: the gallery of `split`, then the document that names it."""
    told = {"split": split, "items": gallery.write(folder, items)}
    storage.write_json(storage.join(folder, DOCUMENT), document | {"gallery": told})


def read(folder: str) -> tuple[dict[str, Any], list[gallery.Item]]:
    """The document and the gallery of `write`.

    Raises:
        FileNotFoundError: there is none.
    """
    document: dict[str, Any] = storage.read_json(storage.join(folder, DOCUMENT))
    return document, gallery.read(folder, document["gallery"]["items"])


def _predict(
    settings: EvaluateSettings,
    model: Bundle,
    index: ShardIndex,
    splits: Sequence[str],
    machines: Machines,
) -> tuple[Evaluated, engine.Choice]:
    best_float, why = cluster.choose_precision("auto", gpu=machines.gpus > 0)
    choice = _choose(settings, model, gpu=machines.gpus > 0, best_float=best_float)
    if choice.precision != best_float:
        why = choice.why
    say(f"model     {model.url}   id {model.model_id}")
    say(f"device    {cluster.device(machines.gpus)}, {choice.engine} in {choice.precision} ({why})")
    with terminal.progress("evaluate", sum(index.examples(split) for split in splits)) as advance:
        made = inference.predict(
            model,
            index,
            splits,
            choice=choice,
            views=settings.tta,
            batch_size=cluster.batch_size(settings.batch_size, gpus=machines.gpus),
            machines=machines,
            advance=advance,
        )
    return made, choice


def _choose(
    settings: EvaluateSettings, model: Bundle, *, gpu: bool, best_float: str
) -> engine.Choice:
    return engine.choose(
        engine=settings.engine,
        precision=settings.precision,
        gpu=gpu,
        has_int8=model.int8 is not None,
        installed=openvino_graph.installed(),
        best_float=best_float,
    )


def _described(predictions: Predictions) -> Described:
    return Described(predictions.keys, predictions.labels, predictions.logits, predictions.sizes)


def _gain(predictions: Predictions, made: Evaluated, *, views: int) -> dict[str, Any]:
    """What test-time augmentation changes, and what it costs, ready for JSON."""
    labels = predictions.labels
    without = metrics.tally(predictions.plain, labels)
    right = predictions.logits.argmax(axis=1) == labels
    right_without = predictions.plain.argmax(axis=1) == labels
    found = resampling.compare(right, right_without)
    names = [str(i) for i in range(predictions.plain.shape[1])]
    scores = metrics.scores(without, names)
    return {
        "views": views,
        **{f"{name}_without": scores[name] for name in ("accuracy", "log_loss", "ece")},
        "difference": found.difference,
        "interval": list(found.interval),
        "mcnemar_p": found.p_value,
        "times_as_long": made.seconds / made.plain_seconds,
    }


def groups_of(index: ShardIndex, keys: Sequence[str]) -> NDArray[np.int64] | None:
    """What jobs/prepare.py was told to keep together, [N]; None: nothing.

    A key that does not match is a group of its own, as it was there.
    """
    settings = shards.prepared(index.root).get("settings") or {}
    if not settings.get("group"):
        return None
    pattern = re.compile(settings["group"])
    found = [(key, pattern.search(key)) for key in keys]
    names = [
        f"= {match[1 if pattern.groups else 0]}" if match else f"key {key}" for key, match in found
    ]
    groups: NDArray[np.int64] = np.unique(names, return_inverse=True)[1]
    return groups


def _sees_something(model: Bundle) -> bool:
    """False of random weights, whose maps would say nothing."""
    return bool(model.description.get("backbone", {}).get("source") != "random")


# The end of jobs/train.py


def after_training(
    folder: str,
    index: ShardIndex,
    *,
    answers: Mapping[str, tuple[NDArray[np.float32], NDArray[np.integer]]],
    model_url: str,
    model_id: str,
    convolutions: Any,
    head: Head,
    image_size: int,
    precision: str,
    machines: Machines,
    explain: bool,
) -> list[gallery.Item]:
    """Write the evaluation of a run that is about to end to `folder`; returns its gallery.

    Nothing is written where there is neither a validation nor a test split.

    Args:
        folder: folder or URL.
        index: of the data set.
        answers: logits [N, C] and labels [N] of valid and test, in the order of `gallery.ordered`.
        model_url: of the published model.
        model_id: likewise.
        convolutions: folded weights, in Ray's object store.
        head: on raw features.
        image_size: pixels.
        precision: of the backbone.
        machines: what there is to run on.
        explain: make activation maps.
    """
    document: dict[str, Any] = {
        "version": VERSION,
        "model": {"url": model_url, "model_id": model_id},
        "data": {"shards": index.root, "fingerprint": index.fingerprint},
        "engine": "tensorflow",
        "precision": precision,
        "splits": {},
    }
    for split in (split for split in reversed(SPLITS) if split in answers):
        keys, sizes = _keys(index, split)
        logits, labels = answers[split]
        document["splits"][split] = describe(
            Described(keys, labels, logits, sizes),
            index.class_names,
            groups=groups_of(index, keys),
        )
    if not answers:
        return []
    first = next(iter(document["splits"]))
    scores = document["splits"][first]
    scores["background"] = _probe(index, first, scores["accuracy"])
    say_background(scores["background"], always=False)
    items = inference.make_gallery(
        index,
        first,
        gallery.choose(*answers[first]),
        convolutions=convolutions,
        head=head,
        image_size=image_size,
        precision=precision,
        machines=machines,
        explain=explain,
    )
    write(folder, document, first, items)
    return items


def _keys(index: ShardIndex, split: str) -> tuple[list[str], NDArray[np.int32]]:
    """Keys and sizes of the examples of `split`, without their photographs."""
    keys: list[str] = []
    sizes = [np.zeros((0, 2), np.int32)]
    for shard in gallery.ordered(index, split):
        table = shards.read_columns(index.root, shard, ["key", "width", "height"])
        keys += table["key"].to_pylist()
        sizes.append(np.stack([table["width"], table["height"]], axis=1))
    return keys, np.concatenate(sizes)


def _probe(index: ShardIndex, split: str, accuracy: float) -> dict[str, Any] | None:
    """The probe of the background on the first photographs of `split`, which are a fair sample."""
    statistics, labels = [], []
    for image, label in _first_photographs(index, split):
        # Small: the border's colours are what is looked at.
        statistics.append(background.border(decode(image, 256).pixels[None])[0])
        labels.append(label)
    return background.probe(np.stack(statistics), np.array(labels), model_accuracy=accuracy)


def _first_photographs(index: ShardIndex, split: str) -> Iterable[tuple[bytes, int]]:
    wanted = _PROBED
    for shard in gallery.ordered(index, split):
        rows = list(range(min(shard.rows, wanted)))
        table = shards.read_rows(index.root, shard, rows)
        yield from zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True)
        wanted -= len(rows)
        if not wanted:
            return
