from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leafnet import features
from leafnet.backbone import FEATURES
from leafnet.features import DamagedParts, Part
from leafnet.shards import Shard


def shard(name: str, row_groups: Sequence[int], split: str = "train") -> Shard:
    digest = name.encode().hex().ljust(64, "0")
    return Shard(name, split, sum(row_groups), tuple(row_groups), 1, digest)


def fill(root: str, part: Part) -> None:
    """Features that say where they belong: row group, row and view."""
    views = np.arange(part.first, part.stop)
    rows = np.arange(part.rows) + 100 * part.row_group
    values = rows[:, None, None] + views[None, :, None] / 8 + np.zeros(FEATURES)
    features.write_part(root, part, values.astype(np.float16), np.arange(part.rows, dtype=np.int32))


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)


def test_view_0_is_the_photograph() -> None:
    pixels = picture()
    assert features.draw_view(pixels, key="a", number=0, seed=0) is pixels


def test_views_are_a_function_of_key_number_and_seed() -> None:
    pixels = picture()
    draws = [("a", 1, 0), ("a", 2, 0), ("b", 1, 0), ("a", 1, 1)]
    views = [features.draw_view(pixels, key=k, number=n, seed=s) for k, n, s in draws]
    for i, view in enumerate(views):
        assert view.shape == pixels.shape
        assert view.dtype == np.uint8
        for other in views[i + 1 :]:
            assert (view != other).any()
    again = features.draw_view(pixels, key="a", number=1, seed=0)
    np.testing.assert_array_equal(again, views[0])


def test_views_flip_both_ways_and_turn_at_most_a_fifth() -> None:
    """A bright half tells which way a view was flipped, a bright row by how much it turned."""
    pixels = np.zeros((65, 65, 3), np.uint8)
    pixels[:32] = 255
    ups = [features.draw_view(pixels, key=str(i), number=1, seed=0) for i in range(60)]
    top_is_bright = [view[:10].mean() > view[-10:].mean() for view in ups]
    assert 15 < sum(top_is_bright) < 45
    for view in ups:
        down, right = np.gradient(view[20:45, 20:45, 0].astype(float))
        turn = np.arctan2(right.sum(), down.sum()) / (2 * np.pi)
        assert min(abs(turn), abs(0.5 - abs(turn))) < features.MAX_TURN + 0.01


def test_turned_in_pixels_mirror_the_edge() -> None:
    view = features.draw_view(np.full((32, 32, 3), 77, np.uint8), key="a", number=3, seed=0)
    np.testing.assert_array_equal(view, 77)


def test_key_covers_all_that_changes_a_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    base: dict[str, Any] = {"weights_fingerprint": "w", "image_size": 256, "precision": "float32"}
    changes: list[dict[str, Any]] = [
        {"weights_fingerprint": "v"},
        {"image_size": 128},
        {"precision": "bfloat16"},
    ]
    keys = {features.cache_key(**{**base, **change}) for change in [{}, *changes]}
    monkeypatch.setattr(features, "DECODER_VERSION", 99)
    keys.add(features.cache_key(**base))
    assert len(keys) == 5


def test_plan_computes_only_what_is_missing(tmp_path: Path) -> None:
    root, of_two = str(tmp_path), shard("s1", [4, 3])
    first = features.plan(root, [(of_two, 3)], seed=0)
    assert [(p.row_group, p.first, p.stop) for p in first.missing] == [
        (0, 0, 1), (0, 1, 3), (1, 0, 1), (1, 1, 3),
    ]  # fmt: skip
    for part in first.missing[:3]:
        fill(root, part)
    interrupted = features.plan(root, [(of_two, 3)], seed=0)
    assert interrupted.missing == first.missing[3:]
    fill(root, first.missing[3])
    assert features.plan(root, [(of_two, 3)], seed=0).missing == ()
    more = features.plan(root, [(of_two, 8)], seed=0)
    assert [(p.row_group, p.first, p.stop) for p in more.missing] == [(0, 3, 8), (1, 3, 8)]
    fewer = features.plan(root, [(of_two, 2)], seed=0)
    assert fewer.missing == ()
    assert features.plan(root, [(of_two, 1)], seed=0).missing == ()


