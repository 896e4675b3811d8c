"""Bytes to pixels: kinds, modes, orientation, EXIF, refusals, and what random damage does."""

import functools
import hashlib
import io
import pickle
import resource
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import imagehash
import numpy as np
import pillow_heif
import pytest
import scipy.fft
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import IFDRational, ImageFileDirectory_v2

from leafnet.data import images
from leafnet.data.images import ImageError, decode, fingerprint

Pixels = NDArray[np.uint8]

pillow_heif.register_heif_opener()  # to write HEIC here; leafnet registers it by itself


def encode(picture: Image.Image | NDArray[Any], kind: str, **options: Any) -> bytes:
    """`picture` as a file of `kind`."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def photograph(height: int, width: int, seed: int = 0) -> Pixels:
    """[height, width, 3] uint8: blotches of many sizes, as in a photograph, and a little noise."""
    draw = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128, np.float32)
    for octave in range(1, 7):
        for channel in range(3):
            coarse = draw.normal(0, 60 / octave, (3 * 2**octave, 4 * 2**octave)).astype(np.float32)
            fine = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(fine)
    total += draw.normal(0, 2, (height, width, 1)).astype(np.float32)
    return total.clip(0, 255).astype(np.uint8)


def far(first: Pixels, second: Pixels) -> float:
    """Mean absolute difference in levels of 255."""
    return float(np.abs(first.astype(int) - second.astype(int)).mean())


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *chunks: bytes, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG of that header and `chunks`, whether they fit it or not."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def reason_of(data: bytes, **options: int) -> str:
    """Why `decode` and `fingerprint` refuse `data`; they agree."""
    with pytest.raises(ImageError) as caught:
        decode(data, 16, **options)
    with pytest.raises(ImageError) as again:
        fingerprint(data, **options)
    assert again.value.reason == caught.value.reason
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value.reason


LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {"compression": "tiff_lzw"},
    "BMP": {},
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_picture_of_the_right_size_is_not_changed(kind: str) -> None:
    pixels = photograph(64, 64)
    photo = decode(encode(pixels, kind, **LOSSLESS[kind]), 64)
    np.testing.assert_array_equal(photo.pixels, pixels)
    assert (photo.width, photo.height, photo.format) == (64, 64, kind)
    assert photo.pixels.dtype == np.uint8
    assert photo.pixels.flags.writeable


def test_a_jpeg_of_the_right_size_is_what_pillow_decodes() -> None:
    data = encode(photograph(64, 64), "JPEG")
    np.testing.assert_array_equal(decode(data, 64).pixels, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("JPEG", 5), ("GIF", 12), ("HEIF", 5), ("AVIF", 5)]
)
def test_lossy_kinds_come_close(kind: str, tolerance: float) -> None:
    pixels = photograph(96, 128)
    photo = decode(encode(pixels, kind), 32)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    assert far(photo.pixels, expected) < tolerance
    assert (photo.width, photo.height, photo.format) == (128, 96, kind)


def test_the_whole_picture_is_stretched_and_not_cropped() -> None:
    pixels = np.zeros((40, 400, 3), np.uint8)
    pixels[:, :200] = (200, 0, 0)
    pixels[20:, 200:] = (0, 0, 200)
    small = decode(encode(pixels, "PNG"), 20).pixels
    np.testing.assert_array_equal(small[:, :9], np.broadcast_to((200, 0, 0), (20, 9, 3)))
    np.testing.assert_array_equal(small[:9, 11:], np.zeros((9, 9, 3)))
    np.testing.assert_array_equal(small[11:, 11:], np.broadcast_to((0, 0, 200), (9, 9, 3)))


def test_the_resize_is_antialiased() -> None:
    checks = np.indices((512, 512)).sum(0) % 2 * 255
    small = decode(encode(np.stack([checks] * 3, -1).astype(np.uint8), "PNG"), 32).pixels
    assert abs(small.astype(int) - 127.5).max() <= 2


@pytest.mark.parametrize("size", [8, 200])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (17, 23), (333, 1001)])
def test_small_narrow_and_odd_sizes(height: int, width: int, size: int) -> None:
    pixels = photograph(height, width)
    photo = decode(encode(pixels, "PNG"), size)
    expected = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
    assert photo.pixels.shape == (size, size, 3)
    assert far(photo.pixels, np.asarray(expected)) < 2.5
    assert (photo.width, photo.height) == (width, height)


def test_the_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1 pixel, not 0"):
        decode(b"", 0)


@pytest.fixture(scope="module")
def large_jpeg() -> bytes:
    small = Image.fromarray(photograph(750, 1000))
    return encode(small.resize((4000, 3000), Image.Resampling.BICUBIC), "JPEG", quality=92)


def test_reduced_decoding_is_close_to_full_decoding(large_jpeg: bytes) -> None:
    full = Image.open(io.BytesIO(large_jpeg)).convert("RGB")
    expected = np.asarray(full.resize((256, 256), Image.Resampling.BILINEAR))
    photo = decode(large_jpeg, 256)
    assert far(photo.pixels, expected) < 0.5
    assert (photo.width, photo.height) == (4000, 3000)


def test_reduced_decoding_keeps_both_sides_twice_the_target(
    monkeypatch: pytest.MonkeyPatch, large_jpeg: bytes
) -> None:
    loaded = []
    shrink = images._shrink

    def record(picture: images._Picture, size: int) -> Pixels:
        loaded.append(picture.image.size)
        return shrink(picture, size)

    monkeypatch.setattr(images, "_shrink", record)
    for size in (100, 256, 375, 376, 751):
        decode(large_jpeg, size)
    assert loaded == [(500, 375), (1000, 750), (1000, 750), (2000, 1500), (4000, 3000)]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_cut_jpeg_is_refused_at_reduced_size_too(large_jpeg: bytes, share: float) -> None:
    with pytest.raises(ImageError, match="the JPEG file is cut off") as caught:
        decode(large_jpeg[: int(len(large_jpeg) * share)], 64)
    assert caught.value.reason == "truncated"


def test_bands_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(photograph(301, 203), "PNG", exif=orientation_tag(7))
    whole = decode(data, 20), fingerprint(data)
    monkeypatch.setattr(images, "_BAND_PIXELS", 2000)
    np.testing.assert_array_equal(decode(data, 20).pixels, whole[0].pixels)
    assert fingerprint(data) == whole[1]


# --- modes


def test_cmyk_jpeg_is_read_as_adobe_writes_it() -> None:
    ink = np.zeros((32, 32, 4), np.uint8)
    ink[:, :] = (0, 255, 255, 0)  # no cyan, full magenta and yellow: red
    data = encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    np.testing.assert_allclose(decode(data, 32).pixels.mean((0, 1)), (255, 0, 0), atol=3)


def test_cmyk_jpeg_at_reduced_size() -> None:
    image = Image.fromarray(photograph(640, 640)).convert("CMYK")
    data = encode(image, "JPEG", quality=95)
    expected = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
    assert far(decode(data, 32).pixels, expected) < 2


def test_grey_and_one_bit() -> None:
    grey = photograph(32, 32)[..., 0]
    expected = np.stack([grey] * 3, -1)
    np.testing.assert_array_equal(decode(encode(grey, "PNG"), 32).pixels, expected)
    bits = Image.fromarray(grey).point(lambda level: 255 * (level > 128), "1")
    expected = np.stack([np.asarray(bits, np.uint8) * 255] * 3, -1)
    np.testing.assert_array_equal(decode(encode(bits, "PNG"), 32).pixels, expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM of mode I"])
def test_16_bit_grey_keeps_the_upper_8_bits(kind: str) -> None:
    wide = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    if kind in LOSSLESS:
        data = encode(Image.fromarray(wide), kind)
    else:
        data = encode(Image.fromarray(wide.astype(np.int32)), "TIFF")
    expected = np.stack([(wide >> 8).astype(np.uint8)] * 3, -1)
    np.testing.assert_array_equal(decode(data, 32).pixels, expected)


def test_16_bit_grey_with_a_transparent_level() -> None:
    rows = b"".join(b"\0" + struct.pack(">2H", 300, 40_000) for _ in range(2))
    data = png(
        2,
        2,
        png_chunk(b"tRNS", struct.pack(">H", 300)),
        png_chunk(b"IDAT", zlib.compress(rows)),
        bits=16,
        colour=0,
    )
    assert decode(data, 2).pixels[0].tolist() == [[255] * 3, [40_000 >> 8] * 3]


def test_16_bit_rgb_png_keeps_the_upper_8_bits() -> None:
    wide = np.random.default_rng(0).integers(0, 65536, (8, 8, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    data = png(8, 8, png_chunk(b"IDAT", zlib.compress(rows)), bits=16)
    np.testing.assert_array_equal(decode(data, 8).pixels, wide >> 8)


def test_palette() -> None:
    image = Image.fromarray(photograph(32, 32)).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        np.testing.assert_array_equal(decode(encode(image, kind), 32).pixels, expected)


def half_transparent(mode: str) -> bytes:
    """Left half transparent, right half opaque black, as a PNG."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    image.paste((90, 90, 90, 0), (0, 0, 16, 32))
    if mode == "P":
        image = image.quantize(2)
    elif mode == "P, one index":
        image = Image.new("P", (32, 32), 1)
        image.putpalette([90, 90, 90, 0, 0, 0])
        image.paste(0, (0, 0, 16, 32))
        return encode(image, "PNG", transparency=0)
    elif mode in ("L", "RGB"):
        colour = image.convert(mode)
        return encode(colour, "PNG", transparency=90 if mode == "L" else (90, 90, 90))
    else:
        image = image.convert(mode)
    return encode(image, "PNG")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P, one index", "L", "RGB"])
