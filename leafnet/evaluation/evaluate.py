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
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from leafnet.core import storage, terminal
from leafnet.core.errors import UserError
from leafnet.core.settings import compile_pattern
from leafnet.core.terminal import say
from leafnet.data import shards
from leafnet.data.groups import groups_of
from leafnet.data.images import decode
from leafnet.data.shards import SPLITS, ShardIndex, open_index
from leafnet.distributed import fastest, resources, session
from leafnet.distributed.resources import Machines
from leafnet.evaluation import gallery, predict
from leafnet.evaluation.document import (
    DOCUMENT,
    VERSION,
    Described,
    compare,
    describe,
    figures,
    write,
)
from leafnet.evaluation.predict import Evaluated, Predictions
from leafnet.evaluation.settings import EvaluateSettings
from leafnet.evaluation.tables import say_background, say_evaluation
from leafnet.metrics import background, intervals
from leafnet.metrics import scores as metrics_scores
from leafnet.metrics.scores import tally
from leafnet.models import bundle, engine, openvino
from leafnet.models.bundle import Bundle
from leafnet.models.classifier import Head
from leafnet.models.rates import Way

# Photographs that the probe of the background looks at when a run ends: one reading of a shard.
_PROBED = 400


# jobs/evaluate.py


def check_classes(
    settings: EvaluateSettings, source: str, classes: Mapping[str, set[str]] | None
) -> None:
    """Refuse photographs of classes that the model lacks, as far as their classes are known.

    Raises:
        UserError: there are some.
    """
    named = set().union(*classes.values()) if classes else set()
    _refuse_other_classes(bundle.load(settings.model), sorted(named), source)


def _refuse_other_classes(model: Bundle, names: Sequence[str], source: str) -> None:
    unknown = sorted(set(names) - set(model.class_names))
    if unknown:
        raise UserError(
            "other-classes",
            f"the model {model.url} has the classes {', '.join(model.class_names)}; {source} has "
            f"{', '.join(names)}, and the model knows no {unknown[0]}",
        )


def run(settings: EvaluateSettings, *, data_set: str | None = None) -> None:
    """Evaluate a published model on a split of a data set, every image once.

    Args:
        settings: of the job.
        data_set: the one that was made of `settings.images`.

    Raises:
        UserError: no model, no data set, or one with classes that the model lacks; a regular
            expression that is none or finds nothing; an engine that cannot be run.
    """
    model = bundle.load(settings.model)
    index = open_index(str(data_set or settings.shards), settings.data)
    shards.check_sizes(index)
    other = bundle.load(settings.against) if settings.against else None
    if other is not None and other.class_names != model.class_names:
        raise UserError(
            "other-classes",
            f"the model {other.url} has the classes {', '.join(other.class_names)}; "
            f"{model.url} has {', '.join(model.class_names)}",
        )
    _refuse_other_classes(model, index.class_names, settings.images or index.root)
    # A data set for evaluation may lack some of the model's classes, and number the others.
    places = np.array([model.class_names.index(name) for name in index.class_names])
    index = replace(index, class_names=model.class_names)
    splits = [
        split
        for split in reversed(SPLITS)
        if settings.split in (split, "all") and index.examples(split)
    ]
    if not splits:
        raise UserError("empty-split", f"{index.root} has no images in the {settings.split} split")
    pattern = None
    if settings.slice_by is not None:
        pattern = compile_pattern(settings.slice_by, flag="--slice_by")
    # What cannot be run is told before a machine is taken.
    for each in filter(None, (model, other)):
        _ways(settings, each, gpu=settings.gpu is True)
    terminal.keeps("nothing of the evaluation is kept")
    with _log(settings.out) as log, session.session(settings.ray) as found:
        nodes = session.with_room(found, settings.gpu, "auto", settings.ray)
        document = _run_on(nodes, settings, model, other, index, places, splits, pattern)
        terminal.result(
            model=model.url, model_id=model.model_id, metrics=figures(document["splits"])
        )
        say(f"log       {log}")


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
    nodes: list[resources.Node],
    settings: EvaluateSettings,
    model: Bundle,
    other: Bundle | None,
    index: ShardIndex,
    places: NDArray[np.int64],
    splits: Sequence[str],
    pattern: re.Pattern[str] | None,
) -> dict[str, Any]:
    machines = resources.machines(nodes, settings.gpu)
    made, way = _predict(settings, model, index, splits, machines)
    for split, found in made.splits.items():
        made.splits[split] = found._replace(labels=places[found.labels])
    document: dict[str, Any] = {
        "version": VERSION,
        "model": {"url": model.url, "model_id": model.model_id},
        "data": {"shards": settings.images or index.root, "fingerprint": index.fingerprint},
        "engine": way.engine,
        "precision": way.precision,
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
            predictions.border,
            predictions.labels,
            model_accuracy=scores["accuracy"],
            groups=groups,
        )
        if theirs is not None:
            scores["against"] = compare(
                examples, theirs.splits[split].logits, index.class_names, groups=groups
            )
        if settings.tta > 1:
            scores["tta"] = _gain(predictions, made, groups, views=settings.tta)
        document["splits"][split] = scores
    say_evaluation(document)
    if settings.out and settings.out.endswith(".json"):
        storage.write_json(settings.out, document)
        say(f"written   {settings.out}")
    elif settings.out:
        first = splits[0]
        items = predict.make_gallery(
            index,
            first,
            gallery.choose(made.splits[first].logits, made.splits[first].labels),
            convolutions=ray.put(model.convolutions),
            head=model.head,
            image_size=model.image_size,
            precision=predict.choose_precision(
                "auto", model.convolutions, image_size=model.image_size, machines=machines
            )[0],
            machines=machines,
            explain=settings.explain and _sees_something(model),
        )
        write(settings.out, document, first, items)
        say(f"written   {storage.join(settings.out, DOCUMENT)} and {len(items)} photographs")
    return document


