import hashlib
import pickle
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.ndimage

from leafnet.core import storage
from leafnet.core.errors import DamagedParts
from leafnet.data.shards import Shard
from leafnet.features import cache as features_cache
from leafnet.features import moments
from leafnet.features.cache import (
    Part,
    Plan,
    assemble,
    cache_key,
    evict,
    mark_used,
    read_part,
    write_part,
)
from leafnet.features.moments import Moments
from leafnet.features.views import draw_view
from leafnet.models.weights import FEATURES


def shard(name: str, row_groups: Sequence[int], split: str = "train") -> Shard:
    digest = name.encode().hex().ljust(64, "0")
    return Shard(name, split, sum(row_groups), tuple(row_groups), 1, digest)


def fill(root: str, part: Part) -> None:
    """Features that say where they belong: row group, row and view."""
    views = np.arange(part.first, part.stop)
    rows = np.arange(part.rows) + 100 * part.row_group
    values = rows[:, None, None] + views[None, :, None] / 8 + np.zeros(FEATURES)
    write_part(root, part, values.astype(np.float16), np.arange(part.rows, dtype=np.int32))


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)


def test_view_0_is_the_photograph() -> None:
    pixels = picture()
    assert draw_view(pixels, key="a", number=0, seed=0) is pixels


def test_views_are_a_function_of_key_number_and_seed() -> None:
    pixels = picture()
    draws = [("a", 1, 0), ("a", 2, 0), ("b", 1, 0), ("a", 1, 1)]
    views = [draw_view(pixels, key=k, number=n, seed=s) for k, n, s in draws]
    for i, view in enumerate(views):
        assert view.shape == pixels.shape
        assert view.dtype == np.uint8
        for other in views[i + 1 :]:
            assert (view != other).any()
    again = draw_view(pixels, key="a", number=1, seed=0)
    np.testing.assert_array_equal(again, views[0])


def test_views_flip_both_ways_and_turn_at_most_a_fifth() -> None:
    """One channel has a bright upper half, another a bright left half."""
    pixels = np.zeros((65, 65, 3), np.uint8)
    pixels[:32, :, 0] = 255
    pixels[:, :32, 1] = 255
    views = [draw_view(pixels, key=str(i), number=1, seed=0) for i in range(200)]
    turns, mirrored = [], []
    for view in views:
        # How each channel falls to the right and downwards.
        (x0, y0), (x1, y1) = (
            (-right.sum(), -down.sum())
            for down, right in (np.gradient(view[20:45, 20:45, i].astype(float)) for i in (0, 1))
        )
        turn = np.arctan2(x0, y0) / (2 * np.pi)
        turns.append((turn + 0.25) % 0.5 - 0.25)  # an upside-down picture is turned as well
        mirrored.append(x1 * y0 - x0 * y1 < 0)
    # A uniform distribution over [-0.2, 0.2] has the deviation 0.2 / sqrt(3).
    assert np.abs(turns).max() == pytest.approx(0.2, abs=0.01)
    assert np.mean(turns) == pytest.approx(0.0, abs=0.03)
    assert np.std(turns) == pytest.approx(0.2 / np.sqrt(3), abs=0.015)
    top_is_bright = [view[:10, :, 0].mean() > view[-10:, :, 0].mean() for view in views]
    assert 80 < sum(top_is_bright) < 120
    assert 80 < sum(mirrored) < 120  # an even number of flips only turns a picture
    assert 25 < sum(np.logical_and(mirrored, top_is_bright)) < 75


class Drawn:
    """A generator that draws these flips and this turn."""

    def __init__(self, left_right: int, up_down: int, turn: float) -> None:
        self.flips, self.turn = (left_right, up_down), turn

    def integers(self, *args: Any) -> tuple[int, int]:
        return self.flips

    def uniform(self, *args: Any) -> float:
        return self.turn


def drawn_view(
    monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray, *, flips: tuple[int, int], turn: float
) -> np.ndarray:
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: Drawn(*flips, turn))
        return draw_view(pixels, key="a", number=1, seed=0)


def test_a_flip_moves_every_pixel_to_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = picture()
    for flips in [(0, 0), (1, 0), (0, 1), (1, 1)]:
        view = drawn_view(monkeypatch, pixels, flips=flips, turn=0.0)
        expected = np.flip(pixels, axis=tuple(axis for axis in (0, 1) if flips[1 - axis]))
        np.testing.assert_array_equal(view, expected)


