"""How to feed an exported model: a line for each usual decoder, and how near it comes.

A model has learnt to see what `images.decode` makes of a file. Other decoders make other pixels of
JPEG's blocks, turn a photograph upright or not, and shrink it with other filters, of
which the last matters most. The lines here are those that come nearest, and what is stored beside
an export is measured with the same text.
"""

import importlib
import io
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leafnet.data.images import decode

Pixels = NDArray[np.uint8]
Probabilities = NDArray[np.float32]
Run = Callable[[Pixels], Probabilities]


class Recipe(NamedTuple):
    """A Python expression in `data`, the bytes of a file, and `size`: pixels [size, size, 3]."""

    modules: dict[str, str]  # name in the expression -> module
    expression: str
    note: str  # what it does otherwise


RECIPES = {
    "pillow": Recipe(
        {"Image": "PIL.Image", "ImageOps": "PIL.ImageOps", "io": "io", "np": "numpy"},
        "np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert('RGB')"
        ".resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0))",
        "transparent parts become black, in leafnet white",
    ),
    "opencv": Recipe(
        {"cv2": "cv2", "np": "numpy"},
        "cv2.cvtColor(cv2.resize(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), "
        "(size, size), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)",
        "turns JPEG, PNG, WebP and TIFF upright, AVIF not; other interpolations are farther off",
    ),
    "tensorflow": Recipe(
        {"tf": "tensorflow"},
        "tf.cast(tf.round(tf.image.resize(tf.io.decode_jpeg(data, channels=3, "
        "dct_method='INTEGER_ACCURATE'), (size, size), antialias=True)), tf.uint8).numpy()",
        "reads JPEG, PNG, GIF, BMP and WebP, and turns none upright; without antialias=True and "
        "dct_method it is 10 times as far off",
    ),
}

RUNTIMES = {
    "onnx": "onnxruntime.InferenceSession(path).run(['probabilities'], {'image': pixels})[0]",
    "openvino": "openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})"
    "([pixels])[0]  # without f32 it computes in bfloat16 where the processor can, 3e-3 off",
    "litert": "interpreter.resize_tensor_input(0, pixels.shape), then "
    "interpreter.get_signature_runner()(image=pixels)['probabilities']",
    "tf_saved_model": "tf.saved_model.load(path).signatures['serving_default'](image=pixels)"
    "['probabilities']  # keep what load returns",
}


def measure(run: Run, photographs: Iterable[bytes], *, size: int) -> dict[str, dict[str, Any]]:
    """How far each recipe is from `images.decode`, in levels and in what `run` says; for JSON.

    Args:
        run: the exported model, pixels [N, S, S, 3] to probabilities [N, C].
        photographs: encoded, some.
        size: S [pixels].

    Returns:
        Of each recipe its line and note, `photographs` that it read, `not_read`, `mean_levels` of
        255 that a pixel is off, `equal_labels`, and the `max_difference` of a probability.
    """
    namespaces = {
        name: {key: importlib.import_module(module) for key, module in recipe.modules.items()}
        for name, recipe in RECIPES.items()
    }
    found = {name: _Sums() for name in RECIPES}
    for data in photographs:
        pixels = decode(data, size).pixels
        expected = run(pixels[None])[0]
        for name, recipe in RECIPES.items():
            values = namespaces[name] | {"data": data, "size": size}
            try:
                other = np.asarray(eval(recipe.expression, values), np.uint8)
            except Exception:  # of three libraries, for files that they do not read
                found[name].not_read += 1
            else:
                found[name].add(pixels, other, expected, run(other[None])[0])
    return {
        name: {"line": recipe.expression, "note": recipe.note, **found[name].told()}
        for name, recipe in RECIPES.items()
    }


class _Sums:
    """What is added up of one recipe."""

    def __init__(self) -> None:
        self.not_read = 0
        self._levels: list[float] = []
        self._equal = 0
        self._largest = 0.0

    def add(
        self, pixels: Pixels, other: Pixels, expected: Probabilities, found: Probabilities
    ) -> None:
        self._levels.append(float(np.abs(pixels.astype(int) - other).mean()))
        self._equal += int(expected.argmax() == found.argmax())
        self._largest = max(self._largest, float(np.abs(expected - found).max()))

    def told(self) -> dict[str, Any]:
        count = len(self._levels)
        return {
            "photographs": count,
            "not_read": self.not_read,
            "mean_levels": float(np.mean(self._levels)) if count else None,
            "equal_labels": self._equal,
            "max_difference": self._largest if count else None,
        }


def jpeg(pixels: Pixels) -> bytes:
    """`pixels` [H, W, 3] as a camera's file."""
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=90)
    return sink.getvalue()
