#!/usr/bin/env bash
# Two photographs of a leaf that differ by one grey level of noise get perceptual hashes as far
# apart as different pictures, if the leaf is symmetric and lies in the middle.
#
# Versions: ImageHash 4.3.2, Pillow 13.0.0, numpy 2.4.6, scipy 1.17.1, PyWavelets 1.9.0.
# Guess:    imagehash.phash looks at the 8 x 8 lowest frequencies, where noise of one grey level
#           in 512 x 512 pixels is averaged away: at most 2 of the 64 bits change.
# Happens:  the cosines of odd frequency are antisymmetric, so over a left-right symmetric
#           picture the coefficients of every second column are 0. Those are half of the 64, so
#           the median that phash compares with is 0 or next to it, and whether a coefficient
#           of 0 lies above it is decided by the noise alone. A duplicate search that allows 8
#           or 10 bits misses the pair; JPEG at quality 95 is noise enough, and so is cutting
#           off one column. The same leaf 60 pixels off the middle is stable, and so is dhash.
# Seen:     in the middle, noise of 1 level, pairs: 18 16 20 14 16 16 18 14 20 10 14 10 18 10 18
#           in the middle, from the clean picture: JPEG 13, one column cut off 13
#           in the middle, dhash of the same noise: 0
#           off the middle, noise of 1 level, pairs: at most 2
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
  ImageHash==4.3.2 pillow==13.0.0 numpy==2.4.6 scipy==1.17.1 PyWavelets==1.9.0
venv/bin/python - <<'PY'
import io
import itertools
import sys

import imagehash
import numpy as np
from PIL import Image

SIDE = 512


def leaf() -> np.ndarray:
    """A dark blade with veins on pale paper, the same on both sides of its midrib."""
    row, column = np.mgrid[0:SIDE, 0:SIDE]
    from_midrib = np.abs(column - (SIDE - 1) / 2) / SIDE
    down = row / SIDE
    blade = np.clip((0.35 * np.sin(np.pi * down) ** 0.7 - from_midrib) * 30, 0, 1)
    veins = 60 * np.sin(40 * (down + from_midrib)) * np.exp(-3 * from_midrib)
    return np.clip(np.round(230 - blade * (120 + veins)), 0, 255).astype(np.uint8)


def noisy(picture: np.ndarray, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-1, 2, picture.shape)
    return Image.fromarray(np.clip(picture + noise, 0, 255).astype(np.uint8))


def pairs(picture: np.ndarray) -> list[int]:
    hashes = [imagehash.phash(noisy(picture, seed)) for seed in range(6)]
    return [int(a - b) for a, b in itertools.combinations(hashes, 2)]


middle = leaf()
aside = np.full_like(middle, 230)
aside[:, 60:] = middle[:, :-60]
clean = Image.fromarray(middle)

in_middle, off_middle = pairs(middle), pairs(aside)
print("in the middle, noise of 1 level, pairs:", *in_middle)
jpeg = io.BytesIO()
clean.save(jpeg, "JPEG", quality=95)
recoded = int(imagehash.phash(clean) - imagehash.phash(Image.open(jpeg)))
cropped = int(imagehash.phash(clean) - imagehash.phash(clean.crop((1, 0, SIDE, SIDE))))
print(f"in the middle, from the clean picture: JPEG {recoded}, one column cut off {cropped}")
by_dhash = int(imagehash.dhash(clean) - imagehash.dhash(noisy(middle, 0)))
print("in the middle, dhash of the same noise:", by_dhash)
print("off the middle, noise of 1 level, pairs: at most", max(off_middle))

as_stated = (
    min(in_middle) >= 8
    and min(recoded, cropped) > 8
    and by_dhash <= 2
    and max(off_middle) <= 4
)
sys.exit(0 if as_stated else "not as stated: phash of a symmetric picture has changed")
PY
