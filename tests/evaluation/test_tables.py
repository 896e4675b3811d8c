"""The tables of an evaluation: each figure in its column, and what is shown of long lists."""

from typing import Any

import pytest

from leafnet.evaluation.tables import missing_classes, say_background, say_evaluation, say_scores

DOTS = "\N{HORIZONTAL ELLIPSIS}"
LONG = "farm_12/field_07/plant_0031/leaf_4.jpg"


def of_class(support: int, recall: float) -> dict[str, Any]:
    return {
        "support": support,
        "precision": 0.875,
        "recall": recall,
        "recall_low": recall - 0.0625,
        "recall_high": recall + 0.03125,
        "f1": 0.8125,
    }


def of_split(**changes: Any) -> dict[str, Any]:
    """What a document says of a split, every figure another."""
    return {
        "examples": 1234,
        "accuracy": 0.75,
        "accuracy_low": 0.7,
        "accuracy_high": 0.8,
        "macro_f1": 0.625,
        "log_loss": 0.5125,
        "ece": 0.0375,
        "ece_if_calibrated": {"mean": 0.021},
        "selective_accuracy_90": 0.801,
        "intervals": {"accuracy": [0.71, 0.79], "macro_f1": [0.58, 0.66], "ece": [0.011, 0.052]},
        "resampled_by_group": False,
        "groups": None,
        "per_class": {"rust": of_class(1000, 0.5), "scab": of_class(234, 0.25)},
        "confused_pairs": [],
        "slices": {},
        "confident_errors": [],
        "likely_wrong_labels": {"examples": 0, "first": []},
        "background": None,
        **changes,
    }