def test_another_seed_keeps_the_plain_view_only(tmp_path: Path) -> None:
    root, one = str(tmp_path), shard("s1", [4])
    for part in features.plan(root, [(one, 3)], seed=0).missing:
        fill(root, part)
    other = features.plan(root, [(one, 3)], seed=1)
    assert [(p.first, p.stop) for p in other.missing] == [(1, 3)]


def test_another_shard_is_missing(tmp_path: Path) -> None:
    root, one = str(tmp_path), shard("s1", [4])
    for part in features.plan(root, [(one, 1)], seed=0).missing:
        fill(root, part)
    both = features.plan(root, [(one, 1), (shard("s2", [2]), 1)], seed=0)
    assert [part.shard.name for part in both.missing] == ["s2"]


@pytest.mark.parametrize("views", [1, 2, 5])
def test_assemble_puts_everything_in_its_place(tmp_path: Path, views: int) -> None:
    root = str(tmp_path / "cache")
    both = [shard("s1", [4, 3]), shard("s2", [2])]
    for count in (2, 5):  # the second time only what is missing
        for part in features.plan(root, [(s, count) for s in both], seed=0).missing:
            fill(root, part)
    plan = features.plan(root, [(s, views) for s in both], seed=0)
    split = features.assemble(root, plan.parts, views, path=str(tmp_path / "split.npy"))
    rows = np.array([0, 1, 2, 3, 100, 101, 102, 0, 1])
    expected = rows[:, None] + np.arange(views) / 8
    assert isinstance(split.features, np.memmap)
    np.testing.assert_array_equal(split.features[..., 0], expected.astype(np.float16))
    np.testing.assert_array_equal(split.labels, [0, 1, 2, 3, 0, 1, 2, 0, 1])


def test_no_parts_no_features(tmp_path: Path) -> None:
    split = features.assemble(str(tmp_path), [], 3, path=str(tmp_path / "split.npy"))
    assert split.features.shape == (0, 1, 2048)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone", "other"])
def test_damaged_parts_are_found(tmp_path: Path, damage: str) -> None:
    root = str(tmp_path / "cache")
    plan = features.plan(root, [(shard("s1", [4, 3]), 2)], seed=0)
    for part in plan.missing:
        fill(root, part)
    bad = Path(root) / plan.missing[1].name
    data = bad.read_bytes()
    if damage == "cut":
        bad.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        middle = data.index(np.float16(0.125).tobytes() * 8) + 6
        bad.write_bytes(data[:middle] + b"\xff" + data[middle + 1 :])
    elif damage == "empty":
        bad.write_bytes(b"")
    elif damage == "gone":
        bad.unlink()
    else:
        bad.write_bytes((Path(root) / plan.missing[3].name).read_bytes())
    with pytest.raises(DamagedParts) as caught:
        features.assemble(root, plan.parts, 2, path=str(tmp_path / "split.npy"))
    assert caught.value.names == (plan.missing[1].name,)


def test_statistics_are_those_of_all_views() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(3.0, 2.0, (5000, 3, 7)).astype(np.float16)
    values[..., 2] = 0.0
    values[..., 3] = 100.0
    mean, deviation = features.statistics(features.moments(values))
    flat = values.reshape(-1, 7).astype(np.float64)
    np.testing.assert_allclose(mean, flat.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(deviation[[0, 1, 4]], flat.std(axis=0)[[0, 1, 4]], rtol=1e-4)
    assert deviation[2] == deviation[3] == 1.0


def test_evict_the_least_recently_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = str(tmp_path)
    for when, name in enumerate(["old", "newer", "newest", "mine"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_bytes(bytes(1000))
        monkeypatch.setattr("time.time", lambda when=when: 1000.0 + when)
        features.mark_used(str(tmp_path / name))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "data").write_bytes(bytes(10_000))
    monkeypatch.setattr("time.time", lambda: 999.0)
    features.mark_used(str(tmp_path / "mine"))
    assert features.evict(cache, max_gb=1.0, keep="mine") == []
    assert features.evict(cache, max_gb=2200e-9, keep="mine") == ["old", "newer"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "mine", "newest"]
    assert features.evict(cache, max_gb=1e-9, keep="mine") == ["newest"]
