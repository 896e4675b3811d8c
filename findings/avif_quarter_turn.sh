#!/usr/bin/env bash
# A portrait photograph saved by Pillow as AVIF lies on its side in OpenCV and has no Orientation
# in its Exif, while Pillow reports an Orientation for it that stands nowhere in the file's Exif.
#
# Versions: Pillow 13.0.0 (libavif 1.4.2), opencv-python-headless 5.0.0.93, ExifRead 3.5.1,
#           numpy 2.4.6.
# Guess:    cv2.imread turns AVIF by its orientation as it does JPEG, PNG and WebP, so that the
#           same photograph has the same height and width whatever it was saved as.
# Happens:  in AVIF the turn belongs to the container (its irot and imir boxes), and Pillow moves
#           the Orientation tag there when it saves; when it opens the file it makes the tag up
#           again, so exif_transpose works. OpenCV decodes the pixels without the boxes and
#           finds no tag to turn by. A reader of Exif alone takes the picture to be upright. A
#           data set converted from JPEG to AVIF to save space is thus trained on lying leaves
#           wherever OpenCV reads it.
# Seen:     JPEG  Exif in the file 6     Pillow says 6  upright (60, 40)  OpenCV (60, 40)
#           PNG   Exif in the file 6     Pillow says 6  upright (60, 40)  OpenCV (60, 40)
#           AVIF  Exif in the file none  Pillow says 6  upright (60, 40)  OpenCV (40, 60)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
  opencv-python-headless==5.0.0.93 pillow==13.0.0 ExifRead==3.5.1 numpy==2.4.6
venv/bin/python - <<'PY'
import sys

import cv2
import exifread
import numpy as np
from PIL import Image, ImageOps

ORIENTATION, DATE_TIME = 0x0112, 0x0132
photograph = Image.fromarray(np.full((40, 60, 3), 120, np.uint8))
exif = Image.Exif()
exif[ORIENTATION] = 6
exif[DATE_TIME] = "2026:05:01 10:00:00"

rows = {}
for name in ("JPEG", "PNG", "AVIF"):
    path = f"leaf.{name.lower()}"
    photograph.save(path, exif=exif)
    with open(path, "rb") as file:
        tags = exifread.process_file(file, details=False)
    assert str(tags["Image DateTime"]) == exif[DATE_TIME]
    tag = tags.get("Image Orientation")
    in_file = tag.values[0] if tag else "none"
    with Image.open(path) as opened:
        by_pillow = opened.getexif().get(ORIENTATION)
        upright = np.asarray(ImageOps.exif_transpose(opened)).shape[:2]
    by_opencv = cv2.imread(path).shape[:2]
    rows[name] = (in_file, by_pillow, upright, by_opencv)
    print(
        f"{name:5} Exif in the file {in_file!s:5} Pillow says {by_pillow}"
        f"  upright {upright}  OpenCV {by_opencv}"
    )

tall, wide = (60, 40), (40, 60)
as_stated = rows.pop("AVIF") == ("none", 6, tall, wide) and all(
    row == (6, 6, tall, tall) for row in rows.values()
)
sys.exit(0 if as_stated else "not as stated: the orientation of AVIF files has changed")
PY