def _predict(
    settings: EvaluateSettings,
    model: Bundle,
    index: ShardIndex,
    splits: Sequence[str],
    machines: Machines,
) -> tuple[Evaluated, Way]:
    say(f"model     {model.url}   id {model.model_id}")
    ways = _ways(settings, model, gpu=machines.gpus > 0)
    *way, why = fastest.choose(
        ways,
        gpu=machines.gpus > 0,
        weights=(model.convolutions, model.int8),
        cpus=machines.cpus_per_actor,
        **engine.measuring(ways, image_size=model.image_size, threads=machines.threads_per_actor),
    )
    chosen = Way(*way)
    device = resources.device(machines.gpus)
    say(f"device    {device}, {chosen.engine} in {chosen.precision} ({why})")
    with terminal.progress("evaluate", sum(index.examples(split) for split in splits)) as advance:
        made = predict.predict(
            model,
            index,
            splits,
            way=chosen,
            views=settings.tta,
            batch_size=resources.batch_size(settings.batch_size, gpus=machines.gpus),
            machines=machines,
            advance=advance,
        )
    return made, chosen


def _ways(settings: EvaluateSettings, model: Bundle, *, gpu: bool) -> list[Way]:
    return engine.ways(
        engine=settings.engine,
        precision=settings.precision,
        gpu=gpu,
        has_int8=model.int8 is not None,
        installed=openvino.installed(),
    )


def _described(predictions: Predictions) -> Described:
    return Described(predictions.keys, predictions.labels, predictions.logits, predictions.sizes)


def _gain(predictions: Predictions, made: Evaluated, groups: Any, *, views: int) -> dict[str, Any]:
    """What test-time augmentation changes, and what it costs, ready for JSON."""
    labels = predictions.labels
    without = tally(predictions.plain, labels)
    right = predictions.logits.argmax(axis=1) == labels
    right_without = predictions.plain.argmax(axis=1) == labels
    found = intervals.compare(right, right_without, groups=groups)
    names = [str(i) for i in range(predictions.plain.shape[1])]
    scores = metrics_scores.scores(without, names)
    return {
        "views": views,
        **{f"{name}_without": scores[name] for name in ("accuracy", "log_loss", "ece")},
        "difference": found.difference,
        "interval": list(found.interval),
        "mcnemar_p": found.p_value,
        "times_as_long": made.seconds / made.plain_seconds,
    }


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
    items = predict.make_gallery(
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
    statistics, labels, keys = [], [], []
    for key, image, label in _first_photographs(index, split):
        # Small: the border's colours are what is looked at.
        statistics.append(background.border(decode(image, 256).pixels[None])[0])
        labels.append(label)
        keys.append(key)
    return background.probe(
        np.stack(statistics),
        np.array(labels),
        model_accuracy=accuracy,
        groups=groups_of(index, keys),
    )


def _first_photographs(index: ShardIndex, split: str) -> Iterable[tuple[str, bytes, int]]:
    wanted = _PROBED
    for shard in gallery.ordered(index, split):
        rows = list(range(min(shard.rows, wanted)))
        table = shards.read_rows(index.root, shard, rows)
        yield from zip(*(table[c].to_pylist() for c in ("key", "image", "label")), strict=True)
        wanted -= len(rows)
        if not wanted:
            return
