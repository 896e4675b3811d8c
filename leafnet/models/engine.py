"""The frozen network as scoring runs it: by TensorFlow, or by OpenVINO on CPUs.

Whatever runs it, uint8 RGB goes in and the same 2,048 features come out, up to the rounding of
the precision; `classifier.head_logits` makes logits of them in numpy.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from leafnet.core import hardware
from leafnet.core.errors import UserError
from leafnet.metrics.thresholds import Review
from leafnet.models import openvino, resnet, runtime, weights
from leafnet.models.bundle import Bundle
from leafnet.models.weights import Array

Forward = Callable[[NDArray[np.uint8]], Array]

_INSTALL = 'pip install "leafnet[openvino]"'


@dataclass(frozen=True)
class Engine:
    """A network that is ready to run. It serves one thread at a time."""

    name: str  # tensorflow or openvino
    precision: str  # float32, bfloat16 or int8
    why: str  # these two
    image_size: int  # S, pixels
    review: Review | None  # thresholds for what this precision computes; None: the model has none
    forward: Forward

    def features(self, pixels: NDArray[np.uint8]) -> Array:
        """Features [B, 2048] float32 of RGB `pixels` [B, S, S, 3] uint8, for any B, also 0.

        Raises:
            ValueError: pixels of another shape or type.
        """
        shape = (self.image_size, self.image_size, 3)
        if pixels.shape[1:] != shape or pixels.dtype != np.uint8:
            raise ValueError(
                f"need uint8 pixels of shape [B, {', '.join(map(str, shape))}], got "
                f"{pixels.dtype} {list(pixels.shape)}"
            )
        if not len(pixels):
            return np.zeros((0, weights.FEATURES), np.float32)
        return self.forward(pixels)


class Choice(NamedTuple):
    """What to run the network with."""

    engine: str
    precision: str
    why: str


def choose(
    *, engine: str, precision: str, gpu: bool, has_int8: bool, installed: bool, best_float: str
) -> Choice:
    """Engine and precision for what was asked, `auto` or by name.

    `auto` takes OpenVINO on CPUs where it is installed, and int8 where the model carries it. In
    256-pixel images for each second of CPU (Zen 5, a busy machine), bfloat16 is 23 in OpenVINO and
    19 in TensorFlow, and int8 is 40.

    Args:
        engine: auto, tensorflow or openvino.
        precision: auto, float32, bfloat16 or int8.
        gpu: whether it runs on a GPU.
        has_int8: whether the model carries a quantized backbone.
        installed: whether OpenVINO is.
        best_float: precision of `auto` without int8, see `hardware.choose_precision`.

    Raises:
        UserError: there is no such combination, with what to do.
    """
    if engine == "openvino" and gpu:
        raise UserError(
            "openvino-on-gpu",
            "--engine openvino runs on CPUs only; give --gpu false, or --engine auto",
        )
    if engine == "openvino" and not installed:
        raise UserError(
            "no-openvino", f"--engine openvino needs OpenVINO, which is not installed: {_INSTALL}"
        )
    if precision == "int8":
        if not has_int8:
            raise UserError(
                "no-int8",
                "--precision int8, but the model carries no int8 network; train it with --int8, or "
                "give --precision auto",
            )
        if engine == "tensorflow":
            raise UserError(
                "int8-needs-openvino",
                "--precision int8 is run by OpenVINO; give --engine openvino or auto",
            )
        if gpu:
            raise UserError(
                "int8-on-gpu", "--precision int8 runs on CPUs only; give --gpu false, or bfloat16"
            )
        if not installed:
            raise UserError(
                "no-openvino",
                f"--precision int8 needs OpenVINO, which is not installed: {_INSTALL}",
            )
        return Choice("openvino", "int8", "as set")
    if engine == "auto":
        engine = "openvino" if installed and not gpu else "tensorflow"
    if precision != "auto":
        return Choice(engine, precision, "as set")
    if engine == "openvino" and has_int8:
        return Choice(engine, "int8", "the model carries it")
    return Choice(engine, best_float, "the best this machine has")


def open_engine(
    model: Bundle, *, engine: str, precision: str, threads: int, gpu: bool, batch_size: int
) -> Engine:
    """The backbone of `model`, compiled in this process.

    Args:
        model: a published model.
        engine: see `choose`.
        precision: see `choose`.
        threads: CPU threads. TensorFlow takes them only before its first operation in a process.
        gpu: run on the GPU of this process.
        batch_size: photographs in a pass of TensorFlow; OpenVINO takes a few at a time, whatever
            they are.

    Raises:
        UserError: this combination cannot be run, with what to do.
    """
    chosen = choose(
        engine=engine,
        precision=precision,
        gpu=gpu,
        has_int8=model.int8 is not None,
        installed=openvino.installed(),
        best_float=hardware.choose_precision("auto", compute_capability=_capability(gpu))[0],
    )
    if chosen.engine == "tensorflow":
        forward = _tensorflow(model, chosen.precision, threads, gpu, batch_size)
    else:
        forward = _openvino(model, chosen.precision, threads)
    return Engine(
        chosen.engine,
        chosen.precision,
        chosen.why,
        model.image_size,
        model.int8_review if chosen.precision == "int8" else model.review,
        forward,
    )


def _openvino(model: Bundle, precision: str, threads: int) -> Forward:
    if precision == "int8":
        assert model.int8 is not None, "choose let it through"
        graph = openvino.read(model.int8)
        # Of the few operators that stay in floating point.
        precision, _ = hardware.choose_precision("auto", compute_capability=None)
    else:
        graph = openvino.build(model.convolutions, image_size=model.image_size)
    return openvino.compile_model(graph, precision=precision, threads=threads)


def _tensorflow(model: Bundle, precision: str, threads: int, gpu: bool, batch_size: int) -> Forward:
    hardware.limit_threads(threads, gpu=gpu)
    network = resnet.build(model.convolutions, image_size=model.image_size, precision=precision)
    # A tf.function with an input signature is no faster: 19.8 images/s of a CPU, and 19.9 so.
    return functools.partial(runtime.forward, network, batch_size=batch_size)


def _capability(gpu: bool) -> tuple[int, int] | None:
    """Compute capability of this process's GPU; None: none is used."""
    if not gpu:
        return None
    import tensorflow as tf

    devices = tf.config.list_physical_devices("GPU")
    if not devices:
        raise UserError("no-gpu", "a GPU is asked for, but TensorFlow sees none; give --gpu false")
    found: tuple[int, int] = tf.config.experimental.get_device_details(devices[0])[
        "compute_capability"
    ]
    return found
