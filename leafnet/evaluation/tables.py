"""An evaluation as tables of at most 80 columns, which is what a terminal has."""

from collections.abc import Iterable, Mapping
from typing import Any

from leafnet.core import terminal
from leafnet.core.terminal import say
from leafnet.metrics import background
from leafnet.metrics.intervals import FEW_GROUPS

_SHOWN, _SHOWN_SLICES, _SHOWN_CLASSES = 8, 12, 60
# Characters: of a class or slice that leads a row, of a class in another column, of a key.
_NAME, _CLASS, _KEY = 34, 18, 26


def say_evaluation(document: Mapping[str, Any]) -> None:
    """Print an evaluation: a row for each split, then the details of the first split."""
    splits = document["splits"]
    rows = [{"split": split, **scores} for split, scores in splits.items()]
    terminal.records(
        [
            ("split", "{split}"),
            ("images", "{examples:,}"),
            ("accuracy", "{accuracy:.3f}"),
            ("95 %", "{intervals[accuracy][0]:.3f}-{intervals[accuracy][1]:.3f}"),
            ("macro F1", "{macro_f1:.3f}"),
            ("95 %", "{intervals[macro_f1][0]:.3f}-{intervals[macro_f1][1]:.3f}"),
        ],
        rows,
    )
    terminal.records(
        [
            ("split", "{split}"),
            ("log loss", "{log_loss:.3f}"),
            ("ECE", "{ece:.3f}"),
            ("95 %", "{intervals[ece][0]:.3f}-{intervals[ece][1]:.3f}"),
            ("by chance", "{ece_if_calibrated[mean]:.3f}"),
            ("at 90 % coverage", "{selective_accuracy_90:.3f}"),
        ],
        rows,
    )
    first, scores = next(iter(splits.items()))
    say()
    _say_intervals(splits)
    say("by chance the ECE of a perfectly calibrated model on as many images")
    say("coverage  accuracy of the 90 % that the model is most confident of")
    say_classes(first, scores, interval=True)
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
            say(f"          {split} has only {scores['groups']} groups, which makes intervals wide")
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


