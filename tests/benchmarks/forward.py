"""(a) Images per second of the 256-pixel forward pass, a batch of 32 on all cores."""

import functools
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafnet.core import hardware
from leafnet.models import engine, resnet
from leafnet.models.rates import Way
from leafnet.models.weights import load_weights
from tests.benchmarks.rows import Bench, Row

SIZE, BATCH, ROUNDS = 256, 32, 5

Forward = Callable[[NDArray[np.uint8]], Any]

_WAYS = {
    "folded float32": Way("tensorflow", "float32"),
    "folded bfloat16": Way("tensorflow", "bfloat16"),
    "OpenVINO float32": Way("openvino", "float32"),
    "OpenVINO bfloat16": Way("openvino", "bfloat16"),
}


def rows(bench: Bench) -> list[Row]:
    found = rates(bench)
    peer = "stock Keras float32"
    table = [
        Row("a", name, rate, "images/s", rate / found[peer], peer) for name, rate in found.items()
    ]
    ours = {name: rate for name, rate in found.items() if name in _WAYS}
    auto, fastest = ours[_chosen(bench)], max(ours, key=lambda name: ours[name])
    return [*table, Row("a", "what auto chooses", auto, "images/s", auto / ours[fastest], fastest)]


def _chosen(bench: Bench) -> str:
    """The name of what leafnet chooses on this machine for a model without int8."""
    installed = importlib.util.find_spec("openvino") is not None
    way, _ = engine.fastest(
        engine.ways(
            engine="auto", precision="auto", gpu=False, has_int8=False, installed=installed
        ),
        load_weights(bench.weights).convolutions,
        None,
        image_size=SIZE,
        threads=os.cpu_count() or 1,
    )
    return next(name for name, known in _WAYS.items() if known == way)


@functools.cache
def rates(bench: Bench) -> dict[str, float]:
    """Images/s: the best of some rounds, interleaved, so that what else runs hits all alike."""
    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8)
    networks = {name: network for name, network in _networks(bench, images)}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for network in networks.values():
        network(images)
    for _ in range(ROUNDS):
        for name, network in networks.items():
            began = time.perf_counter()
            network(images)
            seconds[name].append(time.perf_counter() - began)
    return {name: BATCH / min(taken) for name, taken in seconds.items()}


def _folded(bench: Bench, precision: str) -> Forward:
    """The folded network as a bare loop runs it: one graph, no Ray, nothing drawn or decoded."""
    import tensorflow as tf

    weights = load_weights(bench.weights)
    network = resnet.build(weights.convolutions, image_size=SIZE, precision=precision)
    graph = tf.function(lambda images: network(images, training=False))
    return lambda images: graph(tf.constant(images)).numpy()


def _networks(bench: Bench, images: NDArray[np.uint8]) -> Any:
    yield "stock Keras float32", _stock(bench.weights)
    yield "folded float32", _folded(bench, "float32")
    if hardware.bfloat16_instructions():
        yield "folded bfloat16", _folded(bench, "bfloat16")
    if importlib.util.find_spec("openvino"):
        model = _openvino_model(bench)
        yield "OpenVINO float32", _openvino(model, "f32")
        if hardware.bfloat16_instructions():
            yield "OpenVINO bfloat16", _openvino(model, "bf16")
        if importlib.util.find_spec("nncf"):
            yield "OpenVINO int8", _openvino(_quantized(model, images), "f32")


def _stock(weights: str) -> Forward:
    import keras

    model = keras.applications.ResNet50(
        include_top=False,
        pooling="avg",
        input_shape=(SIZE, SIZE, 3),
        weights=None if weights == "random" else weights,
    )
    scale = keras.applications.resnet50.preprocess_input
    return lambda images: model.predict_on_batch(scale(images.astype(np.float32)))


def _openvino_model(bench: Bench) -> Any:
    import openvino

    weights = load_weights(bench.weights)
    network = resnet.build(weights.convolutions, image_size=SIZE, precision="float32")
    with tempfile.TemporaryDirectory() as folder:
        network.export(f"{folder}/model.xml", format="openvino", verbose=False)
        return openvino.Core().read_model(f"{folder}/model.xml")


def _openvino(model: Any, precision: str) -> Forward:
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "THROUGHPUT"}
    compiled = openvino.Core().compile_model(model, "CPU", hints | {"NUM_STREAMS": "1"})
    return lambda images: compiled(images.astype(np.float32))[0]


def _quantized(model: Any, images: NDArray[np.uint8]) -> Any:
    """Post-training quantisation; noise as calibration data is enough to time it."""
    import nncf

    samples = [image[None].astype(np.float32) for image in images[:16]]
    return nncf.quantize(model, nncf.Dataset(samples), subset_size=len(samples))