def test_a_quarter_turn_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    for side in (32, 33):
        pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
        view = drawn_view(monkeypatch, pixels, flips=(0, 0), turn=0.25)
        np.testing.assert_array_equal(view, np.rot90(pixels))


def test_a_view_is_flipped_and_then_turned_about_its_middle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = picture()
    view = drawn_view(monkeypatch, pixels, flips=(1, 0), turn=0.15)
    expected = scipy.ndimage.rotate(
        pixels[:, ::-1].astype(float), 0.15 * 360, reshape=False, order=1, mode="reflect"
    )
    # OpenCV takes places to a 32nd of a pixel, of which neighbours in this noise differ by 85.
    assert np.abs(view - expected).mean() < 3


def test_a_view_is_drawn_from_its_seed_number_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1, of which caches are full: another stream needs another version."""
    seeds: list[int] = []
    pixels = picture()

    def seeded(seed: int) -> Drawn:
        seeds.append(seed)
        return Drawn(0, 0, 0.0)

    monkeypatch.setattr(np.random, "default_rng", seeded)
    draw_view(pixels, key="a/b.jpg", number=4, seed=17)
    digest = hashlib.blake2b(b"17/4/a/b.jpg", digest_size=8).digest()
    assert seeds == [sum(byte << 8 * place for place, byte in enumerate(digest))]


def test_turned_in_pixels_mirror_the_edge() -> None:
    view = draw_view(np.full((32, 32, 3), 77, np.uint8), key="a", number=3, seed=0)
    np.testing.assert_array_equal(view, 77)


def test_key_covers_all_that_changes_a_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    base: dict[str, Any] = {"weights_fingerprint": "w", "image_size": 256, "precision": "float32"}
    changes: list[dict[str, Any]] = [
        {"weights_fingerprint": "v"},
        {"image_size": 128},
        {"precision": "bfloat16"},
    ]
    keys = {cache_key(**{**base, **change}) for change in [{}, *changes]}
    monkeypatch.setattr(features_cache, "DECODER_VERSION", 99)
    keys.add(cache_key(**base))
    assert len(keys) == 5


def test_the_key_is_16_digits_over_sorted_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_cache, "DECODER_VERSION", 7)
    content = b'{"decoder": 7, "image_size": 64, "precision": "bfloat16", "weights": "ab"}'
    found = cache_key(weights_fingerprint="ab", image_size=64, precision="bfloat16")
    assert found == hashlib.sha256(content).hexdigest()[:16]


def test_a_part_is_named_after_shard_row_group_augmentation_and_views() -> None:
    one = shard("s1", [4, 3, 2, 1])
    way = hashlib.sha256(b"flips, rotation 0.2, reflect, version 1, seed 5").hexdigest()[:12]
    assert Part(one, 3, 0, 1, 5).name == f"{one.sha256[:16]}/g0003.plain.parquet"
    assert Part(one, 3, 1, 8, 5).name == f"{one.sha256[:16]}/g0003.{way}.v1-8.parquet"
    assert Part(one, 1, 1, 8, 5).rows == 3


@pytest.mark.parametrize(
    ("there", "views", "present", "missing"),
    [
        ([(1, 3), (5, 9)], 12, [(1, 3), (5, 9)], [(3, 5), (9, 12)]),
        ([(4, 6), (8, 9)], 9, [(4, 6), (8, 9)], [(1, 4), (6, 8)]),
        ([(5, 9)], 4, [], [(1, 4)]),
        ([(1, 3), (1, 6)], 6, [(1, 6)], []),
        ([(1, 3), (3, 5)], 3, [(1, 3)], []),
        ([(1, 6)], 4, [(1, 6)], []),
        ([(1, 3)], 2, [(1, 3)], []),
        ([(1, 3)], 1, [], []),
    ],
)
def test_plan_takes_the_ranges_that_are_there_and_fills_the_gaps(
    tmp_path: Path,
    there: list[tuple[int, int]],
    views: int,
    present: list[tuple[int, int]],
    missing: list[tuple[int, int]],
) -> None:
    one = shard("s1", [1])
    for first, stop in [(0, 1), *there]:
        storage.write_bytes(f"{tmp_path}/{Part(one, 0, first, stop, 0).name}", b"")
    plan = features_cache.plan(str(tmp_path), [(one, views)], seed=0)
    assert [(part.first, part.stop) for part in plan.present] == [(0, 1), *present]
    assert [(part.first, part.stop) for part in plan.missing] == missing


def test_parts_are_in_order_of_shard_row_group_and_view() -> None:
    a, b = shard("a", [4, 3]), shard("b", [2])
    ordered = [Part(a, 0, 0, 1, 0), Part(a, 0, 1, 3, 0), Part(a, 1, 0, 1, 0), Part(b, 0, 0, 1, 0)]
    plan = Plan("", (ordered[3], ordered[1]), (ordered[2], ordered[0]))
    assert list(plan.parts) == ordered


def test_a_part_is_a_table_of_rows_and_views(tmp_path: Path) -> None:
    part = Part(shard("s1", [2]), 0, 3, 5, 0)
    values = np.arange(4, dtype=np.float16)[:, None] + np.zeros(FEATURES, np.float16)
    write_part(str(tmp_path), part, values.reshape(2, 2, FEATURES), np.array([7, 5], np.int32))
    table = pq.read_table(tmp_path / part.name)
    assert table.drop_columns("features").to_pydict() == {
        "row": [0, 0, 1, 1],
        "view": [3, 4, 3, 4],
        "label": [7, 7, 5, 5],
    }
    assert table.schema.types == [pa.int32()] * 3 + [pa.list_(pa.float16(), FEATURES)]
    assert [row[0] for row in table["features"].to_pylist()] == [0, 1, 2, 3]
    found = read_part(str(tmp_path), part)
    assert found is not None
    np.testing.assert_array_equal(found[0], values.reshape(2, 2, FEATURES))
    np.testing.assert_array_equal(found[1], [7, 5])
    assert [array.dtype.name for array in found] == ["float16", "int32"]


def test_features_are_stored_as_they_are(tmp_path: Path) -> None:
    """They have nothing to compress."""
    part = Part(shard("s1", [64]), 0, 0, 1, 0)
    fill(str(tmp_path), part)
    column = pq.read_metadata(tmp_path / part.name).row_group(0).column(3)
    assert column.path_in_schema.startswith("features")
    assert column.compression == "UNCOMPRESSED"
    assert not column.has_dictionary_page


def test_a_part_of_another_shape_is_not_read(tmp_path: Path) -> None:
    part = Part(shard("s1", [2]), 0, 3, 5, 0)
    place = tmp_path / part.name
    place.parent.mkdir()
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(8, np.float16)), 2)
    pq.write_table(pa.table({"label": [0, 0, 1, 1], "features": column}), place)
    assert read_part(str(tmp_path), part) is None
    pq.write_table(pa.table({"label": [0, 0, 1, 1]}), place)
    assert read_part(str(tmp_path), part) is None


def test_plan_computes_only_what_is_missing(tmp_path: Path) -> None:
    root, of_two = str(tmp_path), shard("s1", [4, 3])
    first = features_cache.plan(root, [(of_two, 3)], seed=0)
    assert [(p.row_group, p.first, p.stop) for p in first.missing] == [
        (0, 0, 1), (0, 1, 3), (1, 0, 1), (1, 1, 3),
    ]  # fmt: skip
    for part in first.missing[:3]:
        fill(root, part)
    interrupted = features_cache.plan(root, [(of_two, 3)], seed=0)
    assert interrupted.missing == first.missing[3:]
    fill(root, first.missing[3])
    assert features_cache.plan(root, [(of_two, 3)], seed=0).missing == ()
    more = features_cache.plan(root, [(of_two, 8)], seed=0)
    assert [(p.row_group, p.first, p.stop) for p in more.missing] == [(0, 3, 8), (1, 3, 8)]
    fewer = features_cache.plan(root, [(of_two, 2)], seed=0)
    assert fewer.missing == ()
    assert features_cache.plan(root, [(of_two, 1)], seed=0).missing == ()


def test_another_seed_keeps_the_plain_view_only(tmp_path: Path) -> None:
    root, one = str(tmp_path), shard("s1", [4])
    for part in features_cache.plan(root, [(one, 3)], seed=0).missing:
        fill(root, part)
    other = features_cache.plan(root, [(one, 3)], seed=1)
    assert [(p.first, p.stop) for p in other.missing] == [(1, 3)]


def test_another_shard_is_missing(tmp_path: Path) -> None:
    root, one = str(tmp_path), shard("s1", [4])
    for part in features_cache.plan(root, [(one, 1)], seed=0).missing:
        fill(root, part)
    both = features_cache.plan(root, [(one, 1), (shard("s2", [2]), 1)], seed=0)
    assert [part.shard.name for part in both.missing] == ["s2"]


@pytest.mark.parametrize("views", [1, 2, 5])
def test_assemble_puts_everything_in_its_place(tmp_path: Path, views: int) -> None:
    root = str(tmp_path / "cache")
    both = [shard("s1", [4, 3]), shard("s2", [2])]
    for count in (2, 5):  # the second time only what is missing
        for part in features_cache.plan(root, [(s, count) for s in both], seed=0).missing:
            fill(root, part)
    plan = features_cache.plan(root, [(s, views) for s in both], seed=0)
    split = assemble(root, plan.parts, views, path=str(tmp_path / "split.npy"))
    rows = np.array([0, 1, 2, 3, 100, 101, 102, 0, 1])
    expected = rows[:, None] + np.arange(views) / 8
    assert isinstance(split.features, np.memmap)
    np.testing.assert_array_equal(split.features[..., 0], expected.astype(np.float16))
    np.testing.assert_array_equal(split.labels, [0, 1, 2, 3, 0, 1, 2, 0, 1])


def test_no_parts_no_features(tmp_path: Path) -> None:
    split = assemble(str(tmp_path), [], 3, path=str(tmp_path / "split.npy"))
    assert split.features.shape == (0, 1, 2048)
    assert split.labels.shape == (0,)
    assert [array.dtype.name for array in split] == ["float16", "int32"]


def test_one_example_is_a_split(tmp_path: Path) -> None:
    root = str(tmp_path / "cache")
    (part,) = features_cache.plan(root, [(shard("s1", [1]), 1)], seed=0).missing
    fill(root, part)
    split = assemble(root, [part], 1, path=str(tmp_path / "split.npy"))
    assert split.features.shape == (1, 1, 2048)
    assert not split.features.flags.writeable


@pytest.mark.parametrize(("parts", "at_once"), [(0.9, 1), (3.1, 3), (1000, storage.AT_ONCE)])
def test_parts_are_read_together_as_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: float, at_once: int
) -> None:
    """The largest part here is 4 rows of 2 views of 2,048 numbers of 2 bytes, of views 1 and 2."""
    root, asked = str(tmp_path / "cache"), []
    plan = features_cache.plan(root, [(shard("s1", [4, 3]), 3)], seed=0)
    for part in plan.missing:
        fill(root, part)
    each = storage.each

    def spied(*args: Any, at_once: int = -1) -> Any:
        asked.append(at_once)
        return each(*args, at_once=at_once)

    monkeypatch.setattr(storage, "each", spied)
    monkeypatch.setattr(features_cache, "_AT_ONCE_BYTES", int(parts * 4 * 2 * 2048 * 2))
    assemble(root, plan.parts, 3, path=str(tmp_path / "split.npy"))
    assert asked == [at_once]


def test_damaged_parts_are_told_also_to_another_process() -> None:
    error = DamagedParts(["s1/g0001.plain.parquet", "s2/g0000.plain.parquet"])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == "2 damaged or missing parts, the first: s1/g0001.plain.parquet"
    assert again.names == error.names


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone", "other"])
def test_damaged_parts_are_found(tmp_path: Path, damage: str) -> None:
    root = str(tmp_path / "cache")
    plan = features_cache.plan(root, [(shard("s1", [4, 3]), 2)], seed=0)
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
        assemble(root, plan.parts, 2, path=str(tmp_path / "split.npy"))
    assert caught.value.names == (plan.missing[1].name,)


def test_moments_are_sums_in_float64() -> None:
    """Of more rows than a block has, of values whose squares float16 cannot hold."""
    values = np.random.default_rng(0).normal(300, 2, (1500, 3, 7)).astype(np.float16)
    vectors, total, squares = moments.moments(values)
    flat = values.reshape(-1, 7).astype(np.float64)
    assert vectors == 4500
    np.testing.assert_allclose(total, flat.sum(axis=0), rtol=1e-13)
    np.testing.assert_allclose(squares, (flat**2).sum(axis=0), rtol=1e-13)
    rows = np.random.default_rng(1).permutation(1500)[:1100]
    some = moments.moments(values, rows)
    assert some.vectors == 3300
    chosen = values[rows].reshape(-1, 7).astype(np.float64)
    np.testing.assert_allclose(some.total, chosen.sum(axis=0), rtol=1e-13)
    np.testing.assert_allclose(some.squares, (chosen**2).sum(axis=0), rtol=1e-13)


def test_moments_take_a_block_at_a_time() -> None:
    """All of them in float64 would be 41 MB, a block is half a megabyte."""
    values = np.ones((20_000, 4, 64), np.float16)
    tracemalloc.start()
    moments.moments(values)
    moments.moments(values, np.arange(20_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6


def test_moments_of_more_views_than_a_block_has() -> None:
    values = np.ones((2, moments.BLOCK + 1, 3), np.float16)
    assert moments.moments(values).total.tolist() == [2 * (moments.BLOCK + 1)] * 3


def test_statistics_of_unequal_parts_are_those_of_all() -> None:
    generator = np.random.default_rng(0)
    parts = [generator.normal(i, 1 + i, (n, 2, 5)).astype(np.float16) for i, n in [(1, 30), (4, 7)]]
    mean, deviation = moments.statistics(*map(moments.moments, parts))
    flat = np.concatenate(parts).reshape(-1, 5).astype(np.float64)
    np.testing.assert_allclose(mean, flat.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(deviation, flat.std(axis=0), rtol=1e-6)
    assert mean.dtype == deviation.dtype == np.float32


@pytest.mark.parametrize("value", [0.1, -0.1, 2.7, 1234.5, 6e-8, 0.0])
def test_a_constant_feature_is_not_blown_up(value: float) -> None:
    """Its sums in float64 are rounded, which is no spread."""
    values = np.full((3333, 3, 1), value, np.float16)
    assert moments.statistics(moments.moments(values))[1] == 1.0


def test_the_last_bit_of_few_vectors_is_no_spread_and_of_half_of_them_is_one() -> None:
    values = np.full((10_000, 1, 2), 3.0, np.float16)
    values[0] = values[::2, :, 1] = np.nextafter(np.float16(3), np.float16(4))
    _, deviation = moments.statistics(moments.moments(values))
    assert deviation[0] == 1.0
    assert deviation[1] == pytest.approx(2**-9 / 2, rel=1e-3)  # float16 has 10 bits behind 2


@pytest.mark.parametrize("mean", [2.0, -2.0, 500.0])
def test_a_spread_counts_from_a_ten_thousandth_of_the_mean(mean: float) -> None:
    spread = np.array([0.8e-4, 1.2e-4, 1.0]) * abs(mean)
    part = Moments(1, np.full(3, mean), mean**2 + spread**2)
    _, deviation = moments.statistics(part)
    np.testing.assert_allclose(deviation, [1.0, *spread[1:]], rtol=1e-4)


def test_a_small_spread_around_zero_counts() -> None:
    part = Moments(1, np.zeros(3), np.square([1e-6, 3e-12, 0.3e-12]))
    np.testing.assert_allclose(moments.statistics(part)[1], [1e-6, 3e-12, 1.0], rtol=1e-4)


def test_statistics_are_those_of_all_views() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(3.0, 2.0, (5000, 3, 7)).astype(np.float16)
    values[..., 2] = 0.0
    values[..., 3] = 100.0
    mean, deviation = moments.statistics(moments.moments(values))
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
        mark_used(str(tmp_path / name))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "data").write_bytes(bytes(10_000))
    monkeypatch.setattr("time.time", lambda: 999.0)
    mark_used(str(tmp_path / "mine"))
    assert evict(cache, max_gb=1.0, keep="mine") == []
    assert evict(cache, max_gb=2200e-9, keep="mine") == ["old", "newer"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "mine", "newest"]
    assert evict(cache, max_gb=1e-9, keep="mine") == ["newest"]


def test_a_cache_may_be_as_large_as_its_limit(tmp_path: Path) -> None:
    """Of all files in it."""
    for name in ("a", "b"):
        (tmp_path / name / "shard").mkdir(parents=True)
        for part in range(5):
            (tmp_path / name / "shard" / str(part)).write_bytes(bytes(700))
        mark_used(str(tmp_path / name))
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 7000 < size < 7200
    assert evict(str(tmp_path), max_gb=size / 1e9, keep="b") == []
    assert evict(str(tmp_path), max_gb=(size - 1) / 1e9, keep="b") == ["a"]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_part_with_a_value_that_is_not_finite_is_damaged(value: float, tmp_path: Path) -> None:
    """It is no fault of whoever learns from it, and is computed again."""
    root = str(tmp_path)
    whole, other = features_cache.plan(root, [(shard("s", [3]), 2)], seed=0).missing
    for part in (whole, other):
        fill(root, part)
    read = read_part(root, other)
    assert read is not None
    features, labels = read[0].copy(), read[1]
    features[-1, -1, -1] = value
    write_part(root, other, features, labels)
    assert read_part(root, whole) is not None
    with pytest.raises(DamagedParts) as caught:
        assemble(root, [whole, other], 2, path=str(tmp_path / "mapped.npy"))
    assert caught.value.names == (other.name,)
