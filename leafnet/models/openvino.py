"""The folded backbone for OpenVINO, in floating point or int8; the only module that imports it.

The graph is built from the folded weights, operator by operator, so that a process that runs it
needs no TensorFlow. On a busy machine import, graph and compilation took 4.5 s together;
TensorFlow's network alone took 9 s.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leafnet.data.images import Pixels
from leafnet.models import resnet
from leafnet.models.classifier import Head
from leafnet.models.weights import FEATURES, MEAN_BGR, Array, Convolutions

if TYPE_CHECKING:
    import openvino


# Photographs in one request. Requests run side by side, each on a thread of its own, which spares
# the threads from waiting for each other in every layer.
_REQUEST = 4
# NNCF's own default.
CALIBRATION_EXAMPLES = 300


class Int8(NamedTuple):
    """A quantized backbone: OpenVINO's intermediate representation, data and no code."""

    xml: bytes
    weights: bytes


def installed(*, quantizer: bool = False) -> bool:
    """True where OpenVINO, and NNCF for `quantizer`, can be imported."""
    names = ("openvino", "nncf") if quantizer else ("openvino",)
    return all(importlib.util.find_spec(name) is not None for name in names)


def _quiet_import() -> None:
    """Keep OpenVINO and NNCF from reporting their use.

    Both send it to Google Analytics, OpenVINO at every import, without asking and unless the user
    opted out, if they find the package openvino_telemetry. Without it they work the same.
    """
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def build(convolutions: Convolutions, *, image_size: int) -> "openvino.Model":
    """Build the backbone as an OpenVINO graph: RGB [B, S, S, 3] uint8 -> [B, 2048] float32, any B.

    Args:
        convolutions: folded weights.
        image_size: S, pixels.
    """
    _quiet_import()
    import openvino
    from openvino import opset13 as ops

    weights = resnet.for_rgb(convolutions)

    def constant(values: NDArray[np.floating]) -> "openvino.Node":
        return ops.constant(np.ascontiguousarray(values, np.float32))

    def convolve(x: "openvino.Node", name: str, stride: int, pad: int) -> "openvino.Node":
        kernel, bias = weights[name]
        kernel = constant(kernel.transpose(3, 2, 0, 1))
        x = ops.convolution(x, kernel, [stride] * 2, [pad] * 2, [pad] * 2, [1, 1])
        return ops.add(x, constant(bias.reshape(1, -1, 1, 1)))

    def max_pool(x: "openvino.Node") -> "openvino.Output":
        # Keras pads with zeros; after a relu the padding never wins.
        return ops.max_pool(x, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)

    images = ops.parameter([-1, image_size, image_size, 3], np.uint8, name="image")
    mean_rgb = np.array(MEAN_BGR[::-1], np.float32)
    x = ops.subtract(ops.convert(images, "f32"), constant(mean_rgb))
    x = ops.transpose(x, ops.constant(np.array([0, 3, 1, 2], np.int32)))
    x = resnet.apply_stages(resnet.Operators(convolve, ops.relu, max_pool, ops.add), x)
    features = ops.reduce_mean(x, ops.constant(np.array([2, 3], np.int32)), False)
    return openvino.Model([ops.result(features)], [images], "backbone")


def classifier(convolutions: Convolutions, head: Head, *, image_size: int) -> "openvino.Model":
    """Build the whole model: RGB [B, S, S, 3] uint8 -> probabilities [B, C] float32, any B.

    Args:
        convolutions: folded weights.
        head: on raw features.
        image_size: S, pixels.
    """
    backbone = build(convolutions, image_size=image_size)
    import openvino
    from openvino import opset13 as ops

    x = backbone.outputs[0].get_node().input_value(0)
    for i, (kernel, bias) in enumerate(head):
        x = ops.add(ops.matmul(x, ops.constant(kernel), False, False), ops.constant(bias[None]))
        x = x if i == len(head) - 1 else ops.relu(x)
    probabilities = ops.softmax(x, 1)
    probabilities.output(0).set_names({"probabilities"})
    model = openvino.Model([ops.result(probabilities)], backbone.get_parameters(), "leafnet")
    model.input(0).set_names({"image"})
    return model


def quantize(model: "openvino.Model", photographs: Sequence[Pixels]) -> Int8:
    """`model` with weights and activations of 8 bits, by NNCF's post-training quantization.

    Args:
        model: of `build`.
        photographs: [S, S, 3] each; their activations set the ranges.
    """
    _quiet_import()
    import nncf
    import openvino
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    batches = [photograph[None] for photograph in photographs[:CALIBRATION_EXAMPLES]]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(batches),
        # Medians: with some weights a few photographs have activations hundreds of times those
        # of the others, and a range that held them would leave the others a few levels of 256.
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=RangeEstimatorParametersSet.MEDIAN_MINMAX
        ),
    )
    with tempfile.TemporaryDirectory(prefix="leafnet-") as folder:
        path = Path(folder) / "int8.xml"
        openvino.save_model(quantized, path, compress_to_fp16=False)
        return Int8(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def read(int8: Int8) -> "openvino.Model":
    """The graph of a quantized backbone."""
    _quiet_import()
    import openvino

    return openvino.Core().read_model(model=int8.xml, weights=int8.weights)


def save(model: "openvino.Model", path: Path) -> None:
    """Write `model` as the file `path` (.xml) and its weights in float32 beside it (.bin)."""
    _quiet_import()
    import openvino

    openvino.save_model(model, path, compress_to_fp16=False)


def open_classifier(path: Path) -> Callable[[Pixels], Array]:
    """What `save` wrote of a `classifier`: RGB [B, S, S, 3] uint8 to probabilities [B, C]."""
    _quiet_import()
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pixels: np.array(compiled([pixels])[0], np.float32)


def compile_model(
    model: "openvino.Model", *, precision: str, threads: int
) -> Callable[[Pixels], Array]:
    """A function from RGB [B, S, S, 3] uint8 to features [B, 2048] float32, for any B.

    Args:
        model: of `build` or `read`.
        precision: `float32` or `bfloat16`, of what is not int8 in `model`.
        threads: CPU threads.
    """
    _quiet_import()
    import openvino

    size = model.input(0).partial_shape[1].get_length()
    model.reshape([_REQUEST, size, size, 3])
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
        },
    )
    # Two for each stream, so that the next is ready when one is done.
    queue = openvino.AsyncInferQueue(compiled, 2 * threads)

    def forward(pixels: Pixels) -> Array:
        features = np.empty((len(pixels), FEATURES), np.float32)

        def keep(request: "openvino.InferRequest", rows: slice) -> None:
            features[rows] = request.get_output_tensor(0).data[: rows.stop - rows.start]

        queue.set_callback(keep)
        for start in range(0, len(pixels), _REQUEST):
            rows = slice(start, min(start + _REQUEST, len(pixels)))
            padded = np.zeros((_REQUEST, *pixels.shape[1:]), np.uint8)
            padded[: rows.stop - start] = pixels[rows]
            queue.start_async([padded], rows)
        queue.wait_all()
        return features

    return forward
