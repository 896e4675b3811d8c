"""The views of a photograph: flips and turns, drawn by seed and position."""

import hashlib

import numpy as np

from leafnet.data.images import Pixels

# The article's augmentation: flips both ways and a rotation of at most so many turns.
MAX_TURN = 0.2


def draw_view(pixels: Pixels, *, key: str, number: int, seed: int) -> Pixels:
    """View `number` of the photograph `key`: 0 is the photograph, the others are augmented.

    A pure function of its arguments, so any worker draws the same view. Pixels that a rotation
    brings in from outside mirror the edge, as in Keras's RandomRotation. On uint8 with OpenCV a
    view costs 0.3 ms at 256 pixels, 2 % of the forward pass on the same core; Pillow took 4 ms.

    Args:
        pixels: [H, W, 3].
        key: of the example, unique in the data set.
        number: of the view.
        seed: of the augmentation.

    Returns:
        [H, W, 3] uint8.
    """
    if number == 0:
        return pixels
    import cv2

    digest = hashlib.blake2b(f"{seed}/{number}/{key}".encode(), digest_size=8).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    left_right, up_down = generator.integers(0, 2, 2)
    degrees = 360.0 * generator.uniform(-MAX_TURN, MAX_TURN)
    if left_right:
        pixels = pixels[:, ::-1]
    if up_down:
        pixels = pixels[::-1]
    height, width = pixels.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    rotated = cv2.warpAffine(
        np.ascontiguousarray(pixels),
        matrix,
        (width, height),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )
    return np.asarray(rotated, np.uint8)
