#!/usr/bin/env bash
# cv2.imread finds no picture in a TIFF held upright, though cv2.imdecode reads the same bytes.
#
# Versions: opencv-python-headless 5.0.0.93, Pillow 13.0.0, numpy 2.4.6.
# Guess:    OpenCV turns a TIFF by its Orientation tag as it does a JPEG, for all eight values,
#           alike from a file and from memory; IMREAD_IGNORE_ORIENTATION leaves it as stored.
# Happens:  for the values 5 to 8 (those that exchange height and width) imread returns None:
#           it logs that 'original_ptr == real_mat.data' must be true, as if a decoder that
#           turns the picture into a new array were at fault. imdecode and imreadmulti return
#           it upright. The flags that should leave the picture alone do not help, and for 2 to 4
#           they are disregarded: a TIFF comes turned whatever the flag. With a JPEG of the
#           same tag all is well. A script that skips what imread cannot read loses just the
#           portrait pictures of a scanner or camera.
# Seen:     TIFF, Orientation 1 2 3 4: imread gives a picture, 5 6 7 8: None
#           Orientation 6: imdecode (60, 40, 3), imreadmulti (60, 40, 3), Pillow (60, 40, 3)
#           Orientation 6 with IMREAD_IGNORE_ORIENTATION: imread None, imdecode (60, 40, 3)
#           Orientation 3 with IMREAD_IGNORE_ORIENTATION: TIFF turned, JPEG as stored
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
  opencv-python-headless==5.0.0.93 pillow==13.0.0 numpy==2.4.6
OPENCV_LOG_LEVEL=OFF venv/bin/python - <<'PY'
import sys

import cv2
import numpy as np
from PIL import Image, ImageOps

ORIENTATION = 0x0112
sky_above = np.full((40, 60, 3), 40, np.uint8)
sky_above[:20] = 220


def write(path: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(sky_above).save(path, exif=exif)


def from_memory(path: str, flag: int = cv2.IMREAD_COLOR) -> np.ndarray:
    return cv2.imdecode(np.fromfile(path, np.uint8), flag)


def is_turned(picture: np.ndarray) -> bool:
    return picture[0].mean() < picture[-1].mean()


read = {}
for orientation in range(1, 9):
    write("leaf.tif", orientation)
    read[orientation] = cv2.imread("leaf.tif") is not None
good = " ".join(str(value) for value, is_read in read.items() if is_read)
bad = " ".join(str(value) for value, is_read in read.items() if not is_read)
print(f"TIFF, Orientation {good}: imread gives a picture, {bad}: None")

write("leaf.tif", 6)
multi = cv2.imreadmulti("leaf.tif")[1][0].shape
pillow = np.asarray(ImageOps.exif_transpose(Image.open("leaf.tif"))).shape
memory = from_memory("leaf.tif").shape
print(f"Orientation 6: imdecode {memory}, imreadmulti {multi}, Pillow {pillow}")
as_stored = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
flagged = cv2.imread("leaf.tif", as_stored)
flagged_memory = from_memory("leaf.tif", as_stored).shape
print(
    f"Orientation 6 with IMREAD_IGNORE_ORIENTATION: imread {flagged}, imdecode {flagged_memory}"
)
turned = []
for path in ("leaf.tif", "leaf.jpg"):
    write(path, 3)
    turned.append(is_turned(cv2.imread(path, as_stored)))
words = ["turned" if value else "as stored" for value in turned]
print(f"Orientation 3 with IMREAD_IGNORE_ORIENTATION: TIFF {words[0]}, JPEG {words[1]}")

as_stated = (
    (good, bad) == ("1 2 3 4", "5 6 7 8")
    and {memory, multi, pillow, flagged_memory} == {(60, 40, 3)}
    and flagged is None
    and turned == [True, False]
)
sys.exit(0 if as_stated else "not as stated: OpenCV's reading of turned TIFF has changed")
PY