def say_scores(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the scores of a run: a row for each split, then the classes of the first split."""
    terminal.records(
        [
            ("split", "{split}"),
            ("images", "{examples:,}"),
            ("accuracy", "{accuracy:.3f}"),
            ("95 % interval", "{accuracy_low:.3f} to {accuracy_high:.3f}"),
            ("macro F1", "{macro_f1:.3f}"),
            ("log loss", "{log_loss:.3f}"),
            ("ECE", "{ece:.3f}"),
        ],
        [{"split": split, **scores} for split, scores in splits.items()],
    )
    for split, scores in splits.items():
        missing = missing_classes(scores)
        if missing:
            say(f"macro F1  {missing} of {split}")
    say_classes(*next(iter(splits.items())), interval=False)


def say_classes(split: str, scores: Mapping[str, Any], *, interval: bool) -> None:
    """Print a row for each class of a split, on request with the interval of its recall."""
    columns = [
        (f"class ({split})", "{name}"),
        ("images", "{support:,}"),
        ("precision", "{precision:.3f}"),
        ("recall", "{recall:.3f}"),
        *([("95 %", "{recall_low:.3f}-{recall_high:.3f}")] if interval else []),
        ("F1", "{f1:.3f}"),
    ]
    width = _NAME if interval else None  # the interval would take the table beyond 80 columns
    per_class = list(scores["per_class"].items())
    hidden = len(per_class) - _SHOWN_CLASSES
    if hidden > 0:
        per_class = sorted(per_class, key=lambda entry: entry[1]["recall"])[:_SHOWN_CLASSES]
    terminal.records(columns, [{"name": _short(name, width), **one} for name, one in per_class])
    if hidden > 0:
        say(f"          the classes that are found least; {hidden:,} more are in the document")


def _short(name: str, width: int | None) -> str:
    """Shorten `name` to `width` characters; what distinguishes keys and classes is their end."""
    return (
        name
        if width is None or len(name) <= width
        else "\N{HORIZONTAL ELLIPSIS}" + name[1 - width :]
    )


def _shortened(rows: Iterable[Mapping[str, Any]], **widths: int) -> list[dict[str, Any]]:
    return [{**row, **{name: _short(row[name], widths[name]) for name in widths}} for row in rows]


def _say_pairs(split: str, scores: Mapping[str, Any]) -> None:
    pairs = scores["confused_pairs"][:_SHOWN]
    if pairs:
        terminal.records(
            [
                (f"confused ({split})", "{label}"),
                ("taken for", "{predicted}"),
                ("images", "{count:,}"),
                ("share of class", "{percent:.1f} %"),
            ],
            _shortened(
                [{**pair, "percent": 100 * pair["share"]} for pair in pairs],
                label=_KEY,
                predicted=_KEY,
            ),
        )


def _say_slices(split: str, scores: Mapping[str, Any]) -> None:
    for name, rows in scores["slices"].items():
        shown = [
            {**row, "note": "lower" if row["high"] < scores["accuracy"] else ""}
            for row in rows[:_SHOWN_SLICES]
        ]
        terminal.records(
            [
                (f"{name} ({split})", "{value}"),
                ("images", "{examples:,}"),
                ("accuracy", "{accuracy:.3f}"),
                ("95 %", "{low:.3f}-{high:.3f}"),
                ("", "{note}"),
            ],
            _shortened(shown, value=_NAME),
        )
        if len(rows) > _SHOWN_SLICES:
            say(f"          and {len(rows) - _SHOWN_SLICES:,} more; the least accurate are shown")


def _say_mistakes(split: str, scores: Mapping[str, Any]) -> None:
    errors, suspects = scores["confident_errors"][:_SHOWN], scores["likely_wrong_labels"]
    if errors:
        terminal.records(
            [
                (f"confident errors ({split})", "{key}"),
                ("label", "{label}"),
                ("predicted", "{predicted}"),
                ("confidence", "{confidence:.3f}"),
            ],
            _shortened(errors, key=_KEY, label=_CLASS, predicted=_CLASS),
        )
    if suspects["first"]:
        terminal.records(
            [
                (f"likely wrong labels ({split})", "{key}"),
                ("label", "{label}"),
                ("suggested", "{suggested}"),
                ("P(label)", "{self_confidence:.3f}"),
            ],
            _shortened(suspects["first"][:_SHOWN], key=_KEY, label=_CLASS, suggested=_CLASS),
        )
        note = "; the model has learned from these" if split == "train" else ""
        say(f"          {suspects['examples']:,} in all{note}")


def _say_tta(scores: Mapping[str, Any]) -> None:
    tta = scores["tta"]
    names = ("accuracy", "log_loss", "ece")
    terminal.records(
        [
            ("test-time augmentation", "{views}"),
            ("accuracy", "{accuracy:.3f}"),
            ("log loss", "{log_loss:.3f}"),
            ("ECE", "{ece:.3f}"),
            ("network time", "{time:.1f}"),
        ],
        [
            {"views": "without", "time": 1.0} | {name: tta[f"{name}_without"] for name in names},
            {**scores, "views": f"{tta['views']} views", "time": tta["times_as_long"]},
        ],
    )
    say(
        f"          {tta['difference']:+.3f} accuracy, 95 % {tta['interval'][0]:+.3f} to "
        f"{tta['interval'][1]:+.3f}, McNemar p {tta['mcnemar_p']:.3g}"
    )


def _say_against(scores: Mapping[str, Any]) -> None:
    other = scores["against"]
    say()
    say(
        f"against   accuracy {scores['accuracy']:.3f}, the other {other['accuracy']:.3f}: "
        f"{other['difference']:+.3f} ({other['interval'][0]:+.3f} to {other['interval'][1]:+.3f})"
    )
    say(
        f"          right alone {other['only_ours']:,}, the other {other['only_theirs']:,}; "
        f"McNemar's exact p {other['mcnemar_p']:.3g}"
    )
    say(f"          they differ on {other['disagreements']:,} of {scores['examples']:,}")
    if other["kinds"]:
        terminal.records(
            [
                ("they differ: label", "{label}"),
                ("this model", "{ours}"),
                ("the other", "{theirs}"),
                ("images", "{count:,}"),
            ],
            _shortened(other["kinds"][:_SHOWN], label=22, ours=22, theirs=22),
        )


def say_background(border: Mapping[str, Any] | None, *, always: bool) -> None:
    """Print what the border alone tells about the class, unless it is little and not `always`."""
    if border is None or not (always or border["high_warning"]):
        return
    say()
    say(
        f"border    {background.WIDTH} pixels of it alone give accuracy {border['accuracy']:.3f} "
        f"({border['low']:.3f}-{border['high']:.3f})"
    )
    say(f"          and the most frequent class {border['majority']:.3f}")
    if border["high_warning"]:
        share = border["share_of_lead"]
        much = "all" if share is None or share >= 1 else f"{share:.0%}".replace("%", " %")
        say(f"warning   that is {much} of the model's lead: it may see the place, not the leaf")
