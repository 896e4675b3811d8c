"""An evaluation as tables of at most 80 columns, which is what a terminal has."""

from collections.abc import Mapping, Sequence
from typing import Any

from leafnet.core import terminal
from leafnet.core.terminal import say
from leafnet.metrics import background
from leafnet.metrics.intervals import FEW_GROUPS

_SHOWN, _SHOWN_SLICES = 8, 12
# Characters: of a class or slice that leads a row, of a class in another column, of a key.
_NAME, _CLASS, _KEY = 34, 18, 26


def say_evaluation(document: Mapping[str, Any]) -> None:
    """Print an evaluation: a row a split, then what there is to say of the first split."""
    splits = document["splits"]
    say()
    terminal.table(
        "",
        ["split", "images", "accuracy", "95 %", "macro F1", "95 %"],
        [
            [
                split,
                f"{scores['examples']:,}",
                f"{scores['accuracy']:.3f}",
                _interval(scores["intervals"]["accuracy"]),
                f"{scores['macro_f1']:.3f}",
                _interval(scores["intervals"]["macro_f1"]),
            ]
            for split, scores in splits.items()
        ],
    )
    say()
    terminal.table(
        "",
        ["split", "log loss", "ECE", "95 %", "by chance", "at 90 % coverage"],
        [
            [
                split,
                f"{scores['log_loss']:.3f}",
                f"{scores['ece']:.3f}",
                _interval(scores["intervals"]["ece"]),
                f"{scores['ece_if_calibrated']['mean']:.3f}",
                f"{scores['selective_accuracy_90']:.3f}",
            ]
            for split, scores in splits.items()
        ],
    )
    first = next(iter(splits))
    scores = splits[first]
    say()
    _say_intervals(splits)
    say("by chance the ECE of a perfectly calibrated model on as many images")
    say("coverage  accuracy of the 90 % that the model is most confident of")
    _say_classes(first, scores)
    _say_pairs(first, scores)
    _say_slices(first, scores)
    _say_mistakes(first, scores)
    if "tta" in scores:
        _say_tta(scores)
    if "against" in scores:
        _say_against(scores)
    say_background(scores["background"], always=True)


def _say_intervals(splits: Mapping[str, Any]) -> None:
    grouped = next(iter(splits.values()))["resampled_by_group"]
    units = "groups" if grouped else "images"
    say(f"95 %      of test sets of other {units} have the truth in the interval")
    for split, scores in splits.items():
        if grouped and scores["groups"] < FEW_GROUPS:
            say(
                f"          {split} has only {scores['groups']} groups: as wide as that "
                "must be, whatever the number of images"
            )
        missing = missing_classes(scores)
        if missing:
            say(f"macro F1  {missing} of {split}")


def missing_classes(scores: Mapping[str, Any]) -> str:
    """What macro F1 counts as 0 because there is nothing to judge; "" where there is no such class.

    >>> missing_classes({"per_class": {"rust": {"support": 0}, "scab": {"support": 9}}})
    'counts 1 class without an image as 0'
    """
    count = sum(not of_class["support"] for of_class in scores["per_class"].values())
    return (
        f"counts {count:,} {'class' if count == 1 else 'classes'} without an image as 0"
        if count
        else ""
    )


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.3f}-{bounds[1]:.3f}"


def _short(name: str, width: int = _NAME) -> str:
    """`name` in at most `width` characters: the end of a key or class tells it from others."""
    return name if len(name) <= width else "\N{HORIZONTAL ELLIPSIS}" + name[1 - width :]


def _say_classes(split: str, scores: Mapping[str, Any]) -> None:
    say()
    terminal.table(
        "",
        [f"class ({split})", "images", "precision", "recall", "95 %", "F1"],
        [
            [
                _short(name),
                f"{of_class['support']:,}",
                f"{of_class['precision']:.3f}",
                f"{of_class['recall']:.3f}",
                _interval((of_class["recall_low"], of_class["recall_high"])),
                f"{of_class['f1']:.3f}",
            ]
            for name, of_class in scores["per_class"].items()
        ],
    )


def _say_pairs(split: str, scores: Mapping[str, Any]) -> None:
    pairs = scores["confused_pairs"][:_SHOWN]
    if pairs:
        say()
        terminal.table(
            "",
            [f"confused ({split})", "taken for", "images", "share of class"],
            [
                [
                    _short(pair["label"], _KEY),
                    _short(pair["predicted"], _KEY),
                    f"{pair['count']:,}",
                    f"{pair['share']:.1%}".replace("%", " %"),
                ]
                for pair in pairs
            ],
        )


