import numpy as np
import pytest

from leafnet.models import cam
from leafnet.models import weights as models_weights
from leafnet.models.classifier import Head, head_logits, initial_head
from leafnet.models.weights import FEATURES, Array


@pytest.mark.parametrize("units", [(), (16,), (16, 8)])
def test_a_map_adds_up_to_its_logit(units: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    head: Head = [
        (kernel, generator.normal(size=bias.shape).astype(np.float32))
        for kernel, bias in initial_head(units, 4, inputs=10, seed=0)
    ]
    maps = generator.random((3, 2, 5, 10)).astype(np.float32)
    logits = head_logits(head, maps.mean(axis=(1, 2)))
    for classes in (np.array([0, 1, 2]), np.array([3, 3, 0])):
        found = cam.class_maps(head, maps, classes)
        assert found.shape == (3, 2, 5)
        expected = logits[np.arange(3), classes] - logits.mean(axis=1)
        np.testing.assert_allclose(found.mean(axis=(1, 2)), expected, rtol=1e-4, atol=1e-5)


def test_a_place_adds_its_features_times_their_gradient() -> None:
    """The gradient by differences of the logits, in double precision."""
    generator = np.random.default_rng(2)
    head: Head = [
        (kernel.astype(np.float64), generator.normal(0, 0.3, bias.shape))  # type: ignore[misc]
        for kernel, bias in initial_head((16, 8), 4, inputs=10, seed=0)
    ]
    maps = generator.random((3, 2, 5, 10)).astype(np.float32)
    classes = np.array([2, 0, 3])

    def over_the_mean(features: np.ndarray) -> np.ndarray:
        x = features
        for kernel, bias in head[:-1]:
            x = np.maximum(x @ kernel + bias, 0)
        logits = x @ head[-1][0] + head[-1][1]
        return np.asarray(logits[np.arange(3), classes] - logits.mean(axis=1))

    features = maps.mean(axis=(1, 2), dtype=np.float64)
    gradient = np.stack(
        [
            (over_the_mean(features + step) - over_the_mean(features - step)) / 2e-6
            for step in 1e-6 * np.eye(10)
        ],
        axis=1,
    )
    found = cam.class_maps(head, maps, classes)
    for photograph in range(3):
        adds = maps[photograph] @ gradient[photograph]
        offset = over_the_mean(features)[photograph] - adds.mean()
        np.testing.assert_allclose(found[photograph], adds + offset, rtol=1e-4, atol=1e-5)


def test_taking_a_place_away_costs_what_the_map_says() -> None:
    """In a linear head, to the letter: without its features a place adds the offset alone."""
    generator = np.random.default_rng(0)
    head = initial_head((), 3, inputs=6, seed=0)
    maps = generator.random((1, 4, 4, 6)).astype(np.float32)
    found = cam.class_maps(head, maps, np.array([1]))[0]
    without = maps.copy()
    without[0, 2, 3] = 0
    fell = [
        head_logits(head, of.mean(axis=(1, 2)))[0] @ np.array([-1 / 3, 2 / 3, -1 / 3])
        for of in (maps, without)
    ]
    empty = cam.class_maps(head, without, np.array([1]))[0, 2, 3]
    assert (found[2, 3] - empty) / 16 == pytest.approx(fell[0] - fell[1], rel=1e-4)


def green_detector() -> dict[str, tuple[Array, Array]]:
    """Weights with which the last feature map's first channel is how much green is there."""
    weights = {}
    for name, _, shape in models_weights.convolutions():
        kernel = np.zeros(shape, np.float32)
        if name == "conv1_conv":
            kernel[3, 3, :, 0] = [-1, 1, -1]  # blue, green, red, at the middle of 7 x 7
        elif name.endswith("_0_conv"):
            kernel[0, 0, 0, 0] = 1  # the shortcut hands it on; all else adds nothing
        weights[name] = (kernel, np.zeros(shape[3], np.float32))
    return weights


def test_the_patch_that_decides_is_highlighted() -> None:
    """Class 1 is green. Two photographs, the green patch in another corner of each."""
    kernel = np.zeros((FEATURES, 2), np.float32)
    kernel[0] = [-0.02, 0.02]
    head: Head = [(kernel, np.array([0.5, -0.5], np.float32))]
    pixels = np.full((2, 128, 128, 3), 90, np.uint8)
    # Each place looks at two pixels around every 32nd.
    pixels[0, 28:60, 92:124] = [20, 250, 20]
    pixels[1, 92:124, :28] = [20, 250, 20]
    explain = cam.explainer(green_detector(), head, image_size=128, precision="float32")
    found = explain(pixels, np.array([1, 1]))
    assert found.shape == (2, 4, 4)
    for class_map, place in zip(found, [(1, 3), (3, 0)], strict=True):
        assert np.unravel_index(class_map.argmax(), class_map.shape) == place
        assert class_map[place] > 0
        rest = np.delete(class_map.reshape(-1), class_map.argmax())
        assert (rest <= 0).all()
    against = explain(pixels, np.array([0, 0]))
    np.testing.assert_allclose(against, -found, atol=1e-4)


def test_overlay_colours_the_place_and_leaves_the_rest() -> None:
    pixels = np.full((40, 60, 3), 100, np.uint8)
    class_map = np.full((4, 6), -1.0, np.float32)
    class_map[0, 5] = 7.0
    shown = cam.overlay(pixels, class_map).astype(int)
    assert shown.shape == (40, 60, 3)
    red, green, _ = shown[2, 57]
    assert red - green > 100
    np.testing.assert_array_equal(shown[30:, :30], 100)
    np.testing.assert_array_equal(cam.overlay(pixels, -np.abs(class_map)), pixels)


@pytest.mark.parametrize("largest", [0.125, 8.0])
def test_overlay_goes_from_yellow_to_red_with_the_share_of_the_largest(largest: float) -> None:
    """Numbers by hand: all is 0.65 of (215, 0, 40), half is 0.325 of (235, 115, 20)."""
    pixels = np.full((1, 4, 3), 102, np.uint8)
    shares = np.array([[1.0, 0.5, 0.0, -3.0]], np.float32)
    shown = cam.overlay(pixels, shares * largest)
    np.testing.assert_array_equal(
        shown[0], [[175, 35, 61], [145, 106, 75], [102, 102, 102], [102, 102, 102]]
    )


def test_overlay_is_smooth_between_places() -> None:
    class_map = np.array([[1.0, 0.25, 0.5]], np.float32)
    shown = cam.overlay(np.full((8, 24, 3), 200, np.uint8), class_map)
    steps = np.diff(shown[4, :, 1].astype(int))
    assert (steps[4:12] > 0).all()
    assert np.abs(steps).max() < 40