def test_transparent_parts_become_white(mode: str) -> None:
    pixels = decode(half_transparent(mode), 32).pixels
    assert pixels[:, :16].min() == 255
    assert pixels[:, 16:].max() == 0


def test_half_transparent_is_half_white() -> None:
    image = Image.new("RGBA", (16, 16), (0, 100, 200, 128))
    pixels = decode(encode(image, "WEBP", lossless=True), 16).pixels
    np.testing.assert_allclose(pixels.mean((0, 1)), (127, 177, 227), atol=1)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_animations_give_their_first_frame(kind: str) -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    first, *rest = [Image.new("RGB", (24, 24), colour) for colour in colours]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(first, kind, save_all=True, append_images=rest, **options)
    np.testing.assert_allclose(decode(data, 24).pixels.mean((0, 1)), colours[0], atol=3)


def test_a_phone_s_file_of_two_jpegs_is_a_jpeg() -> None:
    first, second = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (32, 32), "blue")
    photo = decode(encode(first, "MPO", save_all=True, append_images=[second]), 8)
    assert (photo.format, photo.width) == ("JPEG", 64)
    assert photo.pixels[0, 0, 0] > 250


# --- EXIF


def orientation_tag(orientation: object) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


# What a camera held that way stores: the inverse of what EXIF says is to be done.
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation(orientation: int, kind: str) -> None:
    upright = photograph(90, 130)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    data = encode(stored, kind, exif=orientation_tag(orientation), **LOSSLESS[kind])
    plain = encode(upright, "PNG")
    photo = decode(data, 40)
    assert (photo.width, photo.height) == (130, 90)
    np.testing.assert_array_equal(photo.pixels, decode(plain, 40).pixels)
    turned, expected = fingerprint(data), fingerprint(plain)
    assert turned.pixels_sha256 == expected.pixels_sha256
    assert turned.perceptual_hash == expected.perceptual_hash
    assert (turned.width, turned.height) == (130, 90)


@pytest.mark.parametrize("orientation", STORED)
def test_orientation_with_reduced_decoding(orientation: int) -> None:
    upright = photograph(600, 800)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    data = encode(stored, "JPEG", quality=95, exif=orientation_tag(orientation))
    photo = decode(data, 64)
    assert (photo.width, photo.height) == (800, 600)
    assert far(photo.pixels, decode(encode(upright, "PNG"), 64).pixels) < 1


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_orientation_that_the_format_keeps_itself(kind: str) -> None:
    upright = photograph(96, 128)
    stored = np.ascontiguousarray(STORED[6](upright))
    photo = decode(encode(stored, kind, quality=90, exif=orientation_tag(6).tobytes()), 32)
    assert (photo.width, photo.height) == (128, 96)
    assert far(photo.pixels, decode(encode(upright, "PNG"), 32).pixels) < 4


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(orientation: int) -> None:
    pixels = photograph(16, 16)
    data = encode(pixels, "PNG", exif=orientation_tag(orientation))
    np.testing.assert_array_equal(decode(data, 16).pixels, pixels)


