"""The graph for OpenVINO against Keras's own ResNet50 and layers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special

from leafnet.models import openvino
from leafnet.models.classifier import Head, initial_head
from leafnet.models.weights import FEATURES, load_weights

pytestmark = pytest.mark.skipif(
    not openvino.installed(), reason='needs pip install "leafnet[openvino]"'
)
SIZE = 64


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (7, SIZE, SIZE, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def expected(stock: Any, pixels: np.ndarray) -> np.ndarray:
    """Features by Keras's network on what Keras makes of RGB."""
    from keras.applications.resnet50 import preprocess_input

    return np.asarray(stock(preprocess_input(pixels.astype(np.float32))))


@pytest.fixture(scope="module")
def weights(weights_file: str) -> Any:
    return load_weights(weights_file).convolutions


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_the_graph_is_stock_keras(weights: Any, pixels: np.ndarray, expected: np.ndarray) -> None:
    """For any number of photographs, of which four are in a request."""
    graph = openvino.build(weights, image_size=SIZE)
    forward = openvino.compile_model(graph, precision="float32", threads=2)
    for count in (7, 4, 1, 0):
        found = forward(pixels[:count])
        assert found.shape == (count, FEATURES)
        assert found.dtype == np.float32
        if count:
            assert relative_error(found, expected[:count]) < 1e-5
    turned = forward(pixels[..., ::-1])
    assert relative_error(turned, expected) > 1e-3


def test_bfloat16_is_less_exact(weights: Any, pixels: np.ndarray, expected: np.ndarray) -> None:
    """Where the processor has it; the others compute in float32 whatever they are told."""
    graph = openvino.build(weights, image_size=SIZE)
    found = openvino.compile_model(graph, precision="bfloat16", threads=1)(pixels)
    assert relative_error(found, expected) < 0.05


def test_the_classifier_is_keras_with_a_head_and_softmax(
    weights: Any, pixels: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    head: Head = [
        (kernel, np.linspace(-0.5, 0.5, len(bias), dtype=np.float32))
        for kernel, bias in initial_head((8,), 3, inputs=FEATURES, seed=0)
    ]
    (first, hidden), (last, bias) = head
    between = expected @ first + hidden
    assert (between < 0).any()
    probabilities = scipy.special.softmax(np.maximum(between, 0) @ last + bias, axis=1)
    openvino.save(openvino.classifier(weights, head, image_size=SIZE), tmp_path / "a.xml")
    found = openvino.open_classifier(tmp_path / "a.xml")(pixels)
    np.testing.assert_allclose(found, probabilities, atol=1e-4)
    # Weights stay in float32.
    numbers = sum(kernel.size + bias.size for kernel, bias in [*weights.values(), *head])
    assert (tmp_path / "a.bin").stat().st_size >= 4 * numbers


def test_a_classifier_names_what_goes_in_and_comes_out(weights: Any) -> None:
    head = initial_head((), 3, inputs=FEATURES, seed=0)
    graph = openvino.classifier(weights, head, image_size=SIZE)
    assert graph.input(0).names == {"image"}
    assert graph.output(0).names == {"probabilities"}
    assert str(graph.input(0).partial_shape) == f"[?,{SIZE},{SIZE},3]"
    assert graph.input(0).element_type.to_dtype() == np.uint8
    assert str(graph.output(0).partial_shape) == "[?,3]"
