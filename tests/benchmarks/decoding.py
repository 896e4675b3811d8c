"""(d) Images per second and core of 12-megapixel JPEGs, decoded and resized to 256 pixels."""

import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from leafnet.data import images, synthetic
from tests.benchmarks.rows import Bench, Row

SIZE, WIDTH, HEIGHT, ROUNDS = 256, 4000, 3000, 4


def rows(bench: Bench) -> list[Row]:
    encoded = [_photograph(name) for name in synthetic.CLASS_NAMES]
    decoders: dict[str, Callable[[bytes], Any]] = {
        "full Pillow": _pillow,
        "tf.io.decode_jpeg and resize": _tensorflow,
        "leafnet.data.images.decode": lambda data: images.decode(data, SIZE).pixels,
    }
    rates = {}
    for name, decode in decoders.items():
        decode(encoded[0])
        began = time.process_time()
        for _ in range(ROUNDS):
            for data in encoded:
                decode(data)
        rates[name] = ROUNDS * len(encoded) / (time.process_time() - began)
    peer = "full Pillow"
    return [
        Row("d", name, rate, "images/s of a core", rate / rates[peer], peer)
        for name, rate in rates.items()
    ]


def _photograph(name: str) -> bytes:
    """A leaf with the fine noise of a sensor, as a phone stores it."""
    leaf = Image.fromarray(synthetic.draw_leaf(name, seed=1, width=1000, height=750))
    pixels = np.asarray(leaf.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
    noise = np.random.default_rng(0).normal(0, 6, pixels.shape).astype(np.int16)
    sink = io.BytesIO()
    noisy = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def _pillow(data: bytes) -> Any:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def _tensorflow(data: bytes) -> Any:
    import tensorflow as tf

    return tf.image.resize(tf.io.decode_jpeg(data, channels=3), (SIZE, SIZE)).numpy()
