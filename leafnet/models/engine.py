"""The frozen network as scoring runs it: by TensorFlow, or by OpenVINO on CPUs.

Whatever runs it, uint8 RGB goes in and the same 2,048 features come out, up to the rounding of
the precision; `classifier.head_logits` makes logits of them in numpy.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafnet.core import hardware
from leafnet.core.errors import UserError
from leafnet.metrics.thresholds import Review
from leafnet.models import openvino, rates, resnet, runtime, weights
from leafnet.models.bundle import Bundle
from leafnet.models.openvino import Int8
from leafnet.models.rates import Way
from leafnet.models.weights import Array

Forward = Callable[[NDArray[np.uint8]], Array]
Convolutions = dict[str, tuple[Array, Array]]

# Two batches of TensorFlow in a pass, which run side by side.
_MEASURED_BATCH = 4

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


def ways(*, engine: str, precision: str, gpu: bool, has_int8: bool, installed: bool) -> list[Way]:
    """The ways to run the network that were asked for, `auto` or by name.

    Args:
        engine: auto, tensorflow or openvino.
        precision: auto, float32, bfloat16 or int8.
        gpu: whether it runs on a GPU.
        has_int8: whether the model carries a quantized backbone.
        installed: whether OpenVINO is.

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
        _check_int8(engine, gpu=gpu, has_int8=has_int8, installed=installed)
        return [Way("openvino", "int8")]
    engines = ["tensorflow"] + ["openvino"] * (installed and not gpu)
    found = [
        Way(one, other)
        for one in (engines if engine == "auto" else [engine])
        for other in (("float32", "bfloat16") if precision == "auto" else (precision,))
    ]
    if precision == "auto" and "openvino" in (one.engine for one in found) and has_int8:
        found.append(Way("openvino", "int8"))
    return found


def _check_int8(engine: str, *, gpu: bool, has_int8: bool, installed: bool) -> None:
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


def open_engine(
    model: Bundle, *, engine: str, precision: str, threads: int, gpu: bool, batch_size: int
) -> Engine:
    """The backbone of `model`, compiled in this process.

    Args:
        model: a published model.
        engine: see `ways`; of several the fastest is taken.
        precision: see `ways`.
        threads: CPU threads. TensorFlow takes them only before its first operation in a process.
        gpu: run on the GPU of this process.
        batch_size: photographs in a pass of TensorFlow; OpenVINO takes a few at a time, whatever
            they are.

    Raises:
        UserError: this combination cannot be run, with what to do.
    """
    allowed = ways(
        engine=engine,
        precision=precision,
        gpu=gpu,
        has_int8=model.int8 is not None,
        installed=openvino.installed(),
    )
    if gpu:
        chosen, why = hardware.choose_precision(precision, compute_capability=_capability(gpu))
        way = Way("tensorflow", chosen)
    else:
        way, why = fastest(
            allowed, model.convolutions, model.int8, image_size=model.image_size, threads=threads
        )
    return Engine(
        way.engine,
        way.precision,
        why,
        model.image_size,
        model.int8_review if way.precision == "int8" else model.review,
        _forward(
            way,
            model.convolutions,
            model.int8,
            image_size=model.image_size,
            threads=threads,
            gpu=gpu,
            batch_size=batch_size,
        ),
    )


def fastest(
    allowed: Sequence[Way],
    convolutions: Convolutions,
    int8: Int8 | None,
    *,
    image_size: int,
    threads: int,
) -> tuple[Way, str]:
    """The fastest of some ways on the CPUs of this machine, and why; see `measure`."""
    if len(allowed) == 1:
        return allowed[0], "as set"
    _, found = rates.kept(image_size=image_size, threads=threads)
    if not found.keys() >= {way.name for way in allowed}:
        found = measure(allowed, convolutions, int8, image_size=image_size, threads=threads)
    return max(allowed, key=lambda way: found[way.name]), "measured as the fastest here"


def measuring(allowed: Sequence[Way], *, image_size: int, threads: int) -> dict[str, Any]:
    """`kept` and `measure` of `distributed.fastest.choose`, for weights (convolutions, int8)."""
    return {
        "kept": functools.partial(rates.kept, image_size=image_size, threads=threads),
        "measure": functools.partial(measure, allowed, image_size=image_size, threads=threads),
    }


def measure(
    allowed: Sequence[Way],
    convolutions: Convolutions,
    int8: Int8 | None,
    *,
    image_size: int,
    threads: int,
) -> rates.Rates:
    """Images/s of each of some ways on the CPUs of this machine, and kept; 0: it cannot.

    Args:
        allowed: to measure; int8 needs `int8`.
        convolutions: folded weights.
        int8: a quantized backbone.
        image_size: S, pixels.
        threads: of a CPU.
    """
    able = [
        way for way in allowed if way.precision != "bfloat16" or hardware.bfloat16_instructions()
    ]
    none = dict.fromkeys((way.name for way in allowed), 0.0)
    if len(able) == 1:
        return none | {able[0].name: 1.0}  # nothing to compare it with
    forwards = {
        way.name: _forward(
            way,
            convolutions,
            int8,
            image_size=image_size,
            threads=threads,
            gpu=False,
            batch_size=_MEASURED_BATCH,
        )
        for way in able
    }
    return none | rates.measure(forwards, image_size=image_size, threads=threads, others=none)


def _forward(
    way: Way,
    convolutions: Convolutions,
    int8: Int8 | None,
    *,
    image_size: int,
    threads: int,
    gpu: bool,
    batch_size: int,
) -> Forward:
    if way.engine == "tensorflow":
        hardware.limit_threads(threads, gpu=gpu)
        network = resnet.build(convolutions, image_size=image_size, precision=way.precision)
        # A tf.function with an input signature is no faster: 19.8 images/s of a CPU, and 19.9 so.
        return functools.partial(runtime.forward, network, batch_size=batch_size)
    precision = way.precision
    if precision == "int8":
        assert int8 is not None, "ways let it through"
        graph = openvino.read(int8)
        # Of the few operators that stay in floating point.
        precision, _ = hardware.choose_precision("auto", compute_capability=None)
    else:
        graph = openvino.build(convolutions, image_size=image_size)
    return openvino.compile_model(graph, precision=precision, threads=threads)


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
