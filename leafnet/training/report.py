"""The report of a training run: RUN/report.html, made of what the run has stored.

It can be written again at any time. Photographs in it are thumbnails: those of the galleries come
from the run's evaluation, samples of each class from the shards, and they are left out when the
shards are gone.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.core.settings import flat
from leafnet.data import shards
from leafnet.data.shards import SPLITS
from leafnet.evaluation.gallery import Item
from leafnet.metrics.mistakes import confused_pairs
from leafnet.metrics.thresholds import REVIEW_ALL
from leafnet.reporting import charts, pages
from leafnet.training import pictures
from leafnet.training.settings import describe_stages

NAME = "report.html"

_MAX_MATRIX = 40  # classes; of more the confusion matrix is a picture
_MAX_CONFUSED = 12  # pairs of classes that are listed
_MAX_ROWS = 200  # classes with a row of scores
_MAX_PAIRS = 30  # duplicates that are listed
_MAX_REJECTED = 30
_FEW = 10  # photographs of a class in a split, of which shares say little
_MAX_FEW = 8  # such classes that are named


_STAGES = {
    "start": ("start", "Ray and settings"),
    "features": ("features", "views through the frozen network"),
    "search": ("search", "settings of the head tried, or folds"),
    "head": ("head", "fitted on the features"),
    "fine_tune": ("fine-tune", "last stages and head, on photographs"),
    "fine_tuned_features": ("features again", "views through the fine-tuned network"),
    "int8": ("int8", "quantized and checked"),
    "publish": ("publish", "model written"),
    "evaluation": ("evaluation", "intervals, slices and galleries"),
    "total": ("all", ""),
}


def write(run: str) -> str:
    """Write the report of the finished run at `run` (folder or URL), and return its URL.

    Raises:
        UserError: there is no such run, or it is not finished.
    """
    run = storage.absolute(run)
    stored = _stored(run)
    # Samples of each class are of the training split, which is what was learnt from.
    items = [item for item in pictures.gallery(run) if item.kind != "sample"]
    items += pictures.samples_of(stored["model"])
    target = storage.join(run, NAME)
    storage.write_bytes(target, pages.render("run.html", **_content(run, stored, items)))
    return target


def _stored(run: str) -> dict[str, Any]:
    try:
        return {
            "run": storage.read_json(storage.join(run, "run.json")),
            "metrics": _of_splits(storage.read_json(storage.join(run, "metrics.json"))),
            "model": storage.read_json(storage.join(run, "model", "model.json")),
            "history": _history(storage.read_bytes(storage.join(run, "history.csv"))),
            "fine_tune": _history_of_fine_tune(run),
            "settings": yaml.safe_load(storage.read_bytes(storage.join(run, "config.yaml"))),
        }
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            "unfinished-run",
            f"{run} is no finished run ({error}); train it with jobs/train.py",
        ) from None


def _of_splits(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of the splits, without what else there may be to tell of a run."""
    return {split: metrics[split] for split in metrics if split in SPLITS}


def _history(data: bytes) -> list[dict[str, float]]:
    rows = csv.DictReader(io.StringIO(data.decode()))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def _history_of_fine_tune(run: str) -> list[dict[str, float]]:
    try:
        return _history(storage.read_bytes(storage.join(run, "fine_tune.csv")))
    except FileNotFoundError:
        return []


# The page


def _content(run: str, stored: Mapping[str, Any], items: Sequence[Item]) -> dict[str, Any]:
    model, metrics, facts = stored["model"], stored["metrics"], stored["run"]
    split = next(iter(metrics))
    scores = metrics[split]
    names = model["class_names"]
    colour = {
        name: charts.key_mark(min(i, charts.COLOURS), f"c{i}" if i < charts.COLOURS else "cx")
        for i, name in enumerate(names)
    }
    return {
        "name": run.rsplit("/", 1)[-1],
        "run": run,
        "model": model,
        "metrics": metrics,
        "split": split,
        "scores": scores,
        "weakest": min(scores["per_class"].items(), key=lambda entry: entry[1]["recall"]),
        "facts": facts,
        "note": stored["settings"].get("note"),
        "alarms": _alarms(model, metrics, split),
        "curves": _curves(stored["history"], model["best_epoch"]),
        "history": stored["history"],
        "fine_tune": _fine_tune(facts.get("fine_tune"), stored["fine_tune"]),
        "confusion": _confusion(scores, names, split),
        "confused": _confused(scores, names),
        "per_class": _per_class(scores, colour),
        "missing": sum(not one["support"] for one in scores["per_class"].values()),
        "reliability": _reliability(scores, split),
        "review": model.get("review"),
        "review_all": REVIEW_ALL,
        "galleries": pictures.galleries(items, colour),
        "samples": pictures.by_class(items, names),
        "colour": colour,
        "data": _data(model),
        "stages": _stages(facts),
        "settings": [(name, _shown(value)) for name, value in flat(stored["settings"]).items()],
        "fingerprints": {
            "model": model["model_id"],
            "weights file": model["weights"]["sha256"],
            "backbone": model.get("backbone", {}).get("fingerprint", "?"),
            "data set": model.get("data", {}).get("fingerprint", "?"),
            "git commit": model.get("git_commit") or "none",
        },
    }


