"""Encoded photographs to uint8 RGB: the one decoder of training, evaluation and scoring.

Nothing here depends on a file's name, on the machine or on what was decoded before, and every
function may run in many threads at once.
"""

import functools
import hashlib
import importlib
import io
import math
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from leafnet.data import headers

Pixels = NDArray[np.uint8]

# Raise it whenever the same bytes would give other pixels: it is part of the model, of the feature
# cache's key and of each scored row.
DECODER_VERSION = 1

# The largest phone sensors give 12,000 x 9,000 = 108 million pixels; Pillow's own limit of 89
# million warns about those.
MAX_PIXELS = 120_000_000

# The kinds that phones, cameras and web pages hand out. Pillow knows about forty more, among them
# EPS, which it gives to Ghostscript to run: a list keeps strangers' bytes away from those parsers.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF")

# First bytes -> kind. The kinds outside _FORMATS serve the message only.
_SIGNATURES = tuple(
    (re.compile(pattern, re.DOTALL), kind)
    for pattern, kind in (
        (rb"\xff\xd8\xff", "JPEG"),
        (rb"\x89PNG\r\n\x1a\n", "PNG"),
        (rb"RIFF....WEBP", "WEBP"),
        (rb"GIF8[79]a", "GIF"),
        (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF"),
        (rb"BM....\0\0\0\0", "BMP"),
        (rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)", "HEIF"),
        (rb"....ftypavi[fs]", "AVIF"),
        (rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ", "JPEG 2000"),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
        (rb"8BPS", "Photoshop"),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
        (rb"%PDF", "PDF"),
        (rb"\0\0\x01\0", "ICO"),
        (rb"P[1-6]\s", "PNM"),
        (rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?<svg", "SVG"),
        (rb"....ftypcrx |FUJIFILMCCD-RAW|IIU\0|IIRO", "camera raw"),
    )
)

_BAND_PIXELS = 1 << 20

_PILLOW_LIMIT_LOCK = threading.Lock()
_WARNINGS_LOCK = threading.Lock()


class ImageError(ValueError):
    """These bytes give no picture.

    `reason` is a stable slug for tables (`empty`, `not-an-image`, `unsupported`, `needs-heif`,
    `too-large`, `truncated`, `corrupt`), the message is one line for people.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        # Ray pickles errors from worker to driver; the default would call ImageError(message).
        return ImageError, (self.reason, str(self))


@dataclass(frozen=True, slots=True)
class Photo:
    """A decoded photograph and what its file says about it.

    Attributes:
        pixels: [size, size, 3] uint8, RGB.
        width: of the original in pixels, EXIF orientation applied.
        height: likewise.
        format: Pillow's name of the file's format: "JPEG", "PNG", "HEIF" and so on.
        captured_at: by the camera's clock, which knows no time zone.
        latitude: degrees, north positive.
        longitude: degrees, east positive.
    """

    pixels: NDArray[np.uint8]
    width: int
    height: int
    format: str
    captured_at: datetime | None
    latitude: float | None
    longitude: float | None


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells a picture from others, whatever file it is stored in.

    Attributes:
        pixels_sha256: equal for two files exactly when all of their RGB pixels are.
        perceptual_hash: 64 bits unsigned; few bits differ between look-alikes.
        turned_hashes: the same of the picture flipped and turned, in the seven other ways.
        width: in pixels, EXIF orientation applied.
        height: likewise.
        format: as in `Photo`.
        note: what a person should know of pixels that are hardly those of a photograph.
    """

    pixels_sha256: str
    perceptual_hash: int
    turned_hashes: tuple[int, ...]
    width: int
    height: int
    format: str
    note: str | None = None


def decode(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> Photo:
    """The photograph in `data`, upright, stretched to a square.

    The aspect ratio is not kept: the article this grew from does the same, and nothing of the leaf
    is cropped. Large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size, at least `2 * size` on
    both sides: 4 times as fast at 12 megapixels, and 0.2 of 255 levels off on average. The resize
    is antialiased. A picture that is `size` x `size` already is not changed. Transparent parts
    become white, 16-bit channels keep their upper 8 bits, animations give their first frame, colour
    profiles are not applied.

    Memory: what the format's own decoder takes, and a few MB. Measured in bytes per pixel of the
    original: a JPEG 1 (progressive 6), PNG, TIFF, BMP and GIF at most 5, HEIC 8, AVIF 10, WebP 16.

    Args:
        data: an encoded image; its kind is told from the bytes.
        size: of the result's sides in pixels.
        max_pixels: more pixels than these in the header are refused before any is decoded.

    Returns:
        A `Photo` with pixels [size, size, 3] uint8.

    Raises:
        ImageError: for all that can be wrong with `data`.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, not {size}")
    with _opened(data, max_pixels, draft_to=2 * size) as picture:
        pixels = _shrink(picture, size)
        latitude, longitude = _position(picture.exif)
        return Photo(
            pixels=pixels,
            width=picture.width,
            height=picture.height,
            format=picture.format,
            captured_at=_captured_at(picture.exif),
            latitude=latitude,
            longitude=longitude,
        )


def fingerprint(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Fingerprint:
    """Hashes of the upright RGB picture in `data`, decoded in full.

    Memory: as `decode` and 1 byte per pixel more; a JPEG takes 6, a progressive one 10.

    Args:
        data: an encoded image; its kind is told from the bytes.
        max_pixels: more pixels than these in the header are refused before any is decoded.

    Returns:
        A `Fingerprint`: SHA-256 over width and height (uint32, little-endian) and the RGB bytes in
        rows, and the perceptual hash of ImageHash (`phash`, 8 x 8 bits) in eight symmetries.

    Raises:
        ImageError: as `decode`.
    """
    with _opened(data, max_pixels) as picture:
        sha256 = hashlib.sha256(struct.pack("<II", picture.width, picture.height))
        grey = Image.new("L", (picture.width, picture.height))
        for top, band in _bands(picture):
            sha256.update(band.tobytes())
            grey.paste(band.convert("L"), (0, top))
        upright, *turned = _perceptual_hashes(grey)
        return Fingerprint(
            pixels_sha256=sha256.hexdigest(),
            perceptual_hash=upright,
            turned_hashes=tuple(turned),
            note=_note(data, picture.image, grey),
            width=picture.width,
            height=picture.height,
            format=picture.format,
        )


def _note(data: bytes, image: Image.Image, grey: Image.Image) -> str | None:
    """What to tell of a picture whose pixels a person would not expect; `grey` is made of it."""
    tags: Any = getattr(image, "tag_v2", {})
    geographic = any(tag in tags for tag in (33550, 33922, 34264, 34735))
    if geographic and image.mode == "RGBA":
        return (
            "a GeoTIFF whose 4th band is tagged alpha, and so mixed with white; if it is near "
            "infrared, export red, green and blue alone"
        )
    of_16_bits = image.mode.startswith("I") or max(np.atleast_1d(tags.get(258, 8))) == 16
    of_16_bits |= data.startswith(b"\x89PNG") and data[24] == 16
    extrema: Any = grey.getextrema()
    if of_16_bits and extrema[1] < 16:
        return (
            "16-bit values below 4,096 come out nearly black; stretch 12-bit values to 16 bits, or "
            "export 8 bits"
        )
    return None


def _perceptual_hashes(grey: Image.Image) -> list[int]:
    """The hashes of a picture as it is, and flipped and turned in the seven other ways.

    ImageHash's `phash`: which of the 8 x 8 lowest frequencies of the cosine transform of 32 x 32
    pixels are above their median. Mirrored, each second one of them changes its sign; mirrored at
    the diagonal, they are transposed.
    """
    import scipy.fft  # takes a second, and only who prepares needs it

    pixels = np.asarray(grey.resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    low = scipy.fft.dct(scipy.fft.dct(pixels, axis=0), axis=1)[:8, :8]
    signs = np.where(np.arange(8) % 2, -1.0, 1.0)
    ways = np.stack(
        [
            of * down * across
            for of in (low, low.T)
            for down in (1.0, signs[:, None])
            for across in (1.0, signs[None, :])
        ]
    ).reshape(8, 64)
    above = ways > np.median(ways, axis=1, keepdims=True)
    return [int(value) for value in np.packbits(above, axis=1).view(">u8").ravel()]


class _Picture(NamedTuple):
    image: Image.Image  # loaded, as stored; a JPEG possibly at reduced size
    orientation: int  # EXIF's 1 to 8
    width: int  # of the original, upright
    height: int
    format: str
    exif: Image.Exif


@contextmanager
def _opened(data: bytes, max_pixels: int, *, draft_to: int | None = None) -> Iterator[_Picture]:
    """The loaded picture; whatever goes wrong with it, here or in the body, is an ImageError."""
    _quieten_pillow()
    _raise_pillow_limit(max_pixels)
    try:
        with _identify(data) as image:
            yield _load(image, max_pixels, draft_to)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        # Pillow's check, at twice its own limit, comes before ours can see the header.
        message = f"more than the {max_pixels:,} pixels that are allowed"
        raise ImageError("too-large", message) from error
    except MemoryError as error:
        raise ImageError("too-large", "there is not enough memory to decode it") from error
    except Exception as error:
        # As broad as can be: from damaged files Pillow and the C libraries below it raise OSError,
        # SyntaxError, ValueError, struct.error, zlib.error, EOFError, KeyError, OverflowError and
        # more, the list grows with each release, and one bad file must not end a night's scoring.
        raise _failure(data, error) from error


def _identify(data: bytes) -> Image.Image:
    """The image with its header read and no pixel decoded."""
    if not data:
        raise ImageError("empty", "the file has no bytes")
    kind = _kind(data)
    if kind is None:
        raise ImageError("not-an-image", f"not a picture: the file starts with {data[:12]!r}")
    if kind not in _FORMATS:
        message = f"{kind} files are not read here; convert it to JPEG or PNG"
        raise ImageError("unsupported", message)
    # AVIF shares a brand with HEIF, and passes on what it cannot read.
    formats = [
        name for name in (("AVIF", "HEIF") if kind == "HEIF" else (kind,)) if _readable(name)
    ]
    if kind == "PNG":
        data = headers.without_large_texts(data)
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        if kind == "TIFF" and (what := headers.what_tiff(data)):
            raise ImageError("unsupported", what) from error
        if kind == "HEIF" and "HEIF" not in formats:
            message = 'HEIC pictures need another package: pip install "leafnet[heif]"'
            raise ImageError("needs-heif", message) from error
        if kind not in formats:
            message = f"this Pillow is built without {kind}; convert it to JPEG"
            raise ImageError("unsupported", message) from error
        raise


def _load(image: Image.Image, max_pixels: int, draft_to: int | None) -> _Picture:
    width, height = image.size
    if width * height > max_pixels:
        message = (
            f"{width:,} x {height:,} = {width * height:,} pixels, "
            f"more than the {max_pixels:,} that are allowed"
        )
        raise ImageError("too-large", message)
    file_format = image.format or "unknown"
    if file_format == "MPO":
        file_format = "JPEG"  # several JPEGs in one file; phones append a depth or gain map
    if file_format == "TIFF" and _is_raw(image):
        raise ImageError("unsupported", "a camera raw file; convert it to JPEG or TIFF")
    if file_format == "JPEG" and draft_to is not None:
        image.draft(None, (draft_to, draft_to))
        image.load()
    else:
        image.load()
        width, height = image.size  # Pillow turns TIFFs upright while it loads them
    exif = _exif(image)
    orientation = exif.get(ExifTags.Base.Orientation)
    if not isinstance(orientation, int) or not 1 <= orientation <= 8:
        orientation = 1
    if orientation >= 5:
        width, height = height, width
    return _Picture(image, orientation, width, height, file_format, exif)


def _shrink(picture: _Picture, size: int) -> NDArray[np.uint8]:
    """The upright picture stretched to [size, size, 3] uint8.

    A box filter by whole factors first and a triangle filter over at least two pixels for the rest:
    Pillow's `resize(..., reducing_gap=2)`, in bands, so that the picture never stands in memory a
    second time as RGB.
    """
    width, height = _upright_size(picture)
    factor_x, factor_y = max(1, width // (2 * size)), max(1, height // (2 * size))
    reduced = Image.new("RGB", (-(-width // factor_x), -(-height // factor_y)))
    for top, band in _bands(picture, multiple_of=factor_y):
        small = band.reduce((factor_x, factor_y)) if factor_x * factor_y > 1 else band
        reduced.paste(small, (0, top // factor_y))
    box = (0.0, 0.0, width / factor_x, height / factor_y)
    stretched = reduced.resize((size, size), Image.Resampling.BILINEAR, box)
    return np.array(stretched, dtype=np.uint8)


def _upright_size(picture: _Picture) -> tuple[int, int]:
    """Width and height of the loaded image when upright; below the original's after a draft."""
    width, height = picture.image.size
    return (height, width) if picture.orientation >= 5 else (width, height)


# EXIF 2.32, tag 0x0112: what is to be done to the stored picture.
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _bands(picture: _Picture, multiple_of: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """The upright picture as RGB in bands of about a million pixels, with their first rows."""
    width, height = _upright_size(picture)
    rows = max(1, _BAND_PIXELS // width // multiple_of) * multiple_of
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        # Upright rows are stored columns from 5 on, and run backwards in 3, 4, 7 and 8.
        first, last = (top, bottom)
        if picture.orientation in (3, 4, 7, 8):
            first, last = height - bottom, height - top
        stored = (first, 0, last, width) if picture.orientation >= 5 else (0, first, width, last)
        band = _to_rgb(picture.image.crop(stored))
        if picture.orientation != 1:
            band = band.transpose(_TRANSPOSE[picture.orientation])
        yield top, band


def _to_rgb(image: Image.Image) -> Image.Image:
    """`image` of any mode as RGB, over white where it is transparent."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _wide_grey_to_rgb(image)
    if image.mode in ("F", "LAB"):
        what = {"F": "floating-point", "LAB": "Lab"}[image.mode]
        message = f"{what} pixels have no agreed black and white; convert it to 8-bit RGB"
        raise ImageError("unsupported", message)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _wide_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Upper 8 of the 16 bits: Pillow's own conversion clips at 255 instead, and gives white."""
    values = np.asarray(image)
    if values.dtype.itemsize > 2 and (values.min() < 0 or values.max() > 0xFFFF):
        message = "32-bit whole numbers have no agreed black and white; convert it to 8-bit RGB"
        raise ImageError("unsupported", message)
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _is_raw(image: Image.Image) -> bool:
    """Whether a TIFF is a camera raw file, of which Pillow would decode the thumbnail."""
    tags: Any = getattr(image, "tag_v2", {})
    dng_version, new_subfile_type, reduced_resolution = 50706, 254, 1
    subfile_type = tags.get(new_subfile_type, 0)
    is_thumbnail = isinstance(subfile_type, int) and bool(subfile_type & reduced_resolution)
    return dng_version in tags or is_thumbnail


def _exif(image: Image.Image) -> Image.Exif:
    """The picture's EXIF; none when it is broken, since the pixels need not be."""
    try:
        return image.getexif()
    except Exception:  # as broad as in _opened, for the same reason
        return Image.Exif()


def _directory(exif: Image.Exif, tag: ExifTags.IFD) -> dict[int, Any]:
    try:
        return exif.get_ifd(tag)
    except Exception:  # as broad as in _opened, for the same reason
        return {}


def _captured_at(exif: Image.Exif) -> datetime | None:
    of_camera = _directory(exif, ExifTags.IFD.Exif)
    # The last is that of the latest edit.
    for text in (
        of_camera.get(ExifTags.Base.DateTimeOriginal),
        of_camera.get(ExifTags.Base.DateTimeDigitized),
        exif.get(ExifTags.Base.DateTime),
    ):
        try:
            return datetime.strptime(str(text)[:19], "%Y:%m:%d %H:%M:%S")
        except ValueError:  # also 0000:00:00, from cameras whose clock was never set
            continue
    return None


def _position(exif: Image.Exif) -> tuple[float, float] | tuple[None, None]:
    """Latitude and longitude in degrees, or neither: one alone is no place."""
    gps = _directory(exif, ExifTags.IFD.GPSInfo)
    latitude = _degrees(
        gps.get(ExifTags.GPS.GPSLatitude), gps.get(ExifTags.GPS.GPSLatitudeRef), "NS"
    )
    longitude = _degrees(
        gps.get(ExifTags.GPS.GPSLongitude), gps.get(ExifTags.GPS.GPSLongitudeRef), "EW"
    )
    if latitude is None or longitude is None or abs(latitude) > 90 or abs(longitude) > 180:
        return None, None
    if latitude == 0 and longitude == 0:  # what is written without a fix; it lies in the Atlantic
        return None, None
    return latitude, longitude


def _degrees(parts: object, reference: object, signs: str) -> float | None:
    """Degrees from (degrees, minutes, seconds) and one of two letters, the second negative.

    >>> _degrees((52, 30, 36), "S", "NS")
    -52.51
    >>> _degrees((52, 30, float("nan")), "S", "NS") is None
    True
    """
    try:
        degrees, minutes, seconds = (float(part) for part in parts)  # type: ignore[attr-defined]
        sign = {signs[0]: 1, signs[1]: -1}[str(reference).strip("\0 ").upper()]
    except (TypeError, ValueError, KeyError, ArithmeticError):
        return None
    value = degrees + minutes / 60 + seconds / 3600
    if not math.isfinite(value) or min(degrees, minutes, seconds) < 0:
        return None
    return sign * value


def _kind(data: bytes) -> str | None:
    """The kind that the first bytes stand for; None for what is no picture."""
    return next((kind for pattern, kind in _SIGNATURES if pattern.match(data[:1024])), None)


def _failure(data: bytes, error: Exception) -> ImageError:
    """`truncated` if the file's end is missing or the decoder ran out of bytes, else `corrupt`."""
    kind = _kind(data) or "picture"
    ran_out = re.search(r"truncat|not processed|end of (file|data)|EOF", str(error), re.IGNORECASE)
    if ran_out or isinstance(error, EOFError) or _is_cut_off(data, kind):
        message = f"the {kind} file is cut off after {len(data):,} bytes: {_one_line(error)}"
        return ImageError("truncated", message)
    return ImageError("corrupt", f"the {kind} file is damaged: {_one_line(error)}")


def _is_cut_off(data: bytes, kind: str) -> bool:
    """Whether the end is missing, as far as the format says where that is."""
    if kind == "JPEG":
        start_of_scan, end_of_image = b"\xff\xda", b"\xff\xd9"
        return start_of_scan not in data or data.rfind(end_of_image) < data.rfind(start_of_scan)
    if kind == "PNG":
        return b"IEND" not in data
    if kind == "GIF":
        return not data.endswith(b";")
    if kind == "WEBP":
        return 8 + int.from_bytes(data[4:8], "little") > len(data)
    if kind == "BMP":
        return int.from_bytes(data[2:6], "little") > len(data)
    if kind in ("AVIF", "HEIF"):
        end = 0
        while end + 8 <= len(data):
            length = int.from_bytes(data[end : end + 4], "big")
            if length < 8:  # to the end of the file, or of 64 bits
                return False
            end += length
        return end != len(data)
    return False


def _one_line(error: BaseException) -> str:
    """What Pillow says, fit for a table."""
    if isinstance(error, UnidentifiedImageError):  # its own text holds a memory address
        return "its header cannot be read"
    return " ".join(str(error).split())[:200] or type(error).__name__


@functools.cache
def _readable(kind: str) -> bool:
    """Whether this Pillow, with pillow-heif for HEIF, can read `kind`."""
    if kind != "HEIF":
        Image.init()
        return kind in Image.OPEN
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def _raise_pillow_limit(max_pixels: int) -> None:
    """Let Pillow open what `max_pixels` allows: it refuses at twice its limit, for the process.

    Pillow's limit is one number for all threads, so it is only ever raised, and only for a caller
    who asks for more than 178 million pixels.
    """
    with _PILLOW_LIMIT_LOCK:
        if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = max_pixels


_PILLOW_WARNINGS = re.compile(r"PIL\.")


def _quieten_pillow() -> None:
    """Silence Pillow's warnings (large picture, broken EXIF, odd palette) in this process.

    We judge pictures ourselves, and such a warning says neither which file nor what to do.
    """
    # warnings.catch_warnings swaps the list that all threads share (until Python 3.14), so one
    # thread leaving it undoes another's. A filter that is put in front and stays cannot be undone
    # that way; it is looked for each time because a caller's catch_warnings may have dropped it.
    with _WARNINGS_LOCK:
        if not warnings.filters or warnings.filters[0][3] != _PILLOW_WARNINGS:
            warnings.filterwarnings("ignore", module=_PILLOW_WARNINGS.pattern)