def shown(capsys: pytest.CaptureFixture[str], **changes: Any) -> list[str]:
    """The lines of an evaluation of the test split."""
    say_evaluation({"splits": {"test": of_split(**changes)}})
    return said(capsys)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines, of at most 80 columns; one space between words, however wide the columns."""
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()), default=0) <= 80
    return [" ".join(line.split()) for line in out.splitlines()]


def after(lines: list[str], head: str) -> list[str]:
    """The lines below the one that begins with `head`, up to an empty one."""
    (start,) = [i for i, line in enumerate(lines) if line.startswith(head)]
    rest = lines[start + 1 :]
    return rest[: rest.index("")] if "" in rest else rest


def test_a_row_for_each_split_and_then_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    train = of_split(examples=9, accuracy=1.0, per_class={"rust": of_class(9, 0.9375)})
    say_evaluation({"splits": {"test": of_split(), "train": train}})
    lines = said(capsys)
    assert after(lines, "split images") == [
        "test 1,234 0.750 0.710-0.790 0.625 0.580-0.660",
        "train 9 1.000 0.710-0.790 0.625 0.580-0.660",
    ]
    assert after(lines, "split log loss")[0] == ("test 0.512 0.037 0.011-0.052 0.021 0.801")
    assert after(lines, "class (test)") == [
        "rust 1,000 0.875 0.500 0.438-0.531 0.812",
        "scab 234 0.875 0.250 0.188-0.281 0.812",
    ]
    assert "95 % of test sets of other images have the truth in the interval" in lines
    for absent in ("confused", "confident", "likely", "border", "against", "test-time", "macro"):
        assert not any(line.startswith(absent) for line in lines), absent


def test_scores_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    empty = of_split(per_class={"rust": of_class(0, 0.5)})
    say_scores({"valid": of_split(), "test": empty})
    lines = said(capsys)
    assert after(lines, "split images")[:2] == [
        "valid 1,234 0.750 0.700 to 0.800 0.625 0.512 0.037",
        "test 1,234 0.750 0.700 to 0.800 0.625 0.512 0.037",
    ]
    assert "macro F1 counts 1 class without an image as 0 of test" in lines
    assert after(lines, "class (valid)") == [
        "rust 1,000 0.875 0.500 0.812",
        "scab 234 0.875 0.250 0.812",
    ]


def test_classes_without_an_image() -> None:
    some = {str(i): of_class(i % 2, 0.5) for i in range(5)}
    assert missing_classes({"per_class": some}) == "counts 3 classes without an image as 0"
    assert missing_classes({"per_class": {"rust": of_class(1, 0.5)}}) == ""


@pytest.mark.parametrize(("groups", "few"), [(19, True), (20, False)])
def test_few_groups_are_told(groups: int, few: bool, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, resampled_by_group=True, groups=groups)
    assert "95 % of test sets of other groups have the truth in the interval" in lines
    assert any(line.startswith(f"test has only {groups} groups") for line in lines) == few


@pytest.mark.parametrize("count", [60, 61])
def test_of_many_classes_those_that_are_found_least(
    count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    recalls = {f"class_{i:02}": of_class(5, (i * 7 % count) / 64) for i in range(count)}
    lines = shown(capsys, per_class=recalls)
    rows = [line for line in after(lines, "class (test)") if line.startswith("class_")]
    # All of sixty, in their order; of more those with the lowest recall, the lowest first.
    by_recall = sorted(recalls, key=lambda name: float(recalls[name]["recall"]))
    assert [row.split()[0] for row in rows] == (list(recalls) if count == 60 else by_recall[:60])
    told = [line for line in lines if line.startswith("the classes that are found least")]
    more = ["the classes that are found least; 1 more are in the document"]
    assert told == (more if count == 61 else [])


def test_pairs_mistakes_and_suspects(capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"label": "rust", "predicted": "scab", "count": 1500, "share": 0.1234}
    error = {"key": LONG, "label": "rust", "predicted": "a" * 19, "confidence": 0.9876}
    suspect = {"key": "2.jpg", "label": "rust", "suggested": "b" * 18, "self_confidence": 0.0125}
    lines = shown(
        capsys,
        confused_pairs=[pair] * 9,
        confident_errors=[error] * 9,
        likely_wrong_labels={"examples": 1017, "first": [suspect] * 9},
    )
    assert after(lines, "confused (test)") == ["rust scab 1,500 12.3 %"] * 8
    # A name of one character too many loses its beginning, one that just fits does not.
    assert (
        after(lines, "confident errors (test)")
        == [f"{DOTS}{LONG[-25:]} rust {DOTS}{'a' * 17} 0.988"] * 8
    )
    assert after(lines, "likely wrong labels (test)") == [
        *([f"2.jpg rust {'b' * 18} 0.013"] * 8),
        "1,017 in all",
    ]


def test_a_model_has_learned_the_labels_of_its_training(
    capsys: pytest.CaptureFixture[str],
) -> None:
    suspect = {"key": "2.jpg", "label": "rust", "suggested": "scab", "self_confidence": 0.0125}
    wrong = {"examples": 1, "first": [suspect]}
    say_evaluation({"splits": {"train": of_split(likely_wrong_labels=wrong)}})
    assert "1 in all; the model has learned from these" in said(capsys)


@pytest.mark.parametrize("count", [12, 13])
def test_slices_that_are_lower_are_marked(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"value": f"farm_{i}", "examples": 1100, "accuracy": 0.5, "low": 0.375, "high": high}
        for i, high in enumerate([0.625, 0.75, *[0.875] * (count - 2)])
    ]
    lines = shown(capsys, slices={"folder": rows})
    found = after(lines, "folder (test)")
    # Lower is what lies below the accuracy of all, which is 0.75, with its whole interval.
    assert found[:3] == [
        "farm_0 1,100 0.500 0.375-0.625 lower",
        "farm_1 1,100 0.500 0.375-0.750",
        "farm_2 1,100 0.500 0.375-0.875",
    ]
    more = [] if count == 12 else ["and 1 more; the least accurate are shown"]
    assert found[12:] == more


def test_what_the_views_of_a_photograph_gain(capsys: pytest.CaptureFixture[str]) -> None:
    tta: dict[str, Any] = {
        **{"views": 8, "accuracy_without": 0.7, "log_loss_without": 0.6, "ece_without": 0.05},
        **{"difference": 0.05, "interval": [-0.01, 0.11], "mcnemar_p": 0.0421},
        "times_as_long": 7.96,
    }
    assert after(shown(capsys, tta=tta), "test-time augmentation") == [
        "without 0.700 0.600 0.050 1.0",
        "8 views 0.750 0.512 0.037 8.0",
        "+0.050 accuracy, 95 % -0.010 to +0.110, McNemar p 0.0421",
    ]


def test_another_model_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    kind = {"label": "rust", "ours": "c" * 22, "theirs": "d" * 23, "count": 1003}
    other: dict[str, Any] = {
        **{"accuracy": 0.7, "difference": 0.05, "interval": [-0.01, 0.11], "mcnemar_p": 0.0421},
        **{"only_ours": 1040, "only_theirs": 20, "disagreements": 1060, "kinds": [kind] * 9},
    }
    lines = shown(capsys, against=other)
    assert "against accuracy 0.750, the other 0.700: +0.050 (-0.010 to +0.110)" in lines
    assert "right alone 1,040, the other 20; McNemar's exact p 0.0421" in lines
    assert "they differ on 1,060 of 1,234" in lines
    assert after(lines, "they differ:") == [f"rust {'c' * 22} {DOTS}{'d' * 21} 1,003"] * 8
    lines = shown(capsys, against={**other, "kinds": []})
    assert not any(line.startswith("they differ: label") for line in lines)


@pytest.mark.parametrize(
    ("share", "much"), [(0.5, "50 %"), (0.99, "99 %"), (1.0, "all"), (1.2, "all"), (None, "all")]
)
def test_a_border_that_tells_the_class(
    share: float | None, much: str, capsys: pytest.CaptureFixture[str]
) -> None:
    border: dict[str, Any] = {
        **{"accuracy": 0.625, "low": 0.5, "high": 0.75, "majority": 0.375},
        **{"high_warning": True, "share_of_lead": share},
    }
    say_background(border, always=False)
    assert said(capsys) == [
        "",
        "border 8 pixels of it alone give accuracy 0.625 (0.500-0.750)",
        "and the most frequent class 0.375",
        f"warning that is {much} of the model's lead: it may see the place, not the leaf",
    ]


def test_a_border_that_tells_little(capsys: pytest.CaptureFixture[str]) -> None:
    border: dict[str, Any] = {
        **{"accuracy": 0.625, "low": 0.5, "high": 0.75, "majority": 0.375},
        **{"high_warning": False, "share_of_lead": 0.1},
    }
    say_background(border, always=False)
    say_background(None, always=True)
    assert said(capsys) == []
    say_background(border, always=True)
    assert [line.split(" ")[0] for line in said(capsys)] == ["", "border", "and"]
    assert any(line.startswith("border") for line in shown(capsys, background=border))
