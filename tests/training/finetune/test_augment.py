from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.ndimage import map_coordinates

from leafnet.training.finetune import augment
from leafnet.training.finetune.augment import Augmentation
from leafnet.training.head.fit import epoch_views
from leafnet.training.loop import epoch_order

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


def expected_view(photograph: np.ndarray, draws: np.ndarray, *, size: int, crop: float) -> Any:
    """The view by its definition, sampled by SciPy, without changes of colour.

    A rectangle whose area is a share drawn evenly from `crop` to 1 and whose aspect is between 3/4
    and 4/3, evenly in its logarithm, lies anywhere in the photograph; about its middle it is
    flipped and turned by up to a fifth of a turn.
    """
    side = photograph.shape[0]
    flips, (turn, area, aspect, right, down) = draws[:2], draws[2:7]
    share = crop + (1 - crop) * area
    ratio = (3 / 4) * (16 / 9) ** aspect
    wide, high = side * min(np.sqrt(share * ratio), 1), side * min(np.sqrt(share / ratio), 1)
    middle = ((side - wide) * right + wide / 2, (side - high) * down + high / 2)
    places = (np.arange(size) + 0.5) / size - 0.5
    x = np.where(flips[0] < 0.5, -1, 1) * places[None, :] * wide
    y = np.where(flips[1] < 0.5, -1, 1) * places[:, None] * high
    angle = np.radians((2 * turn - 1) * 72)
    rows = middle[1] + np.sin(angle) * x + np.cos(angle) * y - 0.5
    columns = middle[0] + np.cos(angle) * x - np.sin(angle) * y - 0.5
    channels = [
        map_coordinates(channel, [rows, columns], order=1, mode="reflect")
        for channel in np.moveaxis(photograph.astype(np.float64), -1, 0)
    ]
    return np.stack(channels, axis=-1)


@pytest.mark.parametrize(("size", "crop"), [(SIZE, 0.3), (20, 0.08), (40, 0.9)])
def test_a_view_is_the_turned_and_flipped_rectangle_that_was_drawn(
    size: int, crop: float, photographs: np.ndarray
) -> None:
    """Outside of the photograph is its mirror image."""
    draws = np.random.default_rng(4).random((12, augment.DRAWS)).astype(np.float32)
    draws[0, 3:5] = 0.99  # a rectangle wider than the photograph, which is cut
    draws[1, :2] = 0.5  # not flipped
    many = np.concatenate([photographs] * 4)
    found = np.asarray(augment.augment(many, draws, Augmentation(size, crop, 0, 0)))
    for view, photograph, drawn in zip(found, many, draws.astype(np.float64), strict=True):
        expected = expected_view(photograph, drawn, size=size, crop=crop)
        np.testing.assert_allclose(view, expected, atol=0.05)


@pytest.mark.parametrize(("brightness", "colour"), [(0.3, 0.5), (0.4, 0.0), (0.0, 0.6)])
def test_colours_are_blended_with_grey_and_each_channel_is_scaled(
    brightness: float, colour: float, photographs: np.ndarray
) -> None:
    """Grey is ITU-R BT.601's luma; a tint is half as strong as saturation."""
    draws = np.tile(NEUTRAL, (3, 1))
    draws[:, BRIGHTNESS:] = np.random.default_rng(6).random((3, 5))
    how = Augmentation(SIZE, 1.0, brightness, colour)
    found = np.asarray(augment.augment(photographs, draws, how))
    brighter, saturation, *tints = (2 * draws[:, BRIGHTNESS:].T - 1)[..., None, None]
    luma = photographs @ np.array([0.299, 0.587, 0.114])
    for channel, tint in enumerate(tints):
        plain = luma + (1 + colour * saturation) * (photographs[..., channel] - luma)
        expected = plain * (1 + brightness * brighter) * (1 + colour / 2 * tint)
        np.testing.assert_allclose(found[..., channel], np.clip(expected, 0, 255), atol=0.05)
    assert found.max() == 255, "nothing was clipped"


def test_draws_are_uniform_and_each_number_another() -> None:
    found = augment.draw(np.arange(600), seed=1, epoch=2)
    assert found.dtype == np.float32
    assert found.shape == (600, 12)
    assert found.min() >= 0
    assert found.max() < 1
    np.testing.assert_allclose(found.mean(axis=0), 0.5, atol=0.06)
    correlations = np.corrcoef(found, rowvar=False) - np.eye(12)
    assert np.abs(correlations).max() < 0.2
    assert (augment.draw(np.arange(600), seed=2, epoch=2) != found).all()


def mixing(count: int = 1500, **alphas: float) -> np.ndarray:
    both = {"mixup": 0.0, "cutmix": 0.0, **alphas}
    return augment.draw_mixing(np.arange(count), seed=3, epoch=1, **both)


def test_nothing_is_mixed_where_both_are_off() -> None:
    np.testing.assert_array_equal(mixing(4), [[1, 0, 0, 0, 0]] * 4)


