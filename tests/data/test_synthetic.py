"""The drawn photographs: repeatable, told apart by their lesions, stored like a camera's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from leafnet.core.errors import UserError
from leafnet.data import synthetic


@pytest.mark.parametrize("label", synthetic.CLASS_NAMES)
def test_a_leaf_is_the_same_for_the_same_arguments_and_another_for_others(label: str) -> None:
    leaf = synthetic.draw_leaf(label, seed=3, width=96, height=64)
    assert leaf.shape == (64, 96, 3)
    assert leaf.dtype == np.uint8
    np.testing.assert_array_equal(leaf, synthetic.draw_leaf(label, seed=3, width=96, height=64))
    assert (leaf != synthetic.draw_leaf(label, seed=4, width=96, height=64)).mean() > 0.5


def brown_share(label: str, seed: int) -> float:
    """Share of pixels redder than green in the middle of a leaf, where little ground shows."""
    red, green, _ = synthetic.draw_leaf(label, seed=seed)[64:192, 64:192].transpose(2, 0, 1) / 255
    return float((red > 1.05 * green).mean())


def test_blighted_leaves_are_browner() -> None:
    brown = {
        label: np.mean([brown_share(label, seed) for seed in range(30)])
        for label in synthetic.CLASS_NAMES
    }
    assert brown["early_blight"] > 2 * brown["healthy"]
    assert brown["late_blight"] > 2 * brown["healthy"]


@pytest.mark.parametrize(("width", "height"), [(32, 32), (33, 500), (1024, 768)])
@pytest.mark.parametrize("label", synthetic.CLASS_NAMES)
def test_small_narrow_and_large_pictures_are_drawn(label: str, width: int, height: int) -> None:
    leaf = synthetic.draw_leaf(label, seed=0, width=width, height=height)
    assert leaf.shape == (height, width, 3)
    assert leaf.std() > 8  # something is on it


def read_all(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.*")}


def test_photographs_are_counted_distinct_and_the_same_on_each_run(tmp_path: Path) -> None:
    assert synthetic.write_photographs(tmp_path / "a", per_class=7, seed=5) == 21
    assert synthetic.write_photographs(tmp_path / "b", per_class=7, seed=5) == 21
    first, again = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert sorted(first) == [
        f"{c}/leaf_{n:04d}.jpg" for c in synthetic.CLASS_NAMES for n in range(1, 8)
    ]
    assert first == again
    assert len(set(first.values())) == 21


def test_another_seed_gives_other_photographs(tmp_path: Path) -> None:
    for seed in (0, 1):
        synthetic.write_photographs(tmp_path / str(seed), per_class=1, seed=seed)
    photos = [path.read_bytes() for path in tmp_path.rglob("*.jpg")]
    assert len(set(photos)) == 6


def test_turned_photographs_are_set_upright_by_their_exif_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ramp(label: str, *, seed: int, width: int, height: int) -> NDArray[np.uint8]:
        """[height, width, 3]: red grows to the right and green downwards."""
        red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        return np.stack([red, green, 0 * red], axis=-1).astype(np.uint8)

    monkeypatch.setattr(synthetic, "draw_leaf", ramp)
    synthetic.write_photographs(tmp_path, per_class=48)
    orientations, sizes = [], set()
    for path in tmp_path.rglob("*.jpg"):
        with Image.open(path) as photo:
            orientations.append(photo.getexif().get(synthetic.ORIENTATION_TAG, 1))
            upright = ImageOps.exif_transpose(photo)
        sizes.add(upright.size)
        red, green, _ = np.asarray(upright, np.float32).transpose(2, 0, 1)
        assert red[:, -8:].mean() > red[:, :8].mean() + 100, path
        assert green[-8:].mean() > green[:8].mean() + 100, path
    assert sizes <= set(synthetic.SIZES)
    assert set(orientations) == {1, 3, 6, 8}
    assert sum(o != 1 for o in orientations) == len(orientations) / 6


def test_jpeg_quality_varies(tmp_path: Path) -> None:
    synthetic.write_photographs(tmp_path, per_class=3)
    tables = set()
    for path in tmp_path.rglob("*.jpg"):
        with Image.open(path) as photo:
            assert isinstance(photo, JpegImageFile)
            tables.add(tuple(photo.quantization[0]))
    assert len(tables) > 3


@pytest.mark.parametrize(
    ("arguments", "reason", "message"),
    [
        ({"label": "rust", "seed": 0}, "unknown-class", "'rust'; the demo draws early_blight"),
        ({"label": "healthy", "seed": -1}, "bad-seed", "got -1"),
        ({"label": "healthy", "seed": 0, "width": 31}, "bad-size", "got 31 x 256"),
    ],
)
def test_a_leaf_that_cannot_be_drawn_is_refused(
    arguments: dict[str, Any], reason: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        synthetic.draw_leaf(**arguments)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("arguments", "reason"), [({"per_class": 0}, "bad-count"), ({"seed": -1}, "bad-seed")]
)
def test_nothing_is_written_for_a_wrong_count_or_seed(
    tmp_path: Path, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        synthetic.write_photographs(tmp_path / "photos", **arguments)
    assert caught.value.reason == reason
    assert not (tmp_path / "photos").exists()


# The parts that a leaf is drawn of


def test_a_smooth_step_is_a_cubic_between_its_ends() -> None:
    """0 and 1 outside, half in the middle, 3 t^2 - 2 t^3 at a quarter; either way round."""
    values = np.array([-1, 2, 3, 4, 6, 9], np.float32)
    expected = [0, 0, 3 / 16 - 2 / 64, 0.5, 1, 1]
    np.testing.assert_allclose(synthetic._step(values, 2, 6), expected)
    np.testing.assert_allclose(synthetic._step(values, 6, 2), 1 - np.array(expected))


def test_a_colour_is_laid_on_by_its_opacity() -> None:
    under = np.full((1, 3, 3), (0.2, 0.4, 0.6), np.float32)
    share = np.array([[0, 0.25, 1]], np.float32)
    mixed = synthetic._mix(under, (1.0, 0.0, 0.6), share)
    np.testing.assert_allclose(mixed[0], [(0.2, 0.4, 0.6), (0.4, 0.3, 0.6), (1, 0, 0.6)], atol=1e-6)


def test_a_blend_lies_between_its_colours() -> None:
    rng = np.random.default_rng(0)
    palette = ((0.0, 0.5, 1.0), (1.0, 0.5, 0.0))
    colours = np.stack([synthetic._blend(rng, palette) for _ in range(400)])
    np.testing.assert_allclose(colours[:, 1], 0.5, atol=1e-6)
    np.testing.assert_allclose(colours[:, 0] + colours[:, 2], 1, atol=1e-6)
    # Dirichlet of twice 0.5 is an arc sine: mean 1/2, and a third of all below sin^2(30 degrees).
    assert abs(colours[:, 0].mean() - 0.5) < 0.08
    assert abs((colours[:, 0] < 0.25).mean() - 1 / 3) < 0.1


def test_clouds_are_noise_around_zero_with_lumps_of_a_size() -> None:
    rng = np.random.default_rng(0)
    fields = [synthetic._clouds(rng, (150, 100), 20) for _ in range(20)]
    assert fields[0].shape == (150, 100)
    assert abs(np.mean([field.mean() for field in fields])) < 0.15
    assert 0.75 < np.mean([field.std() for field in fields]) < 1.25

    def likeness(distance: int) -> float:
        return float(np.mean([np.corrcoef(f[distance:].ravel(), f[:-distance].ravel())[0, 1]
                              for f in fields]))  # fmt: skip

    assert likeness(2) > 0.9
    assert likeness(60) < 0.3


def flat_leaf(height: int = 60, width: int = 80) -> synthetic._Leaf:
    rows, columns = np.indices((height, width), np.float32)
    return synthetic._Leaf(
        along=columns / width,
        across=rows / height - 0.5,
        mask=np.ones((height, width), np.float32),
        depth=np.full((height, width), 0.1, np.float32),
        pixels=40.0,
    )


def test_a_lesion_is_0_in_its_middle_1_at_its_radius_and_3_at_most() -> None:
    at = np.zeros((60, 80), bool)
    at[20, 50] = True
    for seed in range(5):
        rng = np.random.default_rng(seed)
        field = synthetic._lesions(rng, flat_leaf(), np.array([0.2]), at=at)  # of 40: 8 pixels
        assert field[20, 50] == 0
        assert field.max() == 3
        assert 0.75 <= field[28, 50] <= 1.4  # stretched by at most 1.25, and sheared by 0.3
        assert field[12, 50] == pytest.approx(field[28, 50], abs=1e-6)
        assert 0.79 <= field[20, 58] <= 1.26
        assert field[20, 42] == pytest.approx(field[20, 58], abs=1e-6)
        assert field[20, 54] == pytest.approx(field[20, 58] / 2, abs=1e-6)


def test_of_two_lesions_the_nearer_one_counts_and_none_is_under_a_pixel() -> None:
    at = np.zeros((60, 80), bool)
    at[20, 50] = True
    many = synthetic._lesions(np.random.default_rng(0), flat_leaf(), np.full(9, 0.2), at=at)
    each = []
    rng = np.random.default_rng(0)
    for _ in range(9):
        each.append(synthetic._lesions(rng, flat_leaf(), np.array([0.2]), at=at))
    np.testing.assert_allclose(many, np.min(each, axis=0), atol=1e-6)
    tiny = synthetic._lesions(np.random.default_rng(0), flat_leaf(), np.array([1e-6]), at=at)
    assert tiny[20, 51] < 2


def test_a_leaf_has_its_foot_at_0_and_its_tip_at_1() -> None:
    """As long as 0.92 to 1.02 of the shorter side, near the middle, and deep inside its margin."""
    for seed in range(6):
        leaf = synthetic._place_leaf(np.random.default_rng(seed), 120, 200)
        assert leaf.mask.shape == leaf.along.shape == leaf.across.shape == (120, 200)
        assert 0.92 * 120 <= leaf.pixels <= 1.02 * 120
        blade = leaf.depth > 0.02
        assert leaf.mask[blade].min() > 0.5
        assert -0.05 < leaf.along[blade].min() < 0.35
        assert 0.65 < leaf.along[blade].max() < 1.05
        assert abs(leaf.across[blade].mean()) < 0.08
        assert 0.2 < np.abs(leaf.across[blade]).max() < 0.55
        # One pixel along the midrib is a pixel's share of a leaf length.
        slope = np.hypot(*np.gradient(leaf.along.astype(float)))
        np.testing.assert_allclose(slope * leaf.pixels, 1, rtol=1e-3)
        middle = np.argwhere(blade).mean(axis=0) / (120, 200)
        assert np.abs(middle - 0.5).max() < 0.2


def test_photographs_vary_in_size_by_the_shares() -> None:
    assert sum(synthetic.SIZE_SHARES) == pytest.approx(1)
    assert len(synthetic.SIZES) == len(synthetic.SIZE_SHARES)


def test_every_sixth_photograph_is_turned_and_each_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def black(label: str, *, seed: int, width: int, height: int) -> NDArray[np.uint8]:
        return np.zeros((height, width, 3), np.uint8)

    monkeypatch.setattr(synthetic, "draw_leaf", black)
    told: list[int] = []
    assert synthetic.write_photographs(tmp_path, per_class=6, advance=told.append) == 18
    assert told == [1] * 18
    turned = {}
    for path in tmp_path.rglob("*.jpg"):
        with Image.open(path) as photo:
            turned[path.name] = photo.getexif().get(synthetic.ORIENTATION_TAG, 1) != 1
    assert turned == {f"leaf_{i:04d}.jpg": i == 6 for i in range(1, 7)}


def test_a_photograph_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    synthetic.write_photographs(tmp_path / "few", per_class=1)
    synthetic.write_photographs(tmp_path / "more", per_class=2)
    few, more = read_all(tmp_path / "few"), read_all(tmp_path / "more")
    assert few == {name: data for name, data in more.items() if "0001" in name}


def test_the_smallest_leaf_and_the_smallest_seed(tmp_path: Path) -> None:
    for width, height in ((32, 40), (40, 32)):
        assert synthetic.draw_leaf("healthy", seed=0, width=width, height=height).shape[:2] == (
            height,
            width,
        )
        with pytest.raises(UserError):
            synthetic.draw_leaf("healthy", seed=0, width=width - 9, height=height)
    with pytest.raises(UserError, match="got 32 x 31"):
        synthetic.draw_leaf("healthy", seed=0, width=32, height=31)


def test_odd_pictures_are_written_and_one_of_them_cannot_be_decoded(tmp_path: Path) -> None:
    assert synthetic.write_odd(tmp_path / "a") == 5
    synthetic.write_odd(tmp_path / "b")
    assert read_all(tmp_path / "a") == read_all(tmp_path / "b")
    pixels = {}
    for path in (tmp_path / "a").iterdir():
        with Image.open(path) as photo:
            if path.stem == "broken":
                with pytest.raises(OSError, match="truncated"):
                    photo.load()
            else:
                pixels[path.stem] = np.asarray(photo, np.float32)
    assert sorted(pixels) == ["blurred", "both_blights", "covered_lens", "no_leaf"]
    assert pixels["covered_lens"].std(axis=(0, 1)).max() < 30
    assert pixels["covered_lens"][..., 0].mean() > 1.2 * pixels["covered_lens"][..., 1].mean()
    steps = {name: float(np.abs(np.diff(image, axis=0)).mean()) for name, image in pixels.items()}
    assert steps["blurred"] < steps["both_blights"] / 4
    red, green, _ = pixels["no_leaf"].transpose(2, 0, 1)
    assert (green > red).mean() < 0.05
    with pytest.raises(UserError, match="got -1"):
        synthetic.write_odd(tmp_path / "c", seed=-1)
