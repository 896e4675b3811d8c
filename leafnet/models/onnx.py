"""Backbone, head and softmax as an ONNX graph; the only module that imports onnx.

The graph is built from the folded weights, operator by operator: in a second, with names that mean
something, and without TensorFlow. Keras's own way goes through tf2onnx, which took 20 s for the
same network and needs a patched numpy.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafnet.models import resnet
from leafnet.models.classifier import Head
from leafnet.models.weights import MEAN_BGR, Convolutions

# Of ONNX 1.13, 2022: what runtimes on phones know, and reduce_mean with its axes as an attribute.
_OPSET = 17
_IR_VERSION = 8


def installed() -> bool:
    """True where a graph can be written and run."""
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime"))


def build(
    convolutions: Convolutions,
    head: Head,
    *,
    image_size: int,
    metadata: Mapping[str, str],
) -> bytes:
    """Build the file: `image` RGB [N, S, S, 3] uint8 -> `probabilities` [N, C] float32, for any N.

    Args:
        convolutions: folded weights.
        head: on raw features.
        image_size: S, pixels.
        metadata: kept in the file, for who opens it.
    """
    from onnx import TensorProto, helper, numpy_helper

    weights = resnet.for_rgb(convolutions)
    nodes, constants = [], []

    def constant(name: str, values: NDArray[np.floating]) -> str:
        array = np.ascontiguousarray(values, np.float32)
        constants.append(numpy_helper.from_array(array, name))
        return name

    def apply(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def convolve(x: str, name: str, stride: int, pad: int) -> str:
        kernel, bias = weights[name]
        inputs = [
            x,
            constant(f"{name}/kernel", kernel.transpose(3, 2, 0, 1)),
            constant(f"{name}/bias", bias),
        ]
        return apply("Conv", inputs, name, strides=[stride] * 2, pads=[pad] * 4)

    def relu(x: str) -> str:
        return apply("Relu", [x], f"{x}/relu")

    def max_pool(x: str) -> str:
        # Padding is left out of the maximum, and Keras's zeros never win after a relu.
        return apply("MaxPool", [x], "pool1", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)

    def add(shortcut: str, y: str) -> str:
        return apply("Add", [shortcut, y], y.replace("_3_conv", "_add"))

    x = apply("Cast", ["image"], "float", to=TensorProto.FLOAT)
    x = apply("Sub", [x, constant("mean_rgb", np.array(MEAN_BGR[::-1]))], "centred")
    x = apply("Transpose", [x], "channels_first", perm=[0, 3, 1, 2])
    x = resnet.apply_stages(resnet.Operators(convolve, relu, max_pool, add), x)
    x = apply("ReduceMean", [x], "features", axes=[2, 3], keepdims=0)
    for i, (kernel, bias) in enumerate(head):
        name = "logits" if i == len(head) - 1 else f"hidden_{i}"
        inputs = [x, constant(f"{name}/kernel", kernel), constant(f"{name}/bias", bias)]
        x = apply("Gemm", inputs, name)
        x = x if name == "logits" else relu(x)
    apply("Softmax", [x], "probabilities", axis=1)

    shape: list[str | int | None] = ["N", image_size, image_size, 3]
    classes = head[-1][1].shape[0]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, shape)
    out = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", classes])
    return _file(helper.make_graph(nodes, "leafnet", [image], [out], constants), metadata)


def _file(graph: Any, metadata: Mapping[str, str]) -> bytes:
    """Make the file of a graph, and check it."""
    import onnx
    from onnx import helper

    model = helper.make_model(
        graph,
        producer_name="leafnet",
        ir_version=_IR_VERSION,
        opset_imports=[helper.make_opsetid("", _OPSET)],
    )
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