def with_exif(
    position: dict[int, Any] | None = None, original: object = None, changed: object = None
) -> bytes:
    exif = Image.Exif()
    if changed is not None:
        exif[ExifTags.Base.DateTime] = changed
    if original is not None:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = original
    if position is not None:
        exif.get_ifd(ExifTags.IFD.GPSInfo).update(position)
    return encode(photograph(16, 16), "JPEG", exif=exif)


def place(
    north: object = (52.0, 30.0, 36.0),
    east: object = (13.0, 15.0, 0.0),
    north_ref: object = "N",
    east_ref: object = "E",
) -> dict[int, Any]:
    gps = ExifTags.GPS
    tags = {
        gps.GPSLatitudeRef: north_ref,
        gps.GPSLatitude: north,
        gps.GPSLongitudeRef: east_ref,
        gps.GPSLongitude: east,
    }
    return {int(tag): value for tag, value in tags.items() if value is not None}


@pytest.mark.parametrize(
    ("refs", "expected"),
    [
        (("N", "E"), (52.51, 13.25)),
        (("S", "E"), (-52.51, 13.25)),
        (("N", "W"), (52.51, -13.25)),
        (("s", "w"), (-52.51, -13.25)),
    ],
)
def test_position(refs: tuple[str, str], expected: tuple[float, float]) -> None:
    photo = decode(with_exif(place(north_ref=refs[0], east_ref=refs[1])), 16)
    assert (photo.latitude, photo.longitude) == pytest.approx(expected)


@pytest.mark.parametrize(
    "position",
    [
        None,
        {},
        place(north=None),
        place(east_ref=None),
        place(north_ref="Q"),
        place(north=(91.0, 0.0, 0.0)),
        place(east=(180.0, 1.0, 0.0)),
        place(north=(52.0, 30.0)),
        place(north=(IFDRational(52, 0), IFDRational(0, 0), IFDRational(0, 0))),
        place(north=(0.0, 0.0, 0.0), east=(0.0, 0.0, 0.0)),
    ],
)
def test_no_position_or_a_nonsense_one(position: dict[int, Any] | None) -> None:
    photo = decode(with_exif(position), 16)
    assert (photo.latitude, photo.longitude) == (None, None)


NOON, LATER = datetime(2024, 6, 1, 12, 0, 1), datetime(2025, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("original", "changed", "expected"),
    [
        ("2024:06:01 12:00:01", "2025:01:02 03:04:05", NOON),
        (None, "2025:01:02 03:04:05", LATER),
        ("0000:00:00 00:00:00", "2025:01:02 03:04:05", LATER),
        ("    :  :     :  :  ", None, None),
        ("yesterday", "2025:13:02 03:04:05", None),
        (None, None, None),
    ],
)
def test_capture_time(original: object, changed: object, expected: datetime | None) -> None:
    assert decode(with_exif(original=original, changed=changed), 16).captured_at == expected


def test_exif_is_read_from_heic_too() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.DateTime] = "2024:06:01 12:00:01"
    exif.get_ifd(ExifTags.IFD.GPSInfo).update(place())
    photo = decode(encode(photograph(64, 64), "HEIF", exif=exif.tobytes()), 16)
    assert photo.captured_at == NOON
    assert photo.latitude == pytest.approx(52.51)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0junk" * 20, b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_broken_exif_does_not_cost_the_picture(exif: bytes) -> None:
    pixels = photograph(16, 16)
    for kind in ("JPEG", "PNG", "WEBP"):
        plain = decode(encode(pixels, kind), 16)
        photo = decode(encode(pixels, kind, exif=exif), 16)
        np.testing.assert_array_equal(photo.pixels, plain.pixels)
        assert (photo.captured_at, photo.latitude) == (None, None)


# --- refusals


def tiff_with(tag: int, value: object) -> bytes:
    tags = ImageFileDirectory_v2()
    tags[tag] = value
    return encode(photograph(16, 16), "TIFF", tiffinfo=tags)


def jpeg_without_tables() -> bytes:
    data = encode(photograph(64, 64), "JPEG")
    return data.replace(b"\xff\xdb", b"\xff\xfe")  # quantization tables become comments


