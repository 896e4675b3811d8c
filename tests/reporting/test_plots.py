import io
import struct

import matplotlib
import numpy as np
import pytest
from PIL import Image

from leafnet.metrics.scores import scores, tally
from leafnet.reporting.plots import confusion_png, curves_png, reliability_png


def history(epochs: int) -> list[dict[str, float]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "train_accuracy": 1 - 0.5 / epoch,
            "valid_loss": 0.1 + 1 / epoch + 0.01 * epoch,
            "valid_accuracy": 1 - 0.6 / epoch,
            "learning_rate": 0.1,
        }
        for epoch in range(1, epochs + 1)
    ]


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    assert np.ptp(np.asarray(image.convert("L"))) > 150  # something is drawn
    return image


def chunks(png: bytes) -> set[bytes]:
    found, at = set(), 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        found.add(png[at + 4 : at + 8])
        at += size + 12
    return found


@pytest.mark.parametrize("epochs", [1, 5, 400])
def test_curves_of_any_length(epochs: int) -> None:
    assert opened(curves_png(history(epochs))).size == (1200, 456)


@pytest.mark.parametrize(
    "kept",
    [
        ("epoch", "train_loss", "train_accuracy"),
        ("epoch", "valid_loss"),
        ("epoch",),
    ],
)
def test_curves_with_columns_missing(kept: tuple[str, ...]) -> None:
    rows = [{key: row[key] for key in kept} for row in history(3)]
    assert opened(curves_png(rows)).size == (1200, 456)


def test_curves_of_extreme_values() -> None:
    rows = history(3)
    rows[0]["train_loss"] = rows[1]["valid_loss"] = float("inf")
    opened(curves_png(rows))
    flat = {"train_loss": 0.0, "valid_loss": 0.0, "train_accuracy": 1.0, "valid_accuracy": 1.0}
    opened(curves_png([{"epoch": epoch, **flat} for epoch in (1, 2)]))


def test_the_best_epoch_is_where_valid_loss_is_lowest() -> None:
    rows = history(20)
    moved = [{**row, "valid_loss": 2.0 if row["epoch"] != 4 else 0.3} for row in rows]
    later = [{**row, "valid_loss": 2.0 if row["epoch"] != 15 else 0.3} for row in rows]
    # Accuracy is the same in both, so that what differs in the right half is the mark alone.
    left, right = (np.asarray(opened(curves_png(each)))[:, 600:] for each in (moved, later))
    columns = np.flatnonzero((left != right)[100:380].any(axis=(0, 2)))
    assert columns.size
    assert np.ptp(columns) > 0.4 * left.shape[1]


@pytest.mark.parametrize("classes", [1, 3, 30])
def test_confusion_grows_with_the_classes(classes: int) -> None:
    counts = np.random.default_rng(0).integers(0, 2000, (classes, classes))
    counts[0] = 0  # a class without examples
    names = [
        f"Tomato___Tomato_Yellow_Leaf_Curl_Virus_with_{'a' * i}_long_name" for i in range(classes)
    ]
    width, height = opened(confusion_png(counts.tolist(), names, title="test split")).size
    assert 264 <= width <= 1500
    assert 264 <= height <= 1500


def test_confusion_text_stops_above_twelve_classes() -> None:
    def dark_pixels(classes: int) -> int:
        names = [chr(ord("a") + i) for i in range(classes)]
        counts = np.ones((classes, classes), int).tolist()
        pixels = np.asarray(opened(confusion_png(counts, names, title="t")).convert("L"))
        return int((pixels < 100).sum())

    assert dark_pixels(12) > 2 * dark_pixels(13)


def test_class_names_are_not_markup() -> None:
    opened(confusion_png([[1, 0], [0, 1]], ["$rust$", r"$\oops$"], title="$t$ of 5$"))


def test_confusion_of_another_size_than_the_names() -> None:
    with pytest.raises(ValueError, match=r"3 class names for a confusion of shape \(2, 2\)"):
        confusion_png([[1, 0], [0, 1]], ["a", "b", "c"], title="test split")


def test_reliability_of_real_scores() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=200)
    logits = (2 * rng.normal(size=(200, 3))).astype(np.float32)
    found = scores(tally(logits, labels), ["a", "b", "c"])
    assert opened(reliability_png(found["calibration"], ece=found["ece"])).size == (576, 720)


def test_reliability_shows_what_was_before_in_its_place() -> None:
    rows = [{"confidence": 0.9, "accuracy": 0.9, "count": 50}]
    before = [{"confidence": 0.5, "accuracy": 0.9, "count": 50}]
    alone, both = (
        np.asarray(opened(reliability_png(rows, ece=0.0, before=b, ece_before=0.4)).convert("RGB"))
        for b in ((), before)
    )
    # Below the line of titles, nothing is different but a ring at (50 %, 90 %).
    rows_changed, columns_changed = np.nonzero((alone != both).any(axis=2)[60:])
    assert 0 < np.ptp(rows_changed) < 20
    assert np.ptp(columns_changed) < 20
    left, right = 0.15 * 576, 0.95 * 576
    assert columns_changed.mean() == pytest.approx((left + right) / 2, abs=3)


def test_reliability_of_one_sure_example() -> None:
    rows = [{"confidence": 1.0, "accuracy": 1.0, "count": 1}]
    assert opened(reliability_png(rows, ece=0.0)).size == (576, 720)


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="no epochs to draw: the history is empty"):
        curves_png([])
    with pytest.raises(ValueError, match="no bins to draw: the calibration is empty"):
        reliability_png([], ece=0.0)


def test_bytes_depend_on_the_data_alone() -> None:
    def drawn() -> list[bytes]:
        return [
            curves_png(history(3)),
            confusion_png([[3, 1], [0, 2]], ["rust", "healthy"], title="test split"),
            reliability_png([{"confidence": 0.8, "accuracy": 0.7, "count": 10}], ece=0.1),
        ]

    first = drawn()
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black"}):
        assert drawn() == first
    for png in first:
        assert not chunks(png) & {b"tEXt", b"iTXt", b"tIME"}  # no date, no version


def test_a_picture_of_a_thousand_classes_is_of_bounded_size() -> None:
    confusion = np.diag(np.full(1081, 3))
    confusion[1000, 17] = 9
    names = [f"species {i}" for i in range(1081)]
    data = confusion_png(confusion.tolist(), names, title="test split")
    with Image.open(io.BytesIO(data)) as picture:
        assert max(picture.size) < 3000
    assert len(data) < 1_000_000
