"""The charts: that they are drawn, of odd numbers too, and that names stay names."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from leafnet.metrics.drift import BINS, Histogram
from leafnet.reporting import charts
from leafnet.reporting.maps import Placed, scatter_map

CLASSES = ["c0", "c1", "c2"]


def drawn(svg: str) -> ElementTree.Element:
    """`svg`, which has to be well-formed and to say what it shows."""
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert not re.search(r"\bnan\b|\binf\b", svg)
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter("text")]


@pytest.mark.parametrize("epochs", [1, 2, 50])
@pytest.mark.parametrize("quantity", ["loss", "accuracy"])
def test_curves(epochs: int, quantity: str) -> None:
    history = [
        {"epoch": float(e), "train_loss": 1 / e, "valid_loss": 1.2 / e, "train_accuracy": 1.0}
        for e in range(1, epochs + 1)
    ]
    root = drawn(charts.curves(history, quantity, best_epoch=epochs, description="It falls."))
    assert root.get("aria-label") == "It falls."
    assert ("valid" in texts(root)) == (quantity == "loss")


def test_curves_of_values_that_are_not_finite() -> None:
    history = [{"epoch": 1.0, "train_loss": float("inf")}, {"epoch": 2.0, "train_loss": 0.5}]
    drawn(charts.curves(history, "loss", best_epoch=2, description="t"))
    assert charts.curves(history, "accuracy", best_epoch=2, description="t") == ""


def test_curves_beside_what_was_before() -> None:
    history = [
        {"epoch": float(e), "train_accuracy": 0.9, "valid_accuracy": 0.9 - 0.01 * e} for e in (1, 2)
    ]
    root = drawn(
        charts.curves(history, "accuracy", best_epoch=0, description="t", head_alone=0.885)
    )
    classes = [path.get("class") for path in root.iter("path")]
    assert "before" in classes
    assert "mark" not in classes, "no epoch is the best"
    names = {"".join(each.itertext()): float(each.get("y", "")) for each in root.iter("text")}
    places = [names[name] for name in ("train", "head", "valid")]
    assert min(np.diff(places)) >= 14 - 0.2, "one name hides another"
    lowest = drawn(
        charts.curves(history, "accuracy", best_epoch=1, description="t", head_alone=0.2)
    )
    (line,) = (path for path in lowest.iter("path") if path.get("class") == "before")
    height = float(re.findall(r"M\S+ ([\d.]+)H", line.get("d", ""))[0])
    assert height < 250 - 40, "it is inside the picture"


def test_a_histogram_with_and_without_what_it_is_compared_with() -> None:
    found = Histogram(0.0, 1.0, np.arange(BINS))
    both = drawn(
        charts.histogram(
            found,
            found,
            names=("tonight", "validation"),
            description="t",
            label="confidence",
            limit=0.75,
            limit_name="review under 0.75",
        )
    )
    assert {"tonight", "validation", "review under 0.75"} <= set(texts(both))
    alone = drawn(
        charts.histogram(found, None, names=("tonight", "-"), description="t", label="novelty")
    )
    assert "-" not in texts(alone)
    drawn(
        charts.histogram(
            found._replace(counts=np.zeros(BINS, int)),
            None,
            names=("a", "b"),
            description="t",
            label="x",
        )
    )


def test_reliability_of_one_sure_example() -> None:
    drawn(charts.reliability([{"confidence": 1.0, "accuracy": 1.0, "count": 1}], description="t"))


def test_names_are_not_markup() -> None:
    evil = '"><script>alert(1)</script>'
    root = drawn(
        charts.stacked([(evil, [1, 0, 2]), ("2 Nov", [0, 0, 0])], CLASSES, description=evil)
    )
    assert root.get("aria-label") == evil
    assert evil in texts(root)
    assert list(root.iter("script")) == []


@pytest.mark.parametrize("nights", [2, 8, 29])
def test_the_last_night_stands_out(nights: int) -> None:
    counts = [(f"{i} Nov", [i, 1, 2]) for i in range(nights)]
    root = drawn(charts.stacked(counts, CLASSES, description="t"))
    assert f"{nights - 1} Nov" in texts(root)
    (frame,) = (each for each in root.iter("rect") if each.get("class") == "frame")
    assert float(frame.get("x", "0")) + float(frame.get("width", "0")) == pytest.approx(396, abs=1)


def test_small_bars_begin_with_the_first_night_and_leave_room_for_those_without() -> None:
    root = ElementTree.fromstring(charts.spark([None, None, 4, None, 2]))
    past, now = (each.get("d", "") for each in root.iter("path"))
    assert re.findall(r"M([\d.]+) 28v-([\d.]+)", past) == [("0.5", "26.0")]
    assert re.findall(r"M([\d.]+) 28v-([\d.]+)", now) == [("48.5", "13.0")]


def placed(latitude: list[float], longitude: list[float]) -> Placed:
    group = np.arange(len(latitude)) % 3
    return Placed(np.array(latitude), np.array(longitude), group)


def marks(svg: str) -> np.ndarray:
    """[N, 2] pixels of the marks."""
    found = [
        mark
        for element in ElementTree.fromstring(svg).iter("path")
        if "place" in element.get("class", "")
        for mark in re.findall(r"M(\d+) (\d+)", element.get("d", ""))
    ]
    return np.array(found, int).reshape(-1, 2)


def test_a_map_is_true_to_scale() -> None:
    # At 60 degrees north a degree of longitude is half as long as one of latitude.
    square = scatter_map(
        placed([60, 60, 60.05, 60.05], [10, 10.1, 10, 10.1]), CLASSES, description="t"
    )
    assert square is not None
    drawn(square.svg)
    width, height = np.ptp(marks(square.svg), axis=0)
    assert width == pytest.approx(height, rel=0.02)
    assert square.extent == "5.6 km from west to east and 5.6 km from south to north"
    assert square.outside == 0
    (label,) = (text for text in texts(ElementTree.fromstring(square.svg)) if text.endswith(" km"))
    bar = re.search(r"v6h([\d.]+)v-6", square.svg)
    assert bar is not None
    assert float(bar[1]) / float(label.split()[0]) == pytest.approx(height / 5.56, rel=0.03)


def test_a_field_on_the_180th_meridian_is_one_field() -> None:
    found = scatter_map(placed([-17] * 3, [179.99, -179.99, 180]), CLASSES, description="t")
    assert found is not None
    assert found.extent.startswith("2.1 km from west")


def test_one_wrong_position_does_not_hide_the_others() -> None:
    rng = np.random.default_rng(0)
    latitude, longitude = 52 + 0.01 * rng.random(60), 11 + 0.01 * rng.random(60)
    latitude[7] = -33.0
    found = scatter_map(placed(latitude.tolist(), longitude.tolist()), CLASSES, description="t")
    assert found is not None
    assert found.outside == 1
    assert np.ptp(marks(found.svg), axis=0).max() > 200


def test_one_position_and_none() -> None:
    one = scatter_map(placed([52.0], [11.0]), CLASSES, description="t")
    assert one is not None
    assert len(marks(one.svg)) == 1
    assert scatter_map(placed([], []), CLASSES, description="t") is None


def test_ten_thousand_positions_are_a_small_picture() -> None:
    rng = np.random.default_rng(0)
    where = placed((52 + rng.random(10_000)).tolist(), (11 + rng.random(10_000)).tolist())
    found = scatter_map(where, CLASSES, description="t")
    assert found is not None
    assert len(found.svg) < 600_000


def test_each_class_has_a_mark_of_its_own() -> None:
    shapes = {charts.mark(group, 0, 0) for group in range(charts.COLOURS + 1)}
    assert len(shapes) == charts.COLOURS + 1
