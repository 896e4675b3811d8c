"""(t) A step of fine-tuning the last two stages against `keras.Model.fit` on the same stages.

Both in one process on all cores, on photographs of 128 pixels that are decoded already and a head
on top. Ours also augments and averages; Keras's does neither, its BatchNorms run in inference mode.
"""

import itertools
import os
import time
from collections.abc import Callable

import numpy as np

from leafnet.distributed.worker import Place
from leafnet.models import runtime, weights
from leafnet.models.classifier import initial_head
from leafnet.models.rates import precision
from leafnet.training.finetune.pixels import Photographs
from leafnet.training.finetune.tuner import Tuner, TuningData
from leafnet.training.loop import Steps
from leafnet.training.settings import FineTuneSettings
from tests.benchmarks.rows import Bench, Row

SIZE, BATCH, STEPS, ROUNDS, STAGES = 128, 32, 6, 2, 2


def rows(bench: Bench) -> list[Row]:
    """The best of some rounds, interleaved."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (STEPS * BATCH, SIZE, SIZE, 3)).astype(np.uint8)
    labels = generator.integers(0, 3, STEPS * BATCH).astype(np.int32)
    best = precision(image_size=SIZE, threads=os.cpu_count() or 1)
    policy = "mixed_bfloat16" if best == "bfloat16" else best
    peer = f"keras.Model.fit, {policy}"
    rounds = {
        peer: _keras(bench, pixels, labels, policy),
        f"fine-tune step, {best}": _ours(bench, pixels, labels, best),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    for epoch in rounds.values():
        epoch()
    for _ in range(ROUNDS):
        for name, epoch in rounds.items():
            began = time.perf_counter()
            epoch()
            seconds[name].append(time.perf_counter() - began)
    rates = {name: STEPS * BATCH / min(taken) for name, taken in seconds.items()}
    return [
        Row("t", name, rate, "images/s", rate / rates[peer], peer) for name, rate in rates.items()
    ]


def _ours(
    bench: Bench, pixels: np.ndarray, labels: np.ndarray, precision: str
) -> Callable[[], None]:
    nobody = Photographs(labels[:0], lambda indices: pixels[indices])
    ones = np.ones(weights.FEATURES, np.float32)
    tuner = Tuner(
        TuningData(Photographs(labels, lambda indices: pixels[indices]), nobody, 0 * ones, ones),
        weights=weights.load_weights(bench.weights).convolutions,
        head=initial_head((512,), 3, inputs=weights.FEATURES, seed=0),
        settings=FineTuneSettings(blocks=STAGES, batch_size=BATCH),
        class_weights="none",
        precision=precision,
        image_size=SIZE,
        num_classes=3,
        seed=0,
        place=Place(0, 1),
        steps=Steps(BATCH, STEPS, FineTuneSettings().epochs),
    )

    tuner.feed, starts = runtime.ahead(tuner.batches(0), depth=3), itertools.count(0, STEPS)

    def epoch() -> None:
        tuner.train(next(starts), STEPS)

    return epoch


def _keras(bench: Bench, pixels: np.ndarray, labels: np.ndarray, policy: str) -> Callable[[], None]:
    """As Keras's guide to transfer learning has it: stock ResNet50, called with training=False."""
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    stock = keras.applications.ResNet50(
        include_top=False,
        pooling="avg",
        input_shape=(SIZE, SIZE, 3),
        weights=None if bench.weights == "random" else bench.weights,
    )
    first = 6 - STAGES
    for layer in stock.layers:
        stage = int(layer.name[4]) if layer.name.startswith("conv") else 0
        layer.trainable = stage >= first and "_bn" not in layer.name
    images = keras.Input((SIZE, SIZE, 3), dtype="uint8")
    scaled = keras.applications.resnet50.preprocess_input(keras.ops.cast(images, "float32"))
    x = keras.layers.Dense(512, activation="relu")(stock(scaled, training=False))
    model = keras.Model(images, keras.layers.Dense(3, dtype="float32")(x))
    model.compile(
        keras.optimizers.AdamW(1e-4),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,  # XLA is slower on CPUs
    )
    keras.config.set_dtype_policy(before)

    def epoch() -> None:
        model.fit(pixels, labels, batch_size=BATCH, epochs=1, verbose=0)

    return epoch