def _alarms(model: Mapping[str, Any], metrics: Mapping[str, Any], split: str) -> list[str]:
    warnings = []
    if model.get("backbone", {}).get("source") == "random":
        warnings.append(
            "The backbone has random weights: this is a check of the pipeline, and its figures say "
            "nothing about leaves."
        )
    scores = metrics[split]
    warnings += _few(scores["per_class"], split)
    train = metrics.get("train")
    if train and split != "train" and train["accuracy"] - scores["accuracy_high"] > 0.1:
        warnings.append(
            f"Of the training photographs {pages.percent(train['accuracy'])} are classified "
            f"correctly, of {split} {pages.percent(scores['accuracy'])}: the head has overfitted. "
            "More photographs or more views help."
        )
    review = model.get("review")
    if review and review["confidence"] == REVIEW_ALL:
        warnings.append(
            f"No confidence threshold gives {review['precision_target']:.0%} correct predictions "
            "on validation: every photograph is for review."
        )
    return warnings


def _few(per_class: Mapping[str, Any], split: str) -> list[str]:
    """A sentence on the classes with so few photographs that their figures say little.

    >>> _few({"rust": {"support": 4}, "scab": {"support": 90}}, "test")
    ['rust has 4 photographs in the test split: its figures are a matter of chance.']
    >>> _few({"rust": {"support": 4}, "scab": {"support": 9}}, "test")[0].split(" in ")[0]
    'rust (4) and scab (9) have few photographs'
    """
    few = {name: one["support"] for name, one in per_class.items() if one["support"] < _FEW}
    if not few:
        return []
    if len(few) == 1:
        ((name, count),) = few.items()
        return [
            f"{name} has {count} photograph{'s' * (count != 1)} in the {split} split: its figures "
            "are a matter of chance."
        ]
    named = [f"{name} ({count})" for name, count in few.items()]
    if len(named) > _MAX_FEW:
        named = [*named[: _MAX_FEW - 1], f"{len(named) - _MAX_FEW + 1} more classes"]
    return [
        f"{', '.join(named[:-1])} and {named[-1]} have few photographs in the {split} split: their "
        "figures are a matter of chance."
    ]


def _curves(
    history: Sequence[Mapping[str, float]],
    best_epoch: int,
    head_alone: Mapping[str, float] | None = None,
) -> list[Any]:
    last, before = history[-1], head_alone or {}
    made = []
    for quantity, show in (("loss", "{:.3g}".format), ("accuracy", pages.percent)):
        ends = ", ".join(
            f"{split} {show(last[f'{split}_{quantity}'])}"
            for split in ("train", "valid")
            if f"{split}_{quantity}" in last
        )
        caption = (
            f"{quantity.capitalize()} over {len(history)} epoch{'s' * (len(history) > 1)}; at the "
            f"end {ends}. "
        )
        caption += (
            f"The best epoch is {best_epoch}."
            if best_epoch
            else "No epoch was better than the head alone."
        )
        alone = before.get(f"valid_{quantity}")
        if alone is not None:
            caption += f" Dotted: the head alone on validation, {show(alone)}."
        if quantity == "loss":
            limit, largest = charts.loss_limit(history, alone)
            if largest > limit:
                caption += f" Values over {limit:.2g} are cut off; the largest was {largest:.3g}."
        svg = charts.curves(
            history, quantity, best_epoch=best_epoch, description=caption, head_alone=alone
        )
        made.append((quantity.capitalize(), svg, caption))
    return made


def _fine_tune(
    facts: Mapping[str, Any] | None, history: Sequence[Mapping[str, float]]
) -> dict[str, Any] | None:
    """Describe fine-tuning, from run.json and fine_tune.csv; None: there was none."""
    if not facts or not history:
        return None
    alone, best = facts.get("head_alone_valid", {}), facts["best_epoch"]
    stages = describe_stages(facts["blocks"])
    count = f"{len(history)} epoch{'s' * (len(history) > 1)}"
    if not facts["published"]:
        lowest = min(history, key=lambda row: row.get("valid_loss", math.inf))
        summary = (
            f"Fine-tuning {stages} for {count} gained nothing: the lowest validation loss was "
            f"{lowest['valid_loss']:.3g}"
            + (f", that of the head alone is {alone['valid_loss']:.3g}" if alone else "")
            + ". The head alone is published."
        )
    elif alone:
        (row,) = (row for row in history if row["epoch"] == best)
        summary = (
            f"Fine-tuning {stages} took validation accuracy from "
            f"{pages.percent(alone['valid_accuracy'])} (head alone) to "
            f"{pages.percent(row['valid_accuracy'])}, and the loss from {alone['valid_loss']:.3g} "
            f"to {row['valid_loss']:.3g}, in epoch {best} of {len(history)}, which is published."
        )
    else:
        summary = (
            f"Fine-tuning {stages} took {count}, and epoch {best} is published; the gain is "
            "unknown without a validation split."
        )
    waited = (
        f"Its steps spent {pages.percent(facts['waited'])} of their time waiting for photographs; "
        f"the mean speed was {facts['images_per_s']:,.1f} images/s."
    )
    before, after = facts.get("head_alone", {}), facts.get("fine_tuned", {})
    return {
        "stages": stages,
        "summary": summary,
        "waited": waited,
        "curves": _curves(history, best, alone),
        "history": history,
        "splits": [(split, before[split], after[split]) for split in before if split in after],
        "best_epoch": best,
    }


