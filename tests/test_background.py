import numpy as np
import pytest
from numpy.typing import NDArray

from leafnet import background


def photographs(border_of: NDArray[np.int64], *, seed: int = 0) -> NDArray[np.uint8]:
    """Noise of 32 pixels, the border of each a little brighter by 20 x `border_of`."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(60, 160, (len(border_of), 32, 32, 3))
    frame = np.ones((32, 32, 1), np.int64)
    frame[8:-8, 8:-8] = 0
    return np.asarray(pixels + frame * (20 * border_of[:, None, None, None]), np.uint8)


def test_a_planted_border_is_found() -> None:
    labels = np.arange(150) % 3
    found = background.probe(background.border(photographs(labels)), labels, model_accuracy=0.95)
    assert found is not None
    assert found["accuracy"] > 0.95
    assert found["majority"] == pytest.approx(1 / 3)
    assert found["high_warning"]


def test_an_innocent_border_is_not() -> None:
    labels = np.arange(150) % 3
    elsewhere = np.random.default_rng(1).integers(0, 3, 150)
    found = background.probe(background.border(photographs(elsewhere)), labels, model_accuracy=0.95)
    assert found is not None
    assert found["low"] < found["majority"] < found["high"]
    assert not found["high_warning"]


def test_some_of_the_lead_is_told_without_a_warning() -> None:
    """Four of ten borders give the class away."""
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    shown = np.where(generator.random(300) < 0.4, labels, generator.integers(0, 3, 300))
    found = background.probe(background.border(photographs(shown)), labels, model_accuracy=0.95)
    assert found is not None
    assert found["low"] > found["majority"]
    assert 0.1 < found["share_of_lead"] < 0.5
    assert not found["high_warning"]


def test_the_inside_is_not_seen() -> None:
    pixels = photographs(np.array([0, 1]))
    inside = pixels.copy()
    inside[:, 8:-8, 8:-8] = 0
    np.testing.assert_array_equal(background.border(pixels), background.border(inside))


def test_statistics_by_hand() -> None:
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    pixels[0, :8, :, 0] = 255  # the upper half is red
    found = background.border(pixels)[0].reshape(4, 2, 3)  # sides, (mean, deviation), colours
    np.testing.assert_allclose(found[:, 0, 0], [1.0, 0.0, 0.5, 0.5])
    np.testing.assert_allclose(found[:, 1, 0], [0.0, 0.0, 0.5, 0.5])
    assert not found[:, :, 1:].any()


@pytest.mark.parametrize("labels", [[0] * 20, [0] * 18 + [1, 1], []])
def test_too_little_to_tell(labels: list[int]) -> None:
    pixels = photographs(np.zeros(len(labels), np.int64))
    found = background.probe(
        background.border(pixels), np.array(labels, np.int64), model_accuracy=0.9
    )
    assert found is None
