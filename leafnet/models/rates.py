"""How fast this machine runs the backbone in each way that it can: measured once, and kept.

    ~/.cache/leafnet/rates/KEY.json    {"tensorflow float32": 27.6, ...}    images/s

What a processor says of itself does not tell: with `avx512_bf16` bfloat16 runs 1.8 times as fast
as float32 on an EPYC of 2024, and 0.6 times as fast on a Xeon of 2023. KEY is made of all that the
rate depends on, so that another processor, version, image size or number of threads is measured
anew.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from leafnet.core import hardware
from leafnet.models.weights import Array

Rates = dict[str, float]  # images/s of a way, by `Way.name`
Forward = Callable[[NDArray[np.uint8]], Array]

# How many times as fast bfloat16 has to be: where the two are near each other nothing is gained by
# rounding, and another measurement should choose the same.
CLEARLY = 1.25

# Photographs in a pass, and passes after the one that compiles.
_PASS, _PASSES = 8, 4


class Way(NamedTuple):
    """One way to run the backbone."""

    engine: str  # tensorflow or openvino
    precision: str  # float32, bfloat16 or int8

    @property
    def name(self) -> str:
        return f"{self.engine} {self.precision}"


def kept(*, image_size: int, threads: int) -> tuple[str, Rates]:
    """(key of this kind of machine, what has been measured on one), {} where nothing has.

    Args:
        image_size: S, pixels.
        threads: of a CPU.
    """
    key = _key(image_size, threads)
    try:
        stored = json.loads(_path(key).read_bytes())
        return key, {str(name): float(rate) for name, rate in stored.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return key, {}


def precision(*, image_size: int, threads: int) -> str:
    """The precision for TensorFlow on this machine's CPUs: the faster as far as it is measured.

    Where nothing is kept it is bfloat16 if the processor has instructions for it.
    """
    _, found = kept(image_size=image_size, threads=threads)
    plain, rounded = (found.get(f"tensorflow {name}") for name in ("float32", "bfloat16"))
    if plain is None or rounded is None:
        return "bfloat16" if hardware.bfloat16_instructions() else "float32"
    return "bfloat16" if rounded > CLEARLY * plain else "float32"


def measure(
    forwards: Mapping[str, Forward], *, image_size: int, threads: int, others: Rates
) -> Rates:
    """Images/s of each of `forwards`, kept for the next job.

    They run by turns, and of each the fastest pass counts: whatever else the machine does can only
    make one slower.

    Args:
        forwards: by `Way.name`: uint8 pixels [B, S, S, 3] to features.
        image_size: S, pixels.
        threads: of a CPU that they have.
        others: kept along with them.
    """
    shape = (_PASS, image_size, image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    seconds = dict.fromkeys(forwards, float("inf"))
    for number in range(1 + _PASSES):
        for name, forward in forwards.items():
            began = time.perf_counter()
            forward(pixels)
            if number:  # the first compiles
                seconds[name] = min(seconds[name], time.perf_counter() - began)
    rates = {name: _PASS / value for name, value in seconds.items()}
    key, before = kept(image_size=image_size, threads=threads)
    _keep(key, before | others | rates)
    return rates


def correct(name: str, rate: float, *, image_size: int, threads: int) -> None:
    """Forget what is kept here where a job ran `name` at less than half of it [images/s].

    Something else kept the machine busy during the measurement, or does so now; the next job
    measures again.
    """
    if 2 * rate < kept(image_size=image_size, threads=threads)[1].get(name, 0.0):
        forget(image_size=image_size, threads=threads)


def forget(*, image_size: int, threads: int) -> None:
    """Measure anew at the next start: what was kept has turned out to be wrong."""
    with contextlib.suppress(OSError):
        _path(_key(image_size, threads)).unlink()


def _key(image_size: int, threads: int) -> str:
    facts = (
        hardware.processor(),
        hardware.versions(("tensorflow", "openvino", "leafnet")),
        image_size,
        threads,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _path(key: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(root).expanduser() / "leafnet" / "rates" / f"{key}.json"


def _keep(key: str, rates: Rates) -> None:
    """Write `rates`; where that cannot be, the next job measures again."""
    path = _path(key)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(rates))
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