def a_third_off(kind: str, **options: Any) -> bytes:
    data = encode(photograph(64, 64), kind, **options)
    return data[: len(data) * 2 // 3]


NOISE = np.random.default_rng(5).bytes(2000)
ROWS = zlib.compress(bytes(16 * 49))  # of a black 16 x 16 RGB picture
HEIC_START = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
BAD_FILES: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "empty"),
    ("text named .jpg", b"This is not a photograph.\n" * 20, "not-an-image"),
    ("text like a BMP", b"BMW sells cars, not leaves, as everybody knows", "not-an-image"),
    ("web page", b"<!DOCTYPE html><html><body>404</body></html>", "not-an-image"),
    ("json", b'{"error": "access denied"}', "not-an-image"),
    ("zip", b"PK\3\4" + NOISE, "not-an-image"),
    ("zeros", bytes(5000), "not-an-image"),
    ("noise", NOISE, "not-an-image"),
    ("one byte", b"\xff", "not-an-image"),
    ("film", b"\0\0\0\x18ftypmp42" + NOISE, "not-an-image"),
    ("sound", b"RIFF\0\1\0\0WAVEfmt " + NOISE, "not-an-image"),
    ("JPEG cut", a_third_off("JPEG"), "truncated"),
    ("JPEG progressive cut", a_third_off("JPEG", progressive=True), "truncated"),
    ("JPEG cut in the header", encode(photograph(64, 64), "JPEG")[:100], "truncated"),
    ("JPEG start", b"\xff\xd8\xff", "truncated"),
    ("JPEG without tables", jpeg_without_tables(), "corrupt"),
    ("JPEG without a picture", b"\xff\xd8\xff\xdb" + NOISE + b"\xff\xd9", "truncated"),
    ("PNG cut", a_third_off("PNG"), "truncated"),
    ("PNG cut in the header", encode(photograph(64, 64), "PNG")[:20], "truncated"),
    ("PNG of no width", png(0, 16, png_chunk(b"IDAT", ROWS)), "corrupt"),
    ("PNG without data", png(16, 16), "corrupt"),
    ("PNG with noise for data", png(16, 16, png_chunk(b"IDAT", NOISE)), "corrupt"),
    ("PNG of an odd type", png(16, 16, png_chunk(b"IDAT", ROWS), colour=5), "corrupt"),
    (
        "PNG with a wrong checksum",
        png(16, 16, png_chunk(b"IDAT", ROWS)).replace(b"IHDR\0\0\0\x10", b"IHDR\0\0\0\x11"),
        "corrupt",
    ),
    (
        "PNG with a text bomb",
        png(16, 16, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000)))),
        "corrupt",
    ),
    ("GIF cut", a_third_off("GIF"), "truncated"),
    ("GIF header", encode(photograph(16, 16), "GIF")[:13], "truncated"),
    ("WebP cut", a_third_off("WEBP"), "truncated"),
    ("WebP lossless cut", a_third_off("WEBP", lossless=True), "truncated"),
    ("WebP of noise", b"RIFF" + struct.pack("<I", 2004) + b"WEBP" + NOISE, "corrupt"),
    ("BMP cut", a_third_off("BMP"), "truncated"),
    ("TIFF cut", a_third_off("TIFF"), "truncated"),
    ("TIFF of noise", b"II*\0\x08\0\0\0" + NOISE, "corrupt"),
    ("AVIF cut", a_third_off("AVIF"), "truncated"),
    ("HEIC cut", a_third_off("HEIF"), "truncated"),
    ("HEIC of noise", HEIC_START + struct.pack(">I", 2008) + b"meta" + NOISE, "corrupt"),
    ("float TIFF", encode(np.ones((8, 8), np.float32), "TIFF"), "unsupported"),
    ("32-bit TIFF", encode(np.full((8, 8), 70_000, np.int32), "TIFF"), "unsupported"),
    ("Lab TIFF", encode(Image.new("LAB", (8, 8)), "TIFF"), "unsupported"),
    ("DNG", tiff_with(50706, b"\1\4\0\0"), "unsupported"),
    ("raw with a thumbnail first", tiff_with(254, 1), "unsupported"),
    ("camera raw", b"\0\0\0\x18ftypcrx " + NOISE, "unsupported"),
    ("JPEG 2000", encode(photograph(16, 16), "JPEG2000"), "unsupported"),
    ("JPEG XL", b"\xff\x0a" + NOISE, "unsupported"),
    ("PostScript", encode(photograph(16, 16), "EPS"), "unsupported"),
    ("PDF", encode(photograph(16, 16), "PDF"), "unsupported"),
    ("Photoshop", b"8BPS\0\1" + NOISE, "unsupported"),
    ("icon", encode(photograph(16, 16), "ICO"), "unsupported"),
    ("PNM", encode(photograph(16, 16), "PPM"), "unsupported"),
    ("SVG", b'<?xml version="1.0"?>\n<!-- a leaf -->\n<svg width="9"></svg>', "unsupported"),
]


@pytest.mark.parametrize(
    ("data", "reason"), [pytest.param(*bad, id=name) for name, *bad in BAD_FILES]
)
def test_bad_files(data: bytes, reason: str) -> None:
    assert reason_of(data) == reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF"])
def test_a_picture_over_the_limit_is_refused_and_one_at_the_limit_is_not(kind: str) -> None:
    data = encode(photograph(96, 128), kind)
    assert decode(data, 16, max_pixels=96 * 128).width == 128
    with pytest.raises(
        ImageError, match="128 x 96 = 12,288 pixels, more than the 12,287"
    ) as caught:
        decode(data, 16, max_pixels=96 * 128 - 1)
    assert caught.value.reason == "too-large"


# As its own process, so that the peak is not hidden under that of other tests.
MEASURE_BOMB = """
import resource, sys, time
from leafnet.data.images import ImageError
from leafnet.data.images import decode
import sys
import time
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
try:
    decode(data, 256)
except ImageError as error:
    seconds = time.perf_counter() - start
    print(error.reason, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, seconds)
"""


@pytest.mark.parametrize(("width", "height"), [(40_000, 40_000), (12_000, 10_001)])
def test_a_bomb_is_refused_quickly_and_in_little_memory(width: int, height: int) -> None:
    """Beyond Pillow's own limit, and between that and ours; each row says it is all there."""
    packer = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    data = png(width, height, png_chunk(b"IDAT", packed), bits=1, colour=0)
    assert len(data) < 250_000
    run = subprocess.run(
        [sys.executable, "-c", MEASURE_BOMB], input=data, capture_output=True, check=True
    )
    reason, kilobytes, seconds = run.stdout.split()
    assert reason == b"too-large"
    assert int(kilobytes) < 60_000  # all of Pillow's plugins and pillow-heif are most of it
    assert float(seconds) < 3
    assert run.stderr == b""


def test_our_limit_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode(encode(photograph(96, 128), "PNG"), 16).width == 128


def test_heic_without_pillow_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(photograph(64, 64), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # import raises ImportError
    images._readable.cache_clear()
    try:
        for brand in (b"heic", b"mif1", b"heix"):
            with pytest.raises(ImageError, match=r'pip install "leafnet\[heif\]"') as caught:
                decode(data[:8] + brand + data[12:], 16)
            assert caught.value.reason == "needs-heif"
        decode(encode(photograph(64, 64), "AVIF"), 16)
    finally:
        images._readable.cache_clear()


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_the_brand_that_heic_and_avif_share(kind: str) -> None:
    data = encode(photograph(64, 64), kind)
    assert decode(data[:8] + b"mif1" + data[12:], 16).format == kind


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("corrupt", "broken")))
    assert (type(error), error.reason, str(error)) == (ImageError, "corrupt", "broken")


