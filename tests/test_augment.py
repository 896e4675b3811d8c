from typing import Any

import numpy as np
import pytest

from leafnet import augment
from leafnet.augment import Augmentation

SIZE = 32
# What changes nothing: no flips, no turn, the whole photograph, no other colours.
NEUTRAL = np.array([0.9, 0.9, 0.5, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], np.float32)
FLIP_X, FLIP_Y, TURN, AREA, _, RIGHT, _, BRIGHTNESS, SATURATION = range(9)


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.uint8)


def views(photographs: np.ndarray, changes: dict[int, float], **how: Any) -> np.ndarray:
    draws = np.tile(NEUTRAL, (len(photographs), 1))
    for place, value in changes.items():
        draws[:, place] = value
    extents = {"size": SIZE, "crop": 0.25, "brightness": 0.2, "colour": 0.2, **how}
    made = augment.augment(photographs, draws, Augmentation(**extents))
    return np.asarray(made)


def test_neutral_draws_give_the_photograph(photographs: np.ndarray) -> None:
    np.testing.assert_allclose(views(photographs, {}), photographs, atol=1e-2)


def test_flips(photographs: np.ndarray) -> None:
    np.testing.assert_allclose(views(photographs, {FLIP_X: 0.1}), photographs[:, :, ::-1], atol=0.1)
    np.testing.assert_allclose(views(photographs, {FLIP_Y: 0.1}), photographs[:, ::-1], atol=0.1)


def test_the_largest_turn_is_a_fifth(photographs: np.ndarray) -> None:
    """Checked against OpenCV, of which the frozen features' views are made."""
    import cv2

    matrix = cv2.getRotationMatrix2D(((SIZE - 1) / 2, (SIZE - 1) / 2), -72.0, 1.0)
    expected = cv2.warpAffine(
        photographs[0], matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    found = views(photographs[:1], {TURN: 0.0})[0]
    # OpenCV rounds places to 1/32 of a pixel, and neighbours here are noise.
    middle = slice(8, 24)
    assert np.abs(found - expected)[middle, middle].mean() < 8
    assert np.abs(found - photographs[0])[middle, middle].mean() > 40


def test_a_crop_of_a_quarter_is_the_middle_and_moves(photographs: np.ndarray) -> None:
    quarter = {AREA: 0.0}
    found = views(photographs, quarter, size=SIZE // 2)
    np.testing.assert_allclose(found, photographs[:, 8:24, 8:24], atol=0.1)
    found = views(photographs, quarter | {RIGHT: 1.0}, size=SIZE // 2)
    np.testing.assert_allclose(found, photographs[:, 8:24, 16:], atol=0.1)


def test_colours(photographs: np.ndarray) -> None:
    darker = views(photographs, {BRIGHTNESS: 0.0})
    np.testing.assert_allclose(darker, 0.8 * photographs.astype(np.float32), atol=0.1)
    grey = np.repeat(photographs[..., :1], 3, axis=-1)
    np.testing.assert_allclose(views(grey, {SATURATION: 0.0}), grey, atol=0.1)
    paler = views(photographs, {SATURATION: 0.0}, colour=0.9)
    assert paler.std(axis=-1).mean() < 0.2 * photographs.std(axis=-1).mean()


def test_draws_depend_on_seed_epoch_and_example_alone() -> None:
    everyone = augment.draw(np.arange(10), seed=1, epoch=2)
    np.testing.assert_array_equal(augment.draw(np.array([7, 3]), seed=1, epoch=2), everyone[[7, 3]])
    assert np.unique(everyone).size == everyone.size
    assert (augment.draw(np.arange(10), seed=1, epoch=3) != everyone).all()
    pairs = augment.draw_mixing(np.arange(40), seed=1, epoch=2, mixup=0.4, cutmix=1.0)
    np.testing.assert_array_equal(
        augment.draw_mixing(np.array([9]), seed=1, epoch=2, mixup=0.4, cutmix=1.0), pairs[9:10]
    )
    cut = pairs[:, 3] > pairs[:, 1]
    assert 8 < cut.sum() < 32
    assert (pairs[cut, 0] == 1).all()


def test_mixing_blends_pairs_and_their_targets() -> None:
    import tensorflow as tf

    pictures = np.stack([np.full((SIZE, SIZE, 3), value, np.float32) for value in (0, 100, 0, 100)])
    targets = tf.one_hot([0, 1, 0, 2], 3)
    mixing = np.array([[0.75, 0, 0, 0, 0], [1, 0, 0.5, 1, 1]], np.float32)
    mixed, blended = map(np.asarray, augment.mix(tf.constant(pictures), targets, mixing))
    np.testing.assert_allclose(mixed[:2].mean(axis=(1, 2, 3)), [25, 75])
    np.testing.assert_allclose(blended[:2], [[0.75, 0.25, 0], [0.25, 0.75, 0]])
    assert mixed[2, :, : SIZE // 2].max() == 0
    assert mixed[2, :, SIZE // 2 :].min() == 100
    np.testing.assert_allclose(blended[2:], [[0.5, 0, 0.5], [0.5, 0, 0.5]])
