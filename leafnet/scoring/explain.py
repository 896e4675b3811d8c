"""Where the model sees its label, in those photographs of a night that its report shows.

Which they are is known when the night is over. Until then what the network saw of them waits with
their rows, as their thumbnails do, so that none is read or decoded again, and a photograph that
needs no person costs nothing.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from leafnet.core import hardware
from leafnet.data import thumbnails as data_thumbnails
from leafnet.data.images import decode
from leafnet.models import cam
from leafnet.models.classifier import Head
from leafnet.scoring import thumbnails as scoring_thumbnails

Array = NDArray[np.float32]
# (RGB [B, S, S, 3], classes [B]) -> class maps [B, h, w], such as `cam.explainer`.
Explain = Callable[[NDArray[np.uint8], NDArray[np.int64]], Array]

_BATCH = 32


def run(
    rows: pa.Table,
    convolutions: dict[str, tuple[Array, Array]],
    head: Head,
    class_names: Sequence[str],
    image_size: int,
    threads: int,
) -> pa.Table:
    """`make` by TensorFlow on the CPUs of this process, in a few seconds and 25 ms for each.

    Args:
        rows: see `make`.
        convolutions: folded weights.
        head: on raw features.
        class_names: in the order of the logits.
        image_size: pixels.
        threads: of a CPU.
    """
    hardware.limit_threads(threads, gpu=False)
    precision, _ = hardware.choose_precision("auto", compute_capability=None)
    explain = cam.explainer(convolutions, head, image_size=image_size, precision=precision)
    return make(rows, explain, class_names, size=image_size)


def make(rows: pa.Table, explain: Explain, class_names: Sequence[str], *, size: int) -> pa.Table:
    """Image, version and the thumbnail under the map of its label, of `rows`.

    Args:
        rows: of the predictions, with `thumbnails.SEEN`.
        explain: always called with the same number of photographs, 32 at most, the last made up.
        class_names: in the order of the logits.
        size: S, pixels.
    """
    made: list[bytes] = []
    batch = min(_BATCH, rows.num_rows)
    for start in range(0, rows.num_rows, _BATCH):
        some = rows.slice(start, _BATCH).to_pylist()
        pixels = np.zeros((batch, size, size, 3), np.uint8)
        classes = np.zeros(batch, np.int64)
        for i, row in enumerate(some):
            pixels[i] = decode(row[scoring_thumbnails.SEEN], size).pixels
            classes[i] = class_names.index(row["label"])
        maps = explain(pixels, classes)
        for row, square, class_map in zip(some, pixels, maps, strict=False):
            shown = cam.overlay(square, class_map)
            made.append(data_thumbnails.jpeg(shown, width=row["width"], height=row["height"]))
    keys = rows.select(["image", "version"])
    return keys.append_column(scoring_thumbnails.EXPLAINED, pa.array(made, pa.binary()))