def test_an_error_of_an_unforeseen_kind_becomes_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(photograph(16, 16), "PNG")
    for raised, reason in [(KeyError("x"), "corrupt"), (MemoryError(), "too-large")]:

        def fail(*_: object, error: Exception = raised) -> None:
            raise error

        monkeypatch.setattr(images, "_to_rgb", fail)
        assert reason_of(data) == reason


def test_truncated_pictures_are_never_completed() -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


# --- warnings and threads

WARNS = [  # EXIF cut off, palette with a table of transparencies
    encode(photograph(16, 16), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\0" + NOISE[:40]),
    half_transparent("P"),
]


def test_no_warning_gets_out_whatever_the_caller_s_filters_are() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            Image.open(io.BytesIO(WARNS[0])).getexif()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        for data in WARNS:
            decode(data, 16)
            fingerprint(data)
    assert caught == []


def test_a_large_header_does_not_warn() -> None:
    data = png(10_000, 10_000, png_chunk(b"IDAT", ROWS))  # above Pillow's warning, below our limit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as caught:
            decode(data, 16)
    assert caught.value.reason == "truncated"


def test_many_threads_give_what_one_gives() -> None:
    files = [
        *WARNS,
        encode(photograph(300, 400), "JPEG", exif=orientation_tag(6)),
        encode(photograph(300, 400), "PNG"),
        encode(photograph(96, 128), "HEIF"),
        half_transparent("RGBA"),
    ]
    expected = [decode(data, 48).pixels for data in files]
    before = threading.active_count()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda data: decode(data, 48).pixels, files * 20))
    for number, pixels in enumerate(results):
        np.testing.assert_array_equal(pixels, expected[number % len(files)])
    assert threading.active_count() == before


def test_importing_it_brings_in_no_framework() -> None:
    program = "import sys, leafnet.data.images; print([m for m in sys.modules if m in sys.argv])"
    names = ["tensorflow", "keras", "ray", "cv2", "pillow_heif", "scipy"]
    run = subprocess.run(
        [sys.executable, "-c", program, *names], capture_output=True, check=True, text=True
    )
    assert run.stdout.strip() == "[]"


# --- fingerprint


def test_fingerprint_is_of_the_pixels_and_not_of_the_file() -> None:
    pixels = photograph(64, 80)
    prints = {
        kind: fingerprint(encode(pixels, kind, **options)) for kind, options in LOSSLESS.items()
    }
    expected = hashlib.sha256(struct.pack("<II", 80, 64) + pixels.tobytes()).hexdigest()
    assert {found.pixels_sha256 for found in prints.values()} == {expected}
    assert len({found.perceptual_hash for found in prints.values()}) == 1
    assert [found.format for found in prints.values()] == list(LOSSLESS)
    assert (prints["PNG"].width, prints["PNG"].height) == (80, 64)


def test_fingerprint_tells_shapes_apart() -> None:
    black = [
        fingerprint(encode(Image.new("RGB", size), "PNG")) for size in [(8, 2), (4, 4), (2, 8)]
    ]
    assert len({found.pixels_sha256 for found in black}) == 3


def test_near_duplicates_are_near_and_others_far() -> None:
    pixels = photograph(480, 640, seed=1)
    first = fingerprint(encode(pixels, "JPEG", quality=95))
    smaller = Image.fromarray(pixels).resize((320, 240))
    for data in (encode(pixels, "JPEG", quality=60), encode(smaller, "JPEG", quality=85)):
        again = fingerprint(data)
        assert again.pixels_sha256 != first.pixels_sha256
        assert (again.perceptual_hash ^ first.perceptual_hash).bit_count() <= 6
    for seed in range(2, 6):
        other = fingerprint(encode(photograph(480, 640, seed=seed), "JPEG", quality=95))
        assert (other.perceptual_hash ^ first.perceptual_hash).bit_count() >= 16
        assert 0 <= other.perceptual_hash < 2**64


def test_fingerprint_reads_jpegs_in_full(large_jpeg: bytes) -> None:
    full = Image.open(io.BytesIO(large_jpeg))
    expected = hashlib.sha256(struct.pack("<II", 4000, 3000) + full.tobytes()).hexdigest()
    assert fingerprint(large_jpeg).pixels_sha256 == expected


# --- random damage

FUZZ_PIXELS = 1_000_000
REASONS = {"empty", "not-an-image", "unsupported", "too-large", "truncated", "corrupt"}
WHOLE = {
    "JPEG": encode(photograph(40, 56), "JPEG", exif=orientation_tag(6)),
    "JPEG progressive": encode(photograph(40, 56), "JPEG", progressive=True),
    "JPEG with EXIF": with_exif(place(), "2024:06:01 12:00:01", "2025:01:02 03:04:05"),
    "PNG": encode(photograph(40, 56), "PNG"),
    "PNG palette": half_transparent("P"),
    "PNG 16-bit": encode(photograph(40, 56)[..., 0].astype(np.uint16) * 257, "PNG"),
    "GIF": encode(photograph(40, 56), "GIF"),
    "WEBP": encode(photograph(40, 56), "WEBP"),
    "WEBP lossless": encode(photograph(40, 56), "WEBP", lossless=True, exif=orientation_tag(3)),
    "TIFF": encode(photograph(40, 56), "TIFF"),
    "TIFF LZW": encode(photograph(40, 56), "TIFF", compression="tiff_lzw"),
    "BMP": encode(photograph(40, 56), "BMP"),
    "AVIF": encode(photograph(40, 56), "AVIF"),
    "HEIC": encode(photograph(64, 64), "HEIF"),
}

fuzzing = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def peak_mb() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@pytest.fixture(scope="module")
def bounded_memory() -> Iterator[None]:
    """A million pixels take at most 16 MB; a decoder that believed a header would take far more."""
    before = peak_mb()
    yield
    assert peak_mb() - before < 256


def check_outcome(data: bytes) -> bool:
    """Whether `data` gives a picture; anything but that or an ImageError fails the test."""
    try:
        photo = decode(data, 24, max_pixels=FUZZ_PIXELS)
        found = fingerprint(data, max_pixels=FUZZ_PIXELS)
    except ImageError as error:
        reason = error.reason
    else:
        assert photo.pixels.shape == (24, 24, 3)
        assert photo.pixels.dtype == np.uint8
        assert photo.width * photo.height <= FUZZ_PIXELS
        assert (found.width, found.height) == (photo.width, photo.height)
        return True
    assert reason in REASONS
    return False


