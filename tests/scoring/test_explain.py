"""Activation maps of the photographs for review, from what the network saw of them."""

import io

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image

from leafnet.models import cam, weights
from leafnet.models.classifier import Head
from leafnet.scoring import explain as scoring_explain
from leafnet.scoring import thumbnails
from leafnet.scoring.explain import make
from tests.models.test_cam import green_detector

SIZE = 128
CORNERS = ((0, 3), (3, 0), (0, 0), (3, 3), (0, 3))  # row and column among 4 x 4 places
CLASSES = ("soil", "leaf")
# Wide, tall, square, and so on.
WIDTHS, HEIGHTS = [400, 300, 90, 400, 300], [300, 600, 90, 300, 600]


def for_review(labels: list[str]) -> pa.Table:
    """Grey photographs with a green patch, in another corner of each."""
    pixels = np.full((len(labels), SIZE, SIZE, 3), 90, np.uint8)
    for square, (row, column) in zip(pixels, CORNERS, strict=False):
        # Each place looks at two pixels around every 32nd.
        top, left = (max(0, 32 * place - 4) for place in (row, column))
        square[top : top + 32, left : left + 32] = [20, 250, 20]
    count = len(labels)
    rows = pa.table(
        {
            "image": [f"{i}.jpg" for i in range(count)],
            "version": pa.array(["1"] * (count - 1) + [None], pa.string()),
            "status": ["review"] * count,
            "reason": ["low-confidence: x"] * count,
            "confidence": pa.array([0.5] * count, pa.float32()),
            "novelty": pa.array([1.0] * count, pa.float32()),
            "label": labels,
            "width": pa.array(WIDTHS[:count], pa.int32()),
            "height": pa.array(HEIGHTS[:count], pa.int32()),
        }
    )
    return thumbnails.Maker(seen=True).attach(rows, pixels, np.arange(count))


def opened(data: bytes) -> NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(data)), np.int64)


def in_quarters(pixels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The red of `pixels`, 4 x 4 places of a few pixels each."""
    height, width = (side // 4 for side in pixels.shape[:2])
    red = pixels[: 4 * height, : 4 * width, 0]
    return red.reshape(4, height, 4, width).swapaxes(1, 2)


def test_the_patch_that_speaks_for_the_label_is_coloured() -> None:
    """By a network that sees green; the last photograph is said to be of the other class."""
    kernel = np.zeros((weights.FEATURES, 2), np.float32)
    kernel[0] = [-0.02, 0.02]
    head: Head = [(kernel, np.array([0.5, -0.5], np.float32))]
    explain = cam.explainer(green_detector(), head, image_size=SIZE, precision="float32")
    rows = for_review(["leaf"] * 4 + ["soil"])
    made = make(rows, explain, CLASSES, size=SIZE).to_pylist()
    assert [(row["image"], row["version"]) for row in made] == [
        *((f"{i}.jpg", "1") for i in range(4)),
        ("4.jpg", None),
    ]
    small = [opened(row[thumbnails.COLUMN]) for row in rows.to_pylist()]
    shown = [opened(row[thumbnails.EXPLAINED]) for row in made]
    for before, after, (row, column) in zip(small, shown, CORNERS, strict=True):
        assert after.shape == before.shape
        patch, opposite = (
            in_quarters(after - before)[place].mean()
            for place in ((row, column), (3 - row, 3 - column))
        )
        if after is shown[4]:  # all but the patch speaks for soil
            assert opposite > 80 > 20 > patch
        else:
            assert patch > 80 > 20 > opposite


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_pass_has_as_many(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_explain, "_BATCH", 2)
    sizes, asked = [], []

    def explain(pixels: NDArray[np.uint8], classes: NDArray[np.int64]) -> NDArray[np.float32]:
        sizes.append(len(pixels))
        asked.extend(classes.tolist())
        return np.zeros((len(pixels), 4, 4), np.float32)

    rows = for_review(["leaf"] * count)
    made = make(rows, explain, CLASSES, size=SIZE)
    assert made.num_rows == count
    assert set(sizes) == {min(2, count)}
    assert asked[:count] == [1] * count