def _say_slices(split: str, scores: Mapping[str, Any]) -> None:
    for name, rows in scores["slices"].items():
        say()
        terminal.table(
            "",
            [f"{name} ({split})", "images", "accuracy", "95 %", ""],
            [
                [
                    _short(row["value"]),
                    f"{row['examples']:,}",
                    f"{row['accuracy']:.3f}",
                    _interval((row["low"], row["high"])),
                    "lower" if row["high"] < scores["accuracy"] else "",
                ]
                for row in rows[:_SHOWN_SLICES]
            ],
        )
        if len(rows) > _SHOWN_SLICES:
            say(f"          and {len(rows) - _SHOWN_SLICES:,} more; the least accurate are shown")


def _say_mistakes(split: str, scores: Mapping[str, Any]) -> None:
    errors = scores["confident_errors"][:_SHOWN]
    if errors:
        say()
        terminal.table(
            "",
            [f"confident errors ({split})", "label", "predicted", "confidence"],
            [
                [
                    _short(row["key"], _KEY),
                    _short(row["label"], _CLASS),
                    _short(row["predicted"], _CLASS),
                    f"{row['confidence']:.3f}",
                ]
                for row in errors
            ],
        )
    suspects = scores["likely_wrong_labels"]
    if suspects["first"]:
        say()
        terminal.table(
            "",
            [f"likely wrong labels ({split})", "label", "suggested", "P(label)"],
            [
                [
                    _short(row["key"], _KEY),
                    _short(row["label"], _CLASS),
                    _short(row["suggested"], _CLASS),
                    f"{row['self_confidence']:.3f}",
                ]
                for row in suspects["first"][:_SHOWN]
            ],
        )
        note = "; the model has learned from these" if split == "train" else ""
        say(f"          {suspects['examples']:,} in all{note}")


def _say_tta(scores: Mapping[str, Any]) -> None:
    told = scores["tta"]
    say()
    terminal.table(
        "",
        ["test-time augmentation", "accuracy", "log loss", "ECE", "network time"],
        [
            [
                "without",
                f"{told['accuracy_without']:.3f}",
                f"{told['log_loss_without']:.3f}",
                f"{told['ece_without']:.3f}",
                "1.0",
            ],
            [
                f"{told['views']} views",
                f"{scores['accuracy']:.3f}",
                f"{scores['log_loss']:.3f}",
                f"{scores['ece']:.3f}",
                f"{told['times_as_long']:.1f}",
            ],
        ],
    )
    say(
        f"          {told['difference']:+.3f} accuracy, 95 % {told['interval'][0]:+.3f} to "
        f"{told['interval'][1]:+.3f}, McNemar p {told['mcnemar_p']:.3g}"
    )


def _say_against(scores: Mapping[str, Any]) -> None:
    told = scores["against"]
    say()
    say(
        f"against   accuracy {scores['accuracy']:.3f}, the other {told['accuracy']:.3f}: "
        f"{told['difference']:+.3f} ({told['interval'][0]:+.3f} to {told['interval'][1]:+.3f})"
    )
    say(
        f"          right alone {told['only_ours']:,}, the other {told['only_theirs']:,}; "
        f"McNemar's exact p {told['mcnemar_p']:.3g}"
    )
    say(f"          they differ on {told['disagreements']:,} of {scores['examples']:,}")
    if told["kinds"]:
        say()
        terminal.table(
            "",
            ["they differ: label", "this model", "the other", "images"],
            [
                [
                    *(_short(kind[name], 22) for name in ("label", "ours", "theirs")),
                    f"{kind['count']:,}",
                ]
                for kind in told["kinds"][:_SHOWN]
            ],
        )


def say_background(told: Mapping[str, Any] | None, *, always: bool) -> None:
    """What the border tells; without `always` only when that is much."""
    if told is None or not (always or told["high_warning"]):
        return
    say()
    say(
        f"border    {background.WIDTH} pixels of it alone give accuracy {told['accuracy']:.3f} "
        f"({_interval((told['low'], told['high']))})"
    )
    say(f"          and the most frequent class {told['majority']:.3f}")
    if told["high_warning"]:
        share = told["share_of_lead"]
        much = "all" if share is None or share >= 1 else f"{share:.0%}".replace("%", " %")
        say(f"warning   that is {much} of the model's lead: it may see the place, not the leaf")