@pytest.mark.usefixtures("bounded_memory")
@given(
    data=st.binary(max_size=400), start=st.sampled_from([b"", *(d[:32] for d in WHOLE.values())])
)
@fuzzing
def test_random_bytes(data: bytes, start: bytes) -> None:
    check_outcome(start + data)


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("kind", WHOLE)
def test_cut_files(kind: str) -> None:
    whole = WHOLE[kind]
    assert check_outcome(whole)
    places = np.unique(np.linspace(0, len(whole) - 1, 60).astype(int))
    accepted = [place for place in places if check_outcome(whole[:place])]
    # What may be missing is what comes after the last pixel: PNG's checksum and end chunk.
    assert all(len(whole) - place <= 24 for place in accepted)


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("kind", WHOLE)
@given(data=st.data())
@settings(fuzzing, max_examples=40)
def test_flipped_bits(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(WHOLE[kind])
    # Half of the flips near the start, where the headers are.
    bits = st.integers(0, 8 * len(damaged) - 1) | st.integers(0, min(8 * len(damaged), 4000) - 1)
    for bit in data.draw(st.lists(bits, min_size=1, max_size=8)):
        damaged[bit // 8] ^= 1 << bit % 8
    check_outcome(bytes(damaged))


@given(data=st.data())
@fuzzing
def test_damage_inside_exif_never_costs_the_picture(data: st.DataObject) -> None:
    whole = WHOLE["JPEG with EXIF"]
    start = whole.index(b"Exif\0\0") + 6
    length = int.from_bytes(whole[start - 8 : start - 6], "big") - 8
    damaged = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=12)):
        damaged[start + place] = data.draw(st.integers(0, 255))
    assert decode(bytes(damaged), 16).pixels.shape == (16, 16, 3)


# --- right by definition, or by another library


@pytest.mark.parametrize("band", [1, 3000, 1 << 20])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(97, 131, 16), (64, 64, 16), (63, 65, 16), (300, 40, 7), (50, 211, 1), (20, 30, 25)],
)
def test_the_resize_is_pillow_s(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int, size: int, band: int
) -> None:
    """Box filter by whole factors to at least twice the size, then a triangle filter."""
    pixels = photograph(height, width)
    monkeypatch.setattr(images, "_BAND_PIXELS", band)
    whole = Image.fromarray(pixels)
    expected = whole.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    np.testing.assert_array_equal(decode(encode(pixels, "PNG"), size).pixels, np.asarray(expected))


@pytest.mark.parametrize("orientation", STORED)
def test_bands_of_turned_pictures_are_the_right_ones(
    monkeypatch: pytest.MonkeyPatch, orientation: int
) -> None:
    upright = photograph(45, 70)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    data = encode(stored, "PNG", exif=orientation_tag(orientation))
    monkeypatch.setattr(images, "_BAND_PIXELS", 140)  # two rows of 70
    expected = hashlib.sha256(struct.pack("<II", 70, 45) + upright.tobytes()).hexdigest()
    assert fingerprint(data).pixels_sha256 == expected
    small = Image.fromarray(upright).resize((8, 8), Image.Resampling.BILINEAR, reducing_gap=2.0)
    np.testing.assert_array_equal(decode(data, 8).pixels, np.asarray(small))


def test_turned_hashes_are_those_of_the_turned_picture() -> None:
    blotches = np.random.default_rng(3).integers(0, 255, (6, 6, 3), np.uint8)
    drawn = Image.fromarray(blotches).resize((96, 96), Image.Resampling.BICUBIC)
    found = fingerprint(encode(drawn, "PNG"))
    expected = [
        fingerprint(encode(drawn.transpose(way), "PNG")).perceptual_hash for way in Image.Transpose
    ]
    assert len(found.turned_hashes) == 7
    for way in expected:
        assert min((way ^ other).bit_count() for other in found.turned_hashes) <= 3
    for other in found.turned_hashes:
        assert min((way ^ other).bit_count() for way in expected) <= 3


def test_the_perceptual_hash_is_of_the_low_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 x 32 grey levels the 8 x 8 lowest of the cosine transform, each above the median."""
    pixels = photograph(120, 90, seed=3)
    grey = Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    low = scipy.fft.dctn(np.asarray(grey, float), type=2)[:8, :8]
    bits = "".join("01"[int(above)] for above in (low > np.median(low)).ravel())
    monkeypatch.setattr(images, "_BAND_PIXELS", 1000)
    found = fingerprint(encode(pixels, "PNG")).perceptual_hash
    assert found == int(bits, 2)
    assert found == int(str(imagehash.phash(Image.fromarray(pixels))), 16)


@pytest.mark.parametrize(
    ("parts", "letter", "expected"),
    [
        ((52, 30, 36), "N", 52 + 1836 / 3600),
        ((0, 0, 3.6), "N", 0.001),
        ((0, 6, 0), "S", -0.1),
        ((10, 0, 0), " s\0", -10.0),
        ((-1, 0, 0), "N", None),
        ((1, -30, 0), "N", None),
        ((1, 0, -9), "N", None),
        ((float("inf"), 0, 0), "N", None),
        ((1, 0), "N", None),
        ((1, 0, 0), "E", None),
        ((1, 0, 0), None, None),
        (None, "N", None),
    ],
)
def test_degrees_are_whole_ones_sixtieths_and_their_sixtieths(
    parts: object, letter: object, expected: float | None
) -> None:
    assert images._degrees(parts, letter, "NS") == (
        None if expected is None else pytest.approx(expected, abs=1e-12)
    )


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (place(north=(90.0, 0.0, 0.0)), (90.0, 13.25)),
        (place(north=(90.0, 0.0, 1.0)), (None, None)),
        (place(east=(180.0, 0.0, 0.0), east_ref="W"), (52.51, -180.0)),
        (place(east=(180.0, 0.0, 1.0), east_ref="W"), (None, None)),
        (place(north=(0.0, 0.0, 0.0)), (0.0, 13.25)),  # on the equator
        (place(east=(0.0, 0.0, 0.0)), (52.51, 0.0)),  # at Greenwich
        (place(north=(1.0, 0.0, 0.0), east=(1.0, 0.0, 0.0)), (1.0, 1.0)),
        (place(north=(0.0, 0.0, 0.0), east=(0.0, 0.0, 0.0)), (None, None)),
        (place(east=None), (None, None)),
    ],
)
def test_places_at_the_edges_of_the_globe(
    position: dict[int, Any], expected: tuple[float | None, float | None]
) -> None:
    photo = decode(with_exif(position), 16)
    found = (photo.latitude, photo.longitude)
    assert found == tuple(None if each is None else pytest.approx(each) for each in expected)


@pytest.mark.parametrize("behind", ["", ".25", "+02:00", " Z"])
def test_what_cameras_write_behind_a_time_is_left_out(behind: str) -> None:
    assert decode(with_exif(original=f"2024:06:01 12:00:01{behind}"), 16).captured_at == NOON


def test_the_limit_is_the_fingerprint_s_too() -> None:
    data = encode(photograph(30, 40), "JPEG")
    assert fingerprint(data, max_pixels=1200).height == 30
    with pytest.raises(ImageError, match="40 x 30 = 1,200 pixels, more than the 1,199"):
        fingerprint(data, max_pixels=1199)
    assert images.MAX_PIXELS == 120_000_000


def test_pillow_s_limit_is_raised_only_where_it_would_refuse_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It refuses above twice its number."""
    for before, allowed, after in (
        (1000, 500, 1000),
        (1000, 2000, 1000),
        (1000, 2001, 2001),
        (None, 5000, None),
    ):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", before)
        images._raise_pillow_limit(allowed)
        assert after == Image.MAX_IMAGE_PIXELS


