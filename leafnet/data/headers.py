"""What the bytes of a picture hold beside pixels, where Pillow does not read them as they are."""

import io
import re
import struct
import zlib

from PIL import PngImagePlugin, TiffImagePlugin


def without_large_texts(data: bytes) -> bytes:
    """A PNG without the profiles and texts that are too large for Pillow's guard against bombs.

    They do not change the pixels here. What is small stays: it may hold the EXIF.
    """
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        content = data[place + 8 : place + 8 + length]
        if kind not in (b"iCCP", b"iTXt", b"zTXt", b"tEXt") or _is_small(content):
            kept.append(data[place : place + 12 + length])
        place += 12 + length
    return data if place == sum(map(len, kept)) else b"".join([*kept, data[place:]])


def _is_small(content: bytes) -> bool:
    """Whether a PNG's text or profile is within Pillow's limit, compressed or not."""
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    if len(content) * _MOST_PACKED <= limit:
        return True
    start = re.search(rb"\x78[\x01\x5e\x9c\xda]", content)
    if start is None:
        return len(content) <= limit
    try:
        # No more is unpacked than shows that it is too much.
        return len(zlib.decompressobj().decompress(content[start.start() :], limit + 1)) <= limit
    except zlib.error:
        return len(content) <= limit


_MOST_PACKED = 1032  # times, by deflate

_SAMPLE_KINDS = {1: "bits", 2: "bits, signed", 3: "bits, floating-point"}


def what_tiff(data: bytes) -> str | None:
    """What a TIFF is that Pillow does not read, and what to export; None: its header is broken."""
    try:
        directory = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if 43 in data[2:4] else 8])
        file = io.BytesIO(data)
        file.seek(directory.next)
        directory.load(file)
        bands = int(directory.get(277, 1))
        bits = directory[258] if directory[256] and directory[257] else ()
        kind = _SAMPLE_KINDS.get(directory.get(339, (1,))[0], "bits")
        packing = int(directory.get(259, 1))
    except Exception:  # of any kind, where the header is damaged
        return None
    packed = TiffImagePlugin.COMPRESSION_INFO.get(packing)
    unknown = "" if packed else f", in a compression that is not read (number {packing})"
    return (
        f"a TIFF with {bands} band{'s' * (bands > 1)} of {max(bits)} {kind}{unknown}, not a "
        "photograph of 8-bit RGB; export red, green and blue, such as with gdal_translate -ot "
        "Byte -scale"
    )
