"""Small pictures of photographs, for reports and galleries."""

import cv2

from leafnet.data.images import Pixels, decode

SIDE = 128  # pixels, of the longer side
LARGE = 160  # the same, where only a few dozen are shown
_QUALITY = 78  # 3.5 kB and 0.1 ms each from 256 x 256 pixels


def jpeg(
    pixels: Pixels, *, width: int, height: int, side: int = SIDE, quality: int = _QUALITY
) -> bytes:
    """Encode `pixels` [H, W, 3], RGB, as a JPEG with the proportions of `width` x `height`.

    The longer side has `side` pixels, the other one at least 16, so that there is something to see.
    """
    scale = side / max(width, height)
    size = max(16, round(width * scale)), max(16, round(height * scale))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), options)
    return bytes(encoded.tobytes())


def of_photograph(data: bytes) -> bytes:
    """Make a large thumbnail of an encoded photograph.

    Raises:
        ImageError: it cannot be decoded.
    """
    photo = decode(data, LARGE)
    return jpeg(photo.pixels, width=photo.width, height=photo.height, side=LARGE)
