#!/usr/bin/env bash
# Converting and saving a model with OpenVINO moves a normalised input by 39,000 standard
# deviations.
#
# Versions: openvino 2026.4.1, onnx 1.23.2, numpy 2.4.6, CPU, inference in float32.
# Setting:  a plant classifier takes latitude and height beside the photograph and normalises
#           them as a Keras Normalization layer does: (x - mean) / std. All plots lie in one
#           village, so the latitude has mean 52.4567 and standard deviation 0.0005.
# Guess:    save_model stores weights as float16 unless told otherwise, which costs about a
#           thousandth of each constant; 52.4567 and 0.0005 both fit, so the saved model is
#           within 0.1 of a standard deviation of the model in memory.
# Happens:  convert_model rewrites (x - mean) / std as x * (1 / std) + (-mean / std), and the new
#           offset, -104913, does not fit float16: save_model clamps it to -65504, unasked and
#           without a warning.
#           Clamping depends on the other elements: a constant of which three quarters
#           or more are out of range stays float32, so a table of large numbers alone is exact
#           and the same number among small ones is not.
#           save_model(..., compress_to_fp16=False) is right.
# Seen:     latitude, height in memory     [[1.001 0.75 ]]
#           saved                          [[39410.4       0.749]]
#           saved, compress_to_fp16=False  [[1.001 0.75 ]]
#           70000 alone 70000.0, between 0.5 and 1: 65504.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
  openvino==2026.4.1 onnx==1.23.2 numpy==2.4.6
venv/bin/python - <<'PY'
import sys

import numpy as np
import onnx
import openvino as ov
from onnx import TensorProto, helper, numpy_helper

np.set_printoptions(precision=3, suppress=True)
core = ov.Core()


def run(model: ov.Model, value: np.ndarray) -> np.ndarray:
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([value])[0]


def saved(model: ov.Model, **options: bool) -> ov.Model:
    ov.save_model(model, "model.xml", **options)
    return core.read_model("model.xml")


def converted(nodes: list, value: np.ndarray, constants: dict[str, np.ndarray]) -> ov.Model:
    """The graph from input x, of the type and shape of `value`, to output y."""
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", kind, value.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, value.shape)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), "model.onnx")
    return ov.convert_model("model.onnx")


plot = np.array([[52.4572, 75.0]], np.float32)
normalize = converted(
    [
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["y"]),
    ],
    plot,
    {
        "mean": np.array([[52.4567, 60.0]], np.float32),
        "std": np.array([[0.0005, 20.0]], np.float32),
    },
)
in_memory = run(normalize, plot)
in_full = run(saved(normalize, compress_to_fp16=False), plot)
as_saved = run(saved(normalize), plot)
print("latitude, height in memory    ", in_memory)
print("saved                         ", as_saved)
print("saved, compress_to_fp16=False ", in_full)


def looked_up(values: list[float], row: int) -> float:
    index = np.array([row], np.int64)
    table = {"table": np.array(values, np.float32)}
    gather = helper.make_node("Gather", ["table", "x"], ["y"])
    return float(run(saved(converted([gather], index, table)), index)[0])


alone, between = looked_up([70000.0], 0), looked_up([0.5, 70000.0, 1.0], 1)
print(f"70000 alone {alone}, between 0.5 and 1: {between}")

as_stated = (
    abs(in_memory[0, 0] - 1) < 0.01
    and as_saved[0, 0] > 30000
    and abs(as_saved[0, 1] - 0.75) < 0.01
    and np.allclose(in_full, in_memory, atol=1e-3)
    and (alone, between) == (70000.0, 65504.0)
)
sys.exit(0 if as_stated else "not as stated: OpenVINO's float16 constants have changed")
PY
