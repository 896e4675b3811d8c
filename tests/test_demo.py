"""The drawn photographs: repeatable, told apart by their lesions, stored like a camera's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from leafnet import demo
from leafnet.errors import UserError


@pytest.mark.parametrize("label", demo.CLASS_NAMES)
def test_a_leaf_is_the_same_for_the_same_arguments_and_another_for_others(label: str) -> None:
    leaf = demo.draw_leaf(label, seed=3, width=96, height=64)
    assert leaf.shape == (64, 96, 3)
    assert leaf.dtype == np.uint8
    np.testing.assert_array_equal(leaf, demo.draw_leaf(label, seed=3, width=96, height=64))
    assert (leaf != demo.draw_leaf(label, seed=4, width=96, height=64)).mean() > 0.5


def brown_share(label: str, seed: int) -> float:
    """Share of pixels redder than green in the middle of a leaf, where little ground shows."""
    red, green, _ = demo.draw_leaf(label, seed=seed)[64:192, 64:192].transpose(2, 0, 1) / 255
    return float((red > 1.05 * green).mean())


def test_blighted_leaves_are_browner() -> None:
    brown = {
        label: np.mean([brown_share(label, seed) for seed in range(30)])
        for label in demo.CLASS_NAMES
    }
    assert brown["early_blight"] > 2 * brown["healthy"]
    assert brown["late_blight"] > 2 * brown["healthy"]


@pytest.mark.parametrize(("width", "height"), [(32, 32), (33, 500), (1024, 768)])
@pytest.mark.parametrize("label", demo.CLASS_NAMES)
def test_small_narrow_and_large_pictures_are_drawn(label: str, width: int, height: int) -> None:
    leaf = demo.draw_leaf(label, seed=0, width=width, height=height)
    assert leaf.shape == (height, width, 3)
    assert leaf.std() > 8  # something is on it


def read_all(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.*")}


def test_photographs_are_counted_distinct_and_the_same_on_each_run(tmp_path: Path) -> None:
    assert demo.write_photographs(tmp_path / "a", per_class=7, seed=5) == 21
    assert demo.write_photographs(tmp_path / "b", per_class=7, seed=5) == 21
    first, again = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert sorted(first) == [f"{c}/leaf_{n:04d}.jpg" for c in demo.CLASS_NAMES for n in range(1, 8)]
    assert first == again
    assert len(set(first.values())) == 21


def test_another_seed_gives_other_photographs(tmp_path: Path) -> None:
    for seed in (0, 1):
        demo.write_photographs(tmp_path / str(seed), per_class=1, seed=seed)
    photos = [path.read_bytes() for path in tmp_path.rglob("*.jpg")]
    assert len(set(photos)) == 6


def test_turned_photographs_are_set_upright_by_their_exif_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ramp(label: str, *, seed: int, width: int, height: int) -> NDArray[np.uint8]:
        """[height, width, 3]: red grows to the right and green downwards."""
        red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        return np.stack([red, green, 0 * red], axis=-1).astype(np.uint8)

    monkeypatch.setattr(demo, "draw_leaf", ramp)
    demo.write_photographs(tmp_path, per_class=48)
    orientations, sizes = [], set()
    for path in tmp_path.rglob("*.jpg"):
        with Image.open(path) as photo:
            orientations.append(photo.getexif().get(demo.ORIENTATION_TAG, 1))
            upright = ImageOps.exif_transpose(photo)
        sizes.add(upright.size)
        red, green, _ = np.asarray(upright, np.float32).transpose(2, 0, 1)
        assert red[:, -8:].mean() > red[:, :8].mean() + 100, path
        assert green[-8:].mean() > green[:8].mean() + 100, path
    assert sizes <= set(demo.SIZES)
    assert set(orientations) == {1, 3, 6, 8}
    assert sum(o != 1 for o in orientations) == len(orientations) / 6


def test_jpeg_quality_varies(tmp_path: Path) -> None:
    demo.write_photographs(tmp_path, per_class=3)
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
        demo.draw_leaf(**arguments)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("arguments", "reason"), [({"per_class": 0}, "bad-count"), ({"seed": -1}, "bad-seed")]
)
def test_nothing_is_written_for_a_wrong_count_or_seed(
    tmp_path: Path, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        demo.write_photographs(tmp_path / "photos", **arguments)
    assert caught.value.reason == reason
    assert not (tmp_path / "photos").exists()