def _confusion(scores: Mapping[str, Any], names: Sequence[str], split: str) -> dict[str, Any]:
    """Rows of cells, or a picture of them where there are very many classes."""
    confusion = scores["confusion"]
    if len(names) > _MAX_MATRIX:
        from leafnet.reporting import plots  # matplotlib, which takes half a second to import

        chosen = scores.get("confusion_classes", names)
        of = len(names)
        return {"png": plots.confusion_png(confusion, chosen, title=f"{split} split", of=of)}
    rows = []
    for i, name in enumerate(names):
        total = max(sum(confusion[i]), 1)
        cells = [
            {
                "count": count,
                "share": count / total,
                "right": i == j,
                # The root keeps an error of a few per cent visible.
                "shade": round((count / total) ** (1.0 if i == j else 0.5), 3),
            }
            for j, count in enumerate(confusion[i])
        ]
        rows.append((name, cells))
    return {"png": None, "rows": rows}


def _confused(scores: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str, int, float]]:
    """(true, predicted, photographs, share of the true class), the most frequent first."""
    pairs = scores.get("confused_pairs")
    if pairs is None:  # of a version that did not store them
        pairs = confused_pairs(np.array(scores["confusion"]), names, limit=_MAX_CONFUSED)
    keys = ("label", "predicted", "count", "share")
    return [tuple(pair[key] for key in keys) for pair in pairs[:_MAX_CONFUSED]]


def _shown_classes(per_class: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """All classes, or those that are found least where there are very many."""
    every = list(per_class.items())
    if len(every) <= _MAX_ROWS:
        return every
    return sorted(every, key=lambda entry: entry[1]["recall"])[:_MAX_ROWS]


def _per_class(scores: Mapping[str, Any], colour: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "key": colour[name]}
        | of_class
        | {
            "bar": charts.interval(
                of_class["recall_low"], of_class["recall"], of_class["recall_high"]
            )
        }
        for name, of_class in _shown_classes(scores["per_class"])
    ]


def _reliability(scores: Mapping[str, Any], split: str) -> dict[str, Any]:
    caption = (
        f"Accuracy against confidence on the {split} split. The expected calibration "
        f"error is {scores['ece']:.3f}."
    )
    return {
        "svg": charts.reliability(scores["calibration"], description=caption),
        "caption": caption,
    }


def _data(model: Mapping[str, Any]) -> dict[str, Any]:
    """Counts, duplicates and rejected photographs, as far as the data set is still there."""
    data = model.get("data", {})
    known: dict[str, Any] = {"shards": data.get("shards", "?"), "counts": None, "prepared": {}}
    try:
        index = shards.read_index(data["shards"])
    except (KeyError, UserError):
        return known | {"gone": True}
    if index.fingerprint != data["fingerprint"]:
        return known | {"gone": True}
    pairs = _table(index.root, "duplicates.parquet")
    rejected = _table(index.root, "rejected.parquet")
    return known | {
        "gone": False,
        "splits": [split for split in SPLITS if index.examples(split)],
        "counts": index.counts,
        "totals": {split: index.examples(split) for split in SPLITS},
        "class_names": index.class_names,
        "prepared": shards.prepared(index.root),
        "pairs": pairs[:_MAX_PAIRS],
        "pairs_left_out": max(0, len(pairs) - _MAX_PAIRS),
        "rejected": rejected[:_MAX_REJECTED],
        "rejected_left_out": max(0, len(rejected) - _MAX_REJECTED),
    }


def _table(root: str, name: str) -> list[dict[str, Any]]:
    """The rows of a table that jobs/prepare.py left beside the shards, if it did."""
    try:
        data = storage.read_bytes(storage.join(root, name))
    except FileNotFoundError:
        return []
    rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(data)).to_pylist()
    return rows


def _stages(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    seconds, rates = facts["seconds"], dict(facts.get("images_per_second", {}))
    if "fine_tune" in facts:
        rates["fine_tune"] = facts["fine_tune"]["images_per_s"]
    longest = max((value for stage, value in seconds.items() if stage != "total"), default=1.0)
    return [
        {
            "title": title,
            "words": words,
            "seconds": seconds[stage],
            "rate": rates.get(stage),
            "width": 0 if stage == "total" else round(100 * seconds[stage] / max(longest, 1e-9)),
        }
        for stage, (title, words) in _STAGES.items()
        if stage in seconds
    ] + [
        {"title": stage, "words": "", "seconds": value, "rate": rates.get(stage), "width": 0}
        for stage, value in seconds.items()
        if stage not in _STAGES
    ]


def _shown(value: Any) -> str:
    """
    >>> _shown(None), _shown(True), _shown([512, 128])
    ('none', 'true', '512,128')
    """
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
