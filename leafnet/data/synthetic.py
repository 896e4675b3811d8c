"""Small drawn photographs of potato leaves, so that the demo and the tests download nothing.

One leaf a picture on a grey board, healthy or with one of two blights. They have the look
of leaf photographs and their nuisances (light, pose, white balance, noise, EXIF rotation), and no
more than that: what a model learns from them says nothing about real plants. Blights are advanced
and the board is near the colour that ResNet50 subtracts, so that even an untrained network tells
the classes apart.

In shapes H and W are the height and width of the picture in pixels. Colours are RGB in [0, 1] until
the last step.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leafnet.core.errors import UserError

CLASS_NAMES = ("early_blight", "healthy", "late_blight")

Floats = NDArray[np.floating]

SIZES = ((192, 192), (240, 180), (180, 240), (320, 240), (640, 480))  # width, height
SIZE_SHARES = (0.36, 0.2, 0.2, 0.2, 0.04)
ORIENTATION_TAG = 0x0112
# EXIF orientation, and the turn of an upright picture that a viewer undoes on seeing it.
TURNS = (
    (3, Image.Transpose.ROTATE_180),
    (6, Image.Transpose.ROTATE_90),
    (8, Image.Transpose.ROTATE_270),
)

BLADES = ((0.20, 0.34, 0.14), (0.25, 0.40, 0.16), (0.31, 0.44, 0.19), (0.25, 0.37, 0.20))
# Near ResNet50's mean colour, so that what is left of a picture's features is its leaf.
BOARDS = ((0.44, 0.47, 0.52), (0.49, 0.49, 0.48), (0.56, 0.55, 0.53))
GRAVELS = ((0.86, 0.80, 0.72), (0.95, 0.92, 0.88))


def write_photographs(
    root: str | Path,
    *,
    per_class: int = 80,
    seed: int = 0,
    advance: Callable[[int], object] = lambda count: None,
) -> int:
    """Number of JPEGs written to `root`/<class>/leaf_0001.jpg and on, `per_class` in each class.

    Sizes and JPEG quality vary, and every sixth picture is stored turned, with the EXIF tag that
    sets it upright. The same arguments write the same bytes; other files in `root` stay. `advance`
    is called with each count just written.

    Raises:
        UserError: fewer than one picture per class, or a negative seed.
    """
    if per_class < 1:
        raise UserError("bad-count", f"need at least 1 photograph per class, got {per_class}")
    _check_seed(seed)
    for label_index, label in enumerate(CLASS_NAMES):
        folder = Path(root) / label
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(1, per_class + 1):
            rng = np.random.default_rng([seed, label_index, number])
            width, height = SIZES[rng.choice(len(SIZES), p=SIZE_SHARES)]
            leaf_seed = int(rng.integers(2**62))
            photo = Image.fromarray(draw_leaf(label, seed=leaf_seed, width=width, height=height))
            exif = Image.Exif()
            if number % 6 == 0:
                exif[ORIENTATION_TAG], turn = TURNS[rng.integers(len(TURNS))]
                photo = photo.transpose(turn)
            quality = int(rng.integers(80, 96))
            photo.save(folder / f"leaf_{number:04d}.jpg", quality=quality, exif=exif)
            advance(1)
    return per_class * len(CLASS_NAMES)


def draw_leaf(label: str, *, seed: int, width: int = 256, height: int = 256) -> NDArray[np.uint8]:
    """A photograph of one leaf of class `label`, [height, width, 3] RGB; same arguments, same leaf.

    Raises:
        UserError: an unknown label, a negative seed, or a side under 32 pixels.
    """
    if label not in CLASS_NAMES:
        known = ", ".join(CLASS_NAMES)
        raise UserError("unknown-class", f"no class {label!r}; the demo draws {known}")
    _check_seed(seed)
    if min(width, height) < 32:
        raise UserError("bad-size", f"need at least 32 x 32 pixels, got {width} x {height}")
    rng = np.random.default_rng([CLASS_NAMES.index(label), seed, width, height])
    leaf = _place_leaf(rng, height, width)
    color, relief = _blade(rng, leaf)
    if label == "early_blight":
        color = _early_blight(rng, leaf, color)
    elif label == "late_blight":
        color = _late_blight(rng, leaf, color)
    color = _specks(rng, leaf, color) * relief[..., None]
    return _expose(rng, _mix(_background(rng, leaf), color, leaf.mask))


def write_odd(root: str | Path, *, seed: int = 0) -> int:
    """Number of files written to `root`: what a camera in the field delivers beside good leaves.

    `covered_lens` and `no_leaf` are unlike all that is trained on; `blurred` and `both_blights` are
    hard, and a model may be sure of them all the same; `broken` lacks the second half of its file.

    Raises:
        UserError: a negative seed.
    """
    _check_seed(seed)
    rng = np.random.default_rng(seed)
    side = 240
    leaf = _place_leaf(rng, side, side)
    color, relief = _blade(rng, leaf)
    color = _late_blight(rng, leaf, _early_blight(rng, leaf, color)) * relief[..., None]
    both = _expose(rng, _mix(_background(rng, leaf), color, leaf.mask))
    sharp = draw_leaf("late_blight", seed=seed, width=side, height=side)
    gravel = 0.5 + 0.5 * _step(_clouds(rng, (side, side), side / 20), -0.2, 0.2)
    finger = np.full((side, side, 3), (0.88, 0.60, 0.48), np.float32)
    pictures = {
        "blurred": np.asarray(cv2.GaussianBlur(sharp, (0, 0), side / 12), np.uint8),
        "covered_lens": _expose(rng, finger),
        "no_leaf": _expose(rng, gravel[..., None] * _blend(rng, GRAVELS)),
        "both_blights": both,
        "broken": sharp,
    }
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.jpg", quality=90)
    broken = folder / "broken.jpg"
    data = broken.read_bytes()
    broken.write_bytes(data[: len(data) // 2])
    return len(pictures)


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise UserError("bad-seed", f"the seed must be 0 or more, got {seed}")


class _Leaf(NamedTuple):
    """Where the leaf lies. Lengths are in leaf lengths, from the foot of the blade to its tip."""

    along: Floats  # [H, W], position along the midrib: 0 at the foot, 1 at the tip
    across: Floats  # [H, W], signed distance from the midrib
    mask: Floats  # [H, W], 1 on the leaf with its stalk, 0 beside it, between at the edge
    depth: Floats  # [H, W], distance inwards from the margin of the blade, 0 outside it
    pixels: float  # one leaf length


def _place_leaf(rng: np.random.Generator, height: int, width: int) -> _Leaf:
    """A pointed oval with an uneven margin, bent, turned and put somewhere near the middle."""
    # Points are complex numbers, x + iy: the leaf's own have the midrib on the real axis.
    pixels = min(height, width) * rng.uniform(0.92, 1.02)
    turn = pixels * np.exp(1j * rng.uniform(0, 2 * np.pi))
    x, y = (width, height) * rng.uniform(0.46, 0.54, 2)
    bend = rng.normal(0, 0.09)

    along = (1 - np.cos(np.linspace(0, np.pi, 160))) / 2
    profile = along ** rng.uniform(0.4, 0.6) * (1 - along) ** rng.uniform(0.65, 0.95)
    half = profile / profile.max() * rng.uniform(0.38, 0.46)
    margins = [along + 1j * side * half * _waves(rng, along) for side in (1, -1)]
    outline = np.append(margins[0], margins[1][::-1])
    stalk_along = np.linspace(-rng.uniform(0.05, 0.3), 0.05, 12)
    stalk = stalk_along + 0.02j * np.sin(9 * stalk_along)

    def to_picture(points: NDArray[np.complexfloating]) -> NDArray[np.int32]:
        bent = (points - 0.5 + 1j * bend * (2 * points.real - 1) ** 2) * turn + x + 1j * y
        return np.rint([16 * bent.real, 16 * bent.imag]).T.astype(np.int32)  # for shift=4

    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [to_picture(outline)], 255, cv2.LINE_AA, shift=4)
    depth = cv2.distanceTransform((mask > 127).astype(np.uint8), cv2.DIST_L2, 3)
    thick = max(1, round(0.022 * pixels))
    cv2.polylines(mask, [to_picture(stalk)], False, 255, thick, cv2.LINE_AA, shift=4)

    columns, rows = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    points = (columns - x + 1j * (rows - y)) / turn + 0.5
    across = points.imag - bend * (2 * points.real - 1) ** 2
    return _Leaf(
        along=_single(points.real),
        across=_single(across),
        mask=_single(mask / 255),
        depth=_single(depth / pixels),
        pixels=pixels,
    )


def _single(values: NDArray[Any]) -> Floats:
    """As contiguous float32, so that the work that follows is done in single precision."""
    return np.ascontiguousarray(values, np.float32)


def _waves(rng: np.random.Generator, along: Floats) -> Floats:
    """A factor near 1 for each position [N] on one margin: a few slow waves and a faint ripple."""
    factor = np.full(along.shape, rng.uniform(0.93, 1.07))
    for slowest, fastest, height in ((1, 3, 0.06), (3, 7, 0.035), (8, 14, 0.018)):
        turns = rng.uniform(slowest, fastest) * along + rng.random()
        factor += rng.uniform(0, height) * np.sin(2 * np.pi * turns)
    return factor


def _clouds(rng: np.random.Generator, shape: tuple[int, ...], cell: float) -> Floats:
    """Smooth noise [H, W] of mean 0 and deviation near 1, with lumps `cell` pixels wide."""
    height, width = shape
    total = np.zeros((height, width), np.float32)
    for octave, weight in enumerate((1.2, 0.7, 0.4)):
        size = max(cell / 2**octave, 1.0)
        grid = rng.standard_normal((int(height / size) + 2, int(width / size) + 2), np.float32)
        total += weight * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return total


def _step(values: Floats, start: float, end: float) -> Floats:
    """Smooth step, elementwise: 0 at `start`, 1 at `end`; `end` may be the smaller one."""
    ramp = _single(np.clip((values - start) / (end - start), 0, 1))
    return ramp * ramp * (3 - 2 * ramp)


def _mix(under: Floats, over: Floats | tuple[float, ...], share: Floats) -> Floats:
    """`over`, one colour or [H, W, 3], laid on `under` [H, W, 3] with opacity `share` [H, W]."""
    return under + (np.asarray(over, np.float32) - under) * share[..., None]


def _blend(rng: np.random.Generator, palette: tuple[tuple[float, ...], ...]) -> Floats:
    """A colour [3] somewhere between those of the palette, mostly near one of them."""
    return _single(rng.dirichlet([0.5] * len(palette)) @ np.array(palette))


def _blade(rng: np.random.Generator, leaf: _Leaf) -> tuple[Floats, Floats]:
    """Colour [H, W, 3] of a healthy leaf, and the light [H, W] on its relief, near 1."""
    shape, side = leaf.mask.shape, np.abs(leaf.across)
    # A side vein leaves the midrib at `start` and curves to the tip: along = start + f(side).
    start = leaf.along - rng.uniform(0.5, 0.9) * side - rng.uniform(0.2, 0.9) * side**2
    start += 0.008 * _clouds(rng, shape, 0.2 * leaf.pixels)
    spacing, shift = rng.uniform(0.1, 0.15), rng.uniform(0.3, 0.7)
    order = start / spacing + np.where(leaf.across > 0, np.float32(shift), np.float32(0))
    to_vein = np.abs(order - np.rint(order))  # in spacings, 0 on a vein and 0.5 between two
    midrib = np.exp(-((leaf.across / (0.013 - 0.008 * np.clip(leaf.along, 0, 1))) ** 2))
    veins = np.exp(-((to_vein * spacing / (0.0055 - 0.006 * np.minimum(side, 0.6))) ** 2))
    veins *= _step(start, -0.06, 0.02) * _step(leaf.depth, 0.0, 0.12)

    base = _blend(rng, BLADES)
    mottle = 1 + rng.uniform(0.04, 0.1) * _clouds(rng, shape, 0.12 * leaf.pixels)
    yellow = rng.uniform(0, 0.2) * _step(_clouds(rng, shape, 0.4 * leaf.pixels), 0, 2.5)
    color = _mix(base * mottle[..., None], (0.62, 0.60, 0.22), yellow)
    pale = base * 0.55 + _single(np.array((0.32, 0.34, 0.20)))
    color = _mix(color, pale, np.maximum(0.9 * midrib, rng.uniform(0.35, 0.75) * veins))
    return color, _relief(rng, leaf, np.cos(2 * np.pi * to_vein), midrib)


def _relief(rng: np.random.Generator, leaf: _Leaf, furrows: Floats, midrib: Floats) -> Floats:
    """Light [H, W] on a blade that bulges between its veins and is folded along the midrib.

    Args:
        rng: decides the depth of the relief and where the light comes from.
        leaf: the leaf.
        furrows: [H, W], 1 on a side vein and -1 halfway between two.
        midrib: [H, W], 1 on the midrib and 0 beside it.
    """
    height = -rng.uniform(0.001, 0.01) * furrows * _step(leaf.depth, 0, 0.06) - 0.006 * midrib
    height += 0.003 * _clouds(rng, height.shape, 0.06 * leaf.pixels)
    slope_y, slope_x = np.gradient(height * leaf.pixels)
    angle = rng.uniform(0, 2 * np.pi)
    slope = slope_x * np.cos(angle) + slope_y * np.sin(angle)
    relief = 1 + rng.uniform(0.12, 0.4) * np.tanh(1.5 * slope)
    return _single(relief * (1 + rng.normal(0, 0.08) * np.tanh(12 * leaf.across)))


def _lesions(
    rng: np.random.Generator, leaf: _Leaf, radii: NDArray[np.float64], *, at: NDArray[np.bool_]
) -> Floats:
    """[H, W]: 0 in the middle of a lesion, 1 on its edge, more outside, at most 3.

    Args:
        rng: decides where the centres lie.
        leaf: the leaf they lie on.
        radii: [N], in leaf lengths.
        at: [H, W], where a centre may be.
    """
    field = np.full(at.shape, 3.0)
    allowed = np.argwhere(at)
    ys, xs = np.ogrid[: at.shape[0], : at.shape[1]]
    for radius in np.maximum(radii * leaf.pixels, 0.8):
        row, column = allowed[rng.integers(len(allowed))]
        reach = int(3 * radius) + 1
        rows = slice(max(row - reach, 0), row + reach)
        columns = slice(max(column - reach, 0), column + reach)
        y, x = ys[rows] - row, xs[:, columns] - column
        stretch, shear = rng.uniform(0.8, 1.25), rng.uniform(-0.3, 0.3)
        distance = np.hypot((x + shear * y) * stretch, y / stretch) / radius
        field[rows, columns] = np.minimum(field[rows, columns], distance)
    return _single(field)


def _early_blight(rng: np.random.Generator, leaf: _Leaf, color: Floats) -> Floats:
    """Round dark-brown spots with rings in them and a yellow halo, on `color` [H, W, 3]."""
    shape, severity = leaf.mask.shape, rng.uniform(0.6, 1)
    size = rng.uniform(0.012, 0.034)
    radii = size * rng.lognormal(0, 0.4, round(severity * rng.uniform(0.6, 1.1) / size) + 6)
    field = _lesions(rng, leaf, np.minimum(radii, 0.07), at=leaf.depth > 0.03)
    field *= 1 + 0.13 * _clouds(rng, shape, 0.06 * leaf.pixels)
    yellowing = severity * _step(_clouds(rng, shape, 0.45 * leaf.pixels), -1.8, 1.5)
    color = _mix(color, (0.62, 0.56, 0.18), 0.95 * yellowing)
    halo = _step(field, rng.uniform(1.5, 2.4), 0.9)
    color = _mix(color, (0.66, 0.62, 0.24), rng.uniform(0.3, 0.8) * halo)
    rings = 0.95 + 0.3 * np.cos(2 * np.pi * field * rng.uniform(1.8, 3.2))
    brown = _blend(rng, ((0.25, 0.16, 0.11), (0.33, 0.23, 0.15), (0.22, 0.17, 0.15)))
    spots = brown * rings[..., None]
    return _mix(color, spots, rng.uniform(0.75, 0.95) * _step(field, 1.15, 0.8))


def _late_blight(rng: np.random.Generator, leaf: _Leaf, color: Floats) -> Floats:
    """A few large ragged patches, dark at the rim and pale around, on `color` [H, W, 3]."""
    shape, severity = leaf.mask.shape, rng.uniform(0.6, 1)
    large = rng.uniform(0.18, 0.24 + 0.2 * severity, rng.integers(3, 4 + round(2 * severity)))
    small = rng.uniform(0.01, 0.04, rng.integers(0, 6))
    from_margin = rng.random() < 0.7
    at = (leaf.depth > 0) & (leaf.depth < 0.05) if from_margin else leaf.depth > 0.05
    field = _lesions(rng, leaf, np.append(large, small), at=at)
    field *= 1 + 0.17 * _clouds(rng, shape, 0.2 * leaf.pixels)
    field += 0.05 * _clouds(rng, shape, 0.03 * leaf.pixels)
    color = _mix(color, (0.60, 0.64, 0.35), rng.uniform(0.4, 0.9) * _step(field, 1.35, 1.0))
    color = _mix(color, (0.18, 0.16, 0.09), rng.uniform(0.8, 0.95) * _step(field, 1.06, 0.9))
    dry = _blend(rng, ((0.40, 0.30, 0.20), (0.34, 0.30, 0.26), (0.52, 0.42, 0.28)))
    dry = dry * (1 + 0.12 * _clouds(rng, shape, 0.04 * leaf.pixels))[..., None]
    color = _mix(color, dry, 0.85 * _step(field, 0.9, rng.uniform(0.3, 0.7)))
    mould = np.exp(-(((field - 1) / 0.1) ** 2)) * _clouds(rng, shape, 0.012 * leaf.pixels)
    return _mix(color, (0.80, 0.80, 0.76), np.clip(rng.uniform(0, 0.4) * mould, 0, 0.8))


def _specks(rng: np.random.Generator, leaf: _Leaf, color: Floats) -> Floats:
    """What comes with every class on `color` [H, W, 3]: dust, crumbs, perhaps a dry tip."""
    for tint in ((0.78, 0.76, 0.66), (0.20, 0.15, 0.10)):
        radii = rng.uniform(0.002, 0.01, rng.integers(0, 9))
        field = _lesions(rng, leaf, radii, at=leaf.depth > 0)
        color = _mix(color, tint, rng.uniform(0.4, 0.9) * _step(field, 1.3, 0.7))
    ends = rng.uniform(0.9, 1.3)  # past 1 most tips stay green
    return _mix(color, (0.48, 0.38, 0.20), 0.8 * _step(leaf.along, ends, ends + 0.06))


def _background(rng: np.random.Generator, leaf: _Leaf) -> Floats:
    """[H, W, 3]: a plain grey board, with the soft shadow of the leaf."""
    shape, base = leaf.mask.shape, _blend(rng, BOARDS)
    texture = 1 + 0.015 * _clouds(rng, shape, 0.3 * leaf.pixels)
    texture += 0.015 * _clouds(rng, shape, max(0.018 * leaf.pixels, 3))
    move = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    move[:, 2] = rng.uniform(-0.04, 0.04, 2) * leaf.pixels
    shadow = cv2.warpAffine(leaf.mask, move, shape[::-1])
    shadow = cv2.GaussianBlur(shadow, (0, 0), rng.uniform(0.01, 0.03) * leaf.pixels)
    texture *= 1 - rng.uniform(0.25, 0.55) * shadow
    return base * texture[..., None]


def _expose(rng: np.random.Generator, scene: Floats) -> NDArray[np.uint8]:
    """The photograph [H, W, 3] of `scene` [H, W, 3]: light, white balance, lens, noise."""
    height, width = scene.shape[:2]
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    light = rng.uniform(0.94, 1.08) + rng.normal(0, 0.05) * x + rng.normal(0, 0.05) * y
    light *= 1 - rng.uniform(0, 0.16) * (x**2 + y**2)
    balance = rng.normal(1, (0.015, 0.01, 0.02))
    lit = scene * _single(light[..., None] * balance)
    sigma = rng.uniform(0.4, 0.9) * max(1.0, min(height, width) / 400)
    blurred = cv2.GaussianBlur(lit, (0, 0), sigma)
    noisy = blurred + rng.uniform(0.005, 0.025) * rng.standard_normal(scene.shape, np.float32)
    photo = np.clip(noisy, 0, 1) ** rng.uniform(0.88, 1.12)
    return np.rint(photo * 255).astype(np.uint8)