def test_warnings_of_others_are_still_heard() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(WARNS[0], 16)
        warnings.warn("of the caller", stacklevel=1)
        warnings.simplefilter("always")  # puts a filter in front of ours
        decode(WARNS[0], 16)
    assert [str(each.message) for each in caught] == ["of the caller"]


def test_whole_numbers_of_16_bits_and_no_others() -> None:
    def levels(*values: int) -> bytes:
        return encode(np.array([values, values], np.int32), "TIFF")

    assert decode(levels(0, 65_535), 2).pixels[0].tolist() == [[0] * 3, [255] * 3]
    assert decode(levels(511, 512), 2).pixels[0].tolist() == [[1] * 3, [2] * 3]
    for values in ((0, 65_536), (-1, 5), (-1, 65_536)):
        with pytest.raises(ImageError, match="32-bit whole numbers") as caught:
            decode(levels(*values), 2)
        assert caught.value.reason == "unsupported"
    wide = encode(np.array([[0, 65_535]] * 2, np.uint16), "PNG")
    assert decode(wide, 2).pixels[0].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize(("kind", "raw"), [(0, False), (1, True), (2, False), (3, True)])
def test_a_tiff_is_a_raw_file_where_its_first_picture_is_a_small_one(kind: int, raw: bool) -> None:
    """TIFF 6.0, NewSubfileType: bit 0 is a reduced picture, bit 1 a page of many."""
    data = tiff_with(254, kind)
    with Image.open(io.BytesIO(data)) as image:
        assert images._is_raw(image) == raw


def boxes(*sizes: int) -> bytes:
    """Boxes of ISO media, each with its length in front."""
    return b"".join(struct.pack(">I", size) + b"free" + bytes(size - 8) for size in sizes)


@pytest.mark.parametrize(
    ("data", "kind", "cut"),
    [
        (b"\xff\xd8 \xff\xda ... \xff\xd9", "JPEG", False),
        (b"\xff\xd8 \xff\xda ... \xff", "JPEG", True),
        (b"\xff\xd8 \xff\xd9", "JPEG", True),  # of a thumbnail, before the picture
        (b"\xff\xd8 \xff\xd9 \xff\xda ...", "JPEG", True),
        (b"\x89PNG ... IEND....", "PNG", False),
        (b"\x89PNG ... IE", "PNG", True),
        (b"GIF89a ...;", "GIF", False),
        (b";IF89a ...", "GIF", True),
        (b"RIFF" + struct.pack("<I", 12) + b"WEBP12345678", "WEBP", False),
        (b"RIFF" + struct.pack("<I", 13) + b"WEBP12345678", "WEBP", True),
        (b"RIFF" + struct.pack("<I", 11) + b"WEBP12345678", "WEBP", False),
        (b"BM" + struct.pack("<I", 16) + bytes(10), "BMP", False),
        (b"BM" + struct.pack("<I", 17) + bytes(10), "BMP", True),
        (b"BM" + struct.pack("<I", 15) + bytes(10), "BMP", False),
        (boxes(24, 8, 300), "HEIF", False),
        (boxes(24, 8, 300)[:-1], "HEIF", True),
        (boxes(24, 300), "AVIF", False),
        (boxes(24, 300)[:30], "AVIF", True),
        (boxes(24) + bytes(3), "AVIF", True),  # not even a length
        (boxes(24) + struct.pack(">I", 0) + b"mdat...", "AVIF", False),  # to the end
        (boxes(24) + struct.pack(">I", 1) + b"mdat" + bytes(9), "HEIF", False),  # of 64 bits
        (b"II*\0", "TIFF", False),  # does not say where it ends
    ],
)
def test_where_a_format_ends(data: bytes, kind: str, cut: bool) -> None:
    assert images._is_cut_off(data, kind) == cut


def test_why_a_picture_cannot_be_decoded_is_one_short_line() -> None:
    whole = encode(photograph(16, 16), "PNG")
    for error, reason in (
        (EOFError(), "truncated"),
        (OSError("image file is truncated (3 bytes not processed)"), "truncated"),
        (ValueError("Unexpected END of data"), "truncated"),
        (ValueError("odd"), "corrupt"),
    ):
        assert images._failure(whole, error).reason == reason
    told = str(images._failure(whole, ValueError("a\n  b " + "c" * 300)))
    assert told == "the PNG file is damaged: a b " + "c" * 196
    assert str(images._failure(whole, KeyError())) == "the PNG file is damaged: KeyError"
    header = images._failure(whole, UnidentifiedImageError("<_io.BytesIO object at 0x7f>"))
    assert str(header) == "the PNG file is damaged: its header cannot be read"
    assert str(images._failure(b"?", ValueError("x"))) == "the picture file is damaged: x"
    assert str(images._failure(whole[:9], ValueError("x"))) == (
        "the PNG file is cut off after 9 bytes: x"
    )


