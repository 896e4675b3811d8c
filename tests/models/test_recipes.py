"""The lines that feed an export: each near what the model has learnt to see."""

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from leafnet.data import synthetic
from leafnet.models import recipes

SIZE = 64


def colours(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A model [N, 3] of the mean colour."""
    means = pixels.reshape(len(pixels), -1, 3).mean(axis=1)
    return np.asarray(means / means.sum(axis=1, keepdims=True), np.float32)


def photograph(seed: int, width: int = 800, *, kind: str = "JPEG", turned: int = 1) -> bytes:
    leaf = synthetic.draw_leaf("healthy", seed=seed, width=width, height=width * 3 // 4)
    exif, sink = Image.Exif(), io.BytesIO()
    exif[0x0112] = turned
    Image.fromarray(leaf).save(sink, kind, quality=90, exif=exif)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "levels"), [("pillow", 0.6), ("opencv", 1.2), ("tensorflow", 0.6)]
)
def test_each_line_comes_within_a_level_or_so(name: str, levels: float) -> None:
    files = [photograph(seed, width=300 + 250 * seed) for seed in range(5)]
    found = recipes.measure(colours, files, size=SIZE)[name]
    assert (found["photographs"], found["not_read"], found["equal_labels"]) == (5, 0, 5)
    assert found["mean_levels"] < levels
    assert found["max_difference"] < 0.01
    assert found["line"] == recipes.RECIPES[name].expression


def test_what_a_decoder_does_not_read_or_turn_is_told() -> None:
    found = recipes.measure(colours, [photograph(1, kind="TIFF")], size=SIZE)
    assert {name: told["not_read"] for name, told in found.items()} == {
        "pillow": 0,
        "opencv": 0,
        "tensorflow": 1,
    }
    assert found["tensorflow"]["mean_levels"] is None
    turned = recipes.measure(colours, [photograph(1, turned=6)], size=SIZE)
    assert turned["pillow"]["mean_levels"] < 0.6
    assert turned["opencv"]["mean_levels"] < 1.2
    assert turned["tensorflow"]["mean_levels"] > 5
    assert "turns none upright" in turned["tensorflow"]["note"]
