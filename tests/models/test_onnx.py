"""The ONNX file against Keras's own ResNet50, run by ONNX Runtime."""

from typing import Any

import numpy as np
import pytest
import scipy.special

from leafnet.models.classifier import Head, initial_head
from leafnet.models.onnx import build, installed
from leafnet.models.weights import FEATURES, load_weights

pytestmark = pytest.mark.skipif(not installed(), reason='needs pip install "leafnet[onnx]"')
SIZE = 64


@pytest.fixture(scope="module")
def head() -> Head:
    return [
        (kernel, np.linspace(-0.5, 0.5, len(bias), dtype=np.float32))
        for kernel, bias in initial_head((8,), 3, inputs=FEATURES, seed=0)
    ]


@pytest.fixture(scope="module")
def file(weights_file: str, head: Head) -> bytes:
    weights = load_weights(weights_file).convolutions
    return build(weights, head, image_size=SIZE, metadata={"model_id": "abc", "classes": "früh"})


def test_the_file_is_keras_with_a_head_and_softmax(stock: Any, file: bytes, head: Head) -> None:
    import onnxruntime
    from keras.applications.resnet50 import preprocess_input

    pixels = np.random.default_rng(5).integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.uint8)
    features = np.asarray(stock(preprocess_input(pixels.astype(np.float32))))
    (first, hidden), (last, bias) = head
    between = features @ first + hidden
    assert (between < 0).any()
    expected = scipy.special.softmax(np.maximum(between, 0) @ last + bias, axis=1)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(["probabilities"], {"image": pixels})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)
    (one,) = session.run(None, {"image": pixels[1:2]})
    np.testing.assert_allclose(one, expected[1:2], atol=1e-4)
    assert session.get_modelmeta().custom_metadata_map == {"model_id": "abc", "classes": "früh"}


def test_the_file_says_what_goes_in_and_comes_out(file: bytes) -> None:
    """In versions of the format that runtimes on phones know."""
    import onnx

    model = onnx.load_from_string(file)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 17)]
    assert (model.ir_version, model.producer_name) == (8, "leafnet")
    for told, name, kind, shape in [
        (model.graph.input, "image", onnx.TensorProto.UINT8, ["N", SIZE, SIZE, 3]),
        (model.graph.output, "probabilities", onnx.TensorProto.FLOAT, ["N", 3]),
    ]:
        (value,) = told
        tensor = value.type.tensor_type
        assert (value.name, tensor.elem_type) == (name, kind)
        assert [side.dim_param or side.dim_value for side in tensor.shape.dim] == shape
