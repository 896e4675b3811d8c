from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest

from leafnet.models import classifier, resnet
from leafnet.models.classifier import Head, fold_standardisation, head_logits, initial_head


def made_head(widths: tuple[int, ...], seed: int = 0) -> Head:
    """Kernels and biases of either sign, none of them 0."""
    generator = np.random.default_rng(seed)
    layers = []
    for i in range(len(widths) - 1):
        kernel, bias = (
            generator.normal(size=widths[i : i + 2]),
            generator.normal(size=widths[i + 1]),
        )
        layers.append((kernel.astype(np.float32), bias.astype(np.float32)))
    return layers


def test_kernels_begin_within_the_limit_of_glorot_and_biases_at_zero() -> None:
    """Glorot and Bengio (2010), equation 16: uniform within sqrt(6 / (inputs + outputs))."""
    head = initial_head((150, 50), 40, inputs=100, seed=0)
    assert [kernel.shape for kernel, _ in head] == [(100, 150), (150, 50), (50, 40)]
    for kernel, bias in head:
        limit = np.sqrt(6 / sum(kernel.shape))
        assert kstest(kernel.ravel(), "uniform", args=(-limit, 2 * limit)).pvalue > 0.001
        assert np.abs(kernel).max() == pytest.approx(limit, rel=0.01)
        np.testing.assert_array_equal(bias, np.zeros(kernel.shape[1]))
        assert kernel.dtype == bias.dtype == np.float32


def test_kernels_follow_the_seed_and_differ_from_layer_to_layer() -> None:
    first, again, other = (initial_head((6, 6), 6, inputs=6, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first[0][0], again[0][0])
    assert (first[0][0] != other[0][0]).all()
    assert (first[0][0] != first[1][0]).all()


def test_logits_of_a_head_by_hand() -> None:
    hidden = (np.array([[1, -1], [2, 1]], np.float32), np.array([1, -3], np.float32))
    last = (np.array([[1, 0, 2], [5, 1, 0]], np.float32), np.array([0.5, -1, 0], np.float32))
    features = np.array([[1, 2], [-4, 1]], np.float16)
    # Hidden: relu(1 + 4 + 1, -1 + 2 - 3) = (6, 0), and relu(-4 + 2 + 1, 4 + 1 - 3) = (0, 2).
    found = head_logits([hidden, last], features)
    np.testing.assert_array_equal(found, [[6.5, -1, 12], [10.5, 1, 0]])
    assert found.dtype == np.float32
    # The last layer is linear: what is below 0 stays.
    np.testing.assert_array_equal(head_logits([hidden], features), [[6, -2], [-1, 2]])


@pytest.mark.parametrize("widths", [(5, 3), (5, 4, 3), (5, 6, 4, 3)])
def test_a_folded_head_does_on_raw_features_what_it_does_on_standardised(
    widths: tuple[int, ...],
) -> None:
    generator = np.random.default_rng(1)
    head = made_head(widths)
    features = generator.normal(3, 2, (7, 5)).astype(np.float32)
    mean = np.array([3, -2, 0.5, 7, 1], np.float32)
    deviation = np.array([0.1, 2, 5, 0.5, 3], np.float32)
    folded = fold_standardisation(head, mean=mean, deviation=deviation)
    expected = head_logits(head, (features - mean) / deviation)
    np.testing.assert_allclose(head_logits(folded, features), expected, rtol=1e-4, atol=1e-4)
    assert len(folded) == len(head)
    assert all(array.dtype == np.float32 for layer in folded for array in layer)


def flat_backbone(size: int, precision: str) -> Any:
    """In the place of ResNet50: the mean of each colour, less one."""
    import keras

    images = keras.Input((size, size, 3))
    assert precision == "bfloat16"
    return keras.Model(images, keras.ops.mean(images, axis=(1, 2)) - 1.0)


@pytest.mark.parametrize("widths", [(3, 4), (3, 5, 4), (3, 6, 5, 4)])
def test_the_classifier_is_the_backbone_and_then_the_head(
    widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against numpy, with the means of the colours as features."""
    given: list[Any] = []

    def build(weights: Any, *, image_size: int, precision: str) -> Any:
        given.append(weights)
        return flat_backbone(image_size, precision)

    monkeypatch.setattr(resnet, "build", build)
    head = made_head(widths)
    # At the scale of pixels a hidden unit is not always on or always off.
    head[0] = (head[0][0] / np.float32(50), head[0][1])
    weights = {"a": (np.zeros(1, np.float32), np.zeros(1, np.float32))}
    model = classifier.build(weights, head, image_size=4, precision="bfloat16")
    images = np.random.default_rng(2).integers(0, 256, (6, 4, 4, 3)).astype(np.uint8)
    expected = images.mean(axis=(1, 2), dtype=np.float64) - 1
    for i, (kernel, bias) in enumerate(head):
        expected = expected @ kernel + bias
        if i < len(head) - 1:
            expected = np.clip(expected, 0, None)
    found = np.asarray(model(images))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert found.dtype == np.float32
    assert given == [weights]


def test_the_classifier_takes_bytes_and_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        resnet,
        "build",
        lambda weights, *, image_size, precision: flat_backbone(image_size, precision),
    )
    head = made_head((3, 5, 6, 4))
    model = classifier.build({}, head, image_size=8, precision="bfloat16")
    (images,) = model.inputs
    assert (images.name, images.dtype, images.shape) == ("image", "uint8", (None, 8, 8, 3))
    assert model.output_shape == (None, 4)
    assert model.name == "classifier"
    assert [layer.name for layer in model.layers[-3:]] == ["hidden_0", "hidden_1", "logits"]
    assert model.trainable_variables == []
    assert {str(variable.dtype) for variable in model.variables} == {"float32"}