def test_a_kind_that_this_pillow_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_readable", lambda name: name not in ("WEBP", "AVIF"))
    for kind in ("WEBP", "AVIF"):
        with pytest.raises(ImageError, match=f"built without {kind}; convert") as caught:
            decode(encode(photograph(64, 64), kind), 16)
        assert caught.value.reason == "unsupported"


def test_the_kind_is_told_from_the_first_bytes_alone() -> None:
    comment = b"<!-- " + b"x" * 900 + b" -->"
    assert images._kind(comment + b"<svg width='9'>") == "SVG"
    assert images._kind(comment * 2 + b"<svg width='9'>") is None
    assert images._kind(b" \xff\xd8\xff") is None


def test_a_picture_of_one_pixel_is_the_mean() -> None:
    pixels = np.array([[[0, 10, 20], [100, 50, 40]]], np.uint8)
    assert decode(encode(pixels, "PNG"), 1).pixels.tolist() == [[[50, 30, 30]]]


def test_a_picture_is_decoded_where_there_is_no_filter_of_warnings_at_all() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        assert decode(WARNS[0], 16).width == 16
    assert caught == []


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_a_png_with_a_large_profile_or_text_has_its_pixels(kind: bytes, place: str) -> None:
    """More than 1 MB unpacked, before and behind the pixels; what is small stays."""
    drawn = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    sink = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    drawn.save(sink, "PNG", exif=exif)
    png = sink.getvalue()
    packed = zlib.compress(np.random.default_rng(1).bytes(400_000) + bytes(800_000))
    name = b"XML:com.adobe.xmp\0\1\0\0\0" if kind == b"iTXt" else b"Printer\0\0"
    at = 33 if place == "before" else png.rindex(b"IEND") - 4
    with_more = png[:at] + png_chunk(kind, name + packed) + png[at:]
    assert fingerprint(with_more) == fingerprint(png)
    assert np.array_equal(decode(with_more, 16).pixels, decode(png, 16).pixels)
    # A bomb of 2 GB in 2 MB is not unpacked to find out.
    bomb = zlib.compressobj(9)
    piece = bomb.compress(bytes(100_000_000)) + bomb.flush()
    began = time.process_time()
    decode(png[:at] + png_chunk(kind, name + piece) + png[at:], 16)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("shape", "dtype", "told"),
    [
        ((8, 8, 5), np.uint16, "5 bands of 16 bits,"),
        ((8, 8, 3), np.float32, "3 bands of 32 bits, floating-point,"),
        ((8, 8, 3), np.int16, "3 bands of 16 bits, signed,"),
    ],
)
def test_a_stack_of_a_drone_is_told_for_what_it_is(
    shape: tuple[int, ...], dtype: type, told: str
) -> None:
    data = stacked_tiff(np.zeros(shape, dtype))
    with pytest.raises(ImageError, match=f"a TIFF with {told} not a photograph") as caught:
        decode(data, 16)
    assert caught.value.reason == "unsupported"
    with pytest.raises(ImageError, match=r"compression that is not read .number 34887.") as caught:
        decode(stacked_tiff(np.zeros(shape, dtype), compression=34887), 16)
    assert caught.value.reason == "unsupported"


def stacked_tiff(pixels: NDArray[Any], *, compression: int = 1) -> bytes:
    """A little-endian TIFF of one strip without the tag that says that it is RGB."""
    height, width, bands = pixels.shape
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    bits, kinds = (struct.pack(f"<{bands}H", *[n] * bands) for n in (pixels.itemsize * 8, kind))
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, bands, None), (259, 3, 1, compression),
        (262, 3, 1, 1), (273, 4, 1, None), (277, 3, 1, bands), (278, 4, 1, height),
        (279, 4, 1, pixels.nbytes), (284, 3, 1, 1), (339, 3, bands, None),
    ]  # fmt: skip
    behind = 8 + 2 + 12 * len(entries) + 4
    places = {258: behind, 339: behind + len(bits), 273: behind + len(bits) + len(kinds)}
    directory = b"".join(
        struct.pack("<HHII", tag, of, count, places.get(tag, value or 0))
        for tag, of, count, value in entries
    )
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + directory + bytes(4) + bits + kinds + pixels.tobytes()


def test_the_time_of_a_scan_is_before_that_of_the_latest_edit() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.DateTime] = "2026:01:01 10:00:00"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeDigitized] = "2024:05:06 07:08:09"
    sink = io.BytesIO()
    Image.new("RGB", (20, 20)).save(sink, "JPEG", exif=exif)
    assert decode(sink.getvalue(), 16).captured_at == datetime(2024, 5, 6, 7, 8, 9)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_12_bits_in_16_come_with_a_note(kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (20, 20)).astype(np.uint16)
    note = fingerprint(encode(Image.fromarray(values), kind)).note
    assert note is not None
    assert note.startswith("16-bit values below 4,096 come out nearly black")
    assert fingerprint(encode(Image.fromarray(values * 16), kind)).note is None
    assert fingerprint(encode(Image.fromarray((values // 512).astype(np.uint8)), kind)).note is None


def test_a_band_of_a_map_that_is_tagged_alpha_comes_with_a_note() -> None:
    bands = np.random.default_rng(0).integers(0, 255, (20, 20, 4)).astype(np.uint8)
    tags = ImageFileDirectory_v2()
    tags[33550] = (0.1, 0.1, 0.0)  # pixel scale, as GeoTIFF has it
    tags.tagtype[33550] = 12
    plain = encode(Image.fromarray(bands), "TIFF")
    geographic = encode(Image.fromarray(bands), "TIFF", tiffinfo=tags)
    assert fingerprint(plain).note is None
    note = fingerprint(geographic).note
    assert note is not None
    assert note.startswith("a GeoTIFF whose 4th band is tagged alpha")
