import functools

import numpy as np
import pytest

from leafnet.models import bundle, engine, tta
from leafnet.models.classifier import head_logits, initial_head
from leafnet.models.engine import Engine


def test_views_are_the_eight_symmetries_of_a_square() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), np.uint8)
    found = {tta.view(pixels, number).tobytes() for number in range(8)}
    turns = [np.rot90(pixels, turn, axes=(1, 2)) for turn in range(4)]
    expected = {view.tobytes() for turn in turns for view in (turn, turn[:, :, ::-1])}
    assert found == expected
    assert len(found) == 8
    flips = {tta.view(pixels, number).tobytes() for number in range(4)}
    assert flips == {pixels[:, ::y, ::x].tobytes() for x in (1, -1) for y in (1, -1)}


def test_each_view_is_the_symmetry_of_its_number() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), np.uint8)
    transposed = pixels.transpose(0, 2, 1, 3)
    for first, square in [(0, pixels), (4, transposed)]:
        np.testing.assert_array_equal(tta.view(pixels, first), square)
        np.testing.assert_array_equal(tta.view(pixels, first + 1), square[:, :, ::-1])
        np.testing.assert_array_equal(tta.view(pixels, first + 2), square[:, ::-1])
        np.testing.assert_array_equal(tta.view(pixels, first + 3), square[:, ::-1, ::-1])


def some_features(pixels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> tta.Array:
    """Features of which each looks at one place."""
    return np.asarray(pixels[:, 0, :, 0] / 255, np.float32)


@pytest.mark.parametrize(("views", "turn"), [(4, 2), (8, 1), (8, 2), (8, 3)])
def test_the_mean_does_not_see_how_the_camera_was_held(views: int, turn: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), np.uint8)
    head = initial_head((8,), 3, inputs=6, seed=0)
    run = functools.partial(tta.run, some_features, head, views=views)
    turned = np.rot90(pixels, turn, axes=(1, 2))
    straight, other = run(pixels), run(turned)
    np.testing.assert_allclose(other.logits, straight.logits, atol=1e-6)
    assert np.abs(other.plain - straight.plain).max() > 0.01


@pytest.mark.parametrize("views", [4, 8])
def test_logits_are_the_mean_over_flips_and_quarter_turns(views: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), np.uint8)
    head = initial_head((8,), 3, inputs=6, seed=0)
    seen = [np.flip(pixels, axis) for axis in ((), 1, 2, (1, 2))]
    if views == 8:
        seen = [np.rot90(pixels, turn, (1, 2)) for turn in range(4)]
        seen += [np.rot90(pixels[:, :, ::-1], turn, (1, 2)) for turn in range(4)]
    each = [head_logits(head, some_features(view)) for view in seen]
    found = tta.run(some_features, head, pixels, views=views)
    np.testing.assert_allclose(found.logits, np.mean(each, axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.features, some_features(pixels))
    np.testing.assert_array_equal(found.plain, each[0])
    assert {array.dtype.name for array in found} == {"float32"}


def test_one_view_is_no_augmentation() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), np.uint8)
    head = initial_head((), 2, inputs=6, seed=0)
    found = tta.run(some_features, head, pixels, views=1)
    expected = head_logits(head, some_features(pixels))
    np.testing.assert_array_equal(found.logits, expected)
    np.testing.assert_array_equal(found.plain, expected)


def test_both_engines_and_any_number_of_photographs(random_model: str) -> None:
    model = bundle.load(random_model)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)

    def opened(name: str) -> Engine:
        return engine.open_engine(
            model, engine=name, precision="float32", threads=2, gpu=False, batch_size=4
        )

    outputs = [
        tta.run(opened(name).features, model.head, pixels, views=8)
        for name in ("tensorflow", "openvino")
    ]
    np.testing.assert_allclose(outputs[0].logits, outputs[1].logits, rtol=1e-3, atol=1e-4)
    none = tta.run(opened("openvino").features, model.head, pixels[:0], views=8)
    assert none.logits.shape == (0, 3)