@pytest.mark.parametrize("alpha", [0.2, 3.0])
def test_mixup_keeps_a_share_of_the_beta_distribution(alpha: float) -> None:
    found = mixing(mixup=alpha)
    assert stats.kstest(found[:, 0], stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert not found[:, 1:].any()


def test_cutmix_puts_a_box_of_half_the_picture_anywhere() -> None:
    """At a large alpha the Beta distribution is 1/2; boxes are cut at the picture's edges."""
    found = mixing(cutmix=1e9)
    side = np.sqrt(0.5)
    assert (found[:, 0] == 1).all()
    for start, stop in ((found[:, 1], found[:, 3]), (found[:, 2], found[:, 4])):
        assert start.min() == 0
        assert stop.max() == 1
        # Those cut at neither edge are whole; the middle of the others tells the edge.
        np.testing.assert_allclose(
            np.where(start > 0, start + side / 2, stop - side / 2),
            np.where(stop < 1, stop - side / 2, start + side / 2),
            atol=1e-4,
        )
        middle = np.where(start > 0, start + side / 2, stop - side / 2)
        assert stats.kstest(middle, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(found[:, 1], found[:, 2])[0, 1]) < 0.1


def test_cutmix_leaves_a_share_of_the_beta_distribution_outside_of_the_box() -> None:
    """Seen in boxes that are not cut, of which small ones are more."""
    found = mixing(cutmix=0.3)
    heights, widths = found[:, 3] - found[:, 1], found[:, 4] - found[:, 2]
    inside = (found[:, 1:3].min(axis=1) > 0) & (found[:, 3:].max(axis=1) < 1)
    np.testing.assert_allclose(heights[inside], widths[inside], atol=1e-6)
    # A box of side s fits with a chance of (1 - s)^2.
    cut_out = np.random.default_rng(0).beta(0.3, 0.3, 200_000)
    fits = np.random.default_rng(1).random(200_000) < (1 - np.sqrt(cut_out)) ** 2
    assert stats.ks_2samp(heights[inside] ** 2, cut_out[fits]).pvalue > 0.01
    assert inside.mean() == pytest.approx(fits.mean(), abs=0.04)


def test_mixup_and_cutmix_take_half_of_the_pairs_each_with_its_own_alpha() -> None:
    found = mixing(mixup=1e9, cutmix=0.1)
    cut = found[:, 0] == 1
    assert cut.mean() == pytest.approx(0.5, abs=0.04)
    np.testing.assert_allclose(found[~cut, 0], 0.5, atol=1e-3)
    assert not found[~cut, 1:].any()
    areas = (found[cut, 3] - found[cut, 1]) * (found[cut, 4] - found[cut, 2])
    assert areas.std() > 0.2
    found = mixing(mixup=0.1, cutmix=1e9)
    assert found[found[:, 0] < 1, 0].std() > 0.3


def test_order_draws_and_mixing_are_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what an example looks like would go with who its partner is."""
    seeds: list[tuple[int, ...]] = []
    make = np.random.default_rng

    def noted(seed: list[int]) -> np.random.Generator:
        seeds.append(tuple(seed))
        return make(seed)

    monkeypatch.setattr(np.random, "default_rng", noted)
    epoch_order(9, seed=1, epoch=2)
    epoch_views(9, 4, seed=1, epoch=2)
    augment.draw(np.arange(3), seed=1, epoch=2)
    augment.draw_mixing(np.arange(3), seed=1, epoch=2, mixup=1.0, cutmix=1.0)
    assert len({seed[2] for seed in seeds}) == 4
    assert len(set(seeds)) == len(seeds) == 8
    assert {seed[:2] for seed in seeds} == {(1, 2)}


def test_the_border_of_the_box_is_between_the_middles_of_pixels() -> None:
    """Middles at 1/8, 3/8, 5/8 and 7/8: that of the first border is inside, of the other not."""
    import tensorflow as tf

    pictures = np.arange(2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    drawn = np.array([[0.75, 0.375, 0.1, 0.625, 0.7]], np.float32)
    mixed, blended = map(
        np.asarray,
        augment.mix(tf.constant(pictures), tf.constant([[1.0, 0.0], [0.2, 0.8]]), drawn),
    )
    kept = np.full((4, 4, 1), 0.75)
    kept[1, :3] = 0  # row 1, columns 0 to 2
    first, second = pictures
    np.testing.assert_allclose(mixed[0], first * kept + second * (1 - kept), rtol=1e-5)
    np.testing.assert_allclose(mixed[1], second * kept + first * (1 - kept), rtol=1e-5)
    share = 13 / 16 * 0.75
    np.testing.assert_allclose(
        blended,
        [[share + 0.2 * (1 - share), 0.8 * (1 - share)], [0.2 * share + 1 - share, 0.8 * share]],
        rtol=1e-5,
    )
