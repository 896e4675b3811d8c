"""What a run will take, against what a run takes."""

from pathlib import Path

import numpy as np
import pytest

from leafnet.data.shards import Shard
from leafnet.features import cache
from leafnet.models.weights import FEATURES
from leafnet.training import estimate
from leafnet.training.loop import Steps

SHARD = Shard("train-00000.parquet", "train", 70, (40, 30), 1, "a" * 64)


def test_steps_and_batches(tmp_path: Path) -> None:
    cached = cache.plan(str(tmp_path), [(SHARD, 8)], seed=0)
    work = estimate.feature_work(cached, batch_size=32, steps=Steps.of(70, 32, 50))
    assert work.views == 70 * 8
    assert work.cached == 0
    # The plain view and the seven others of each row group: 40, 280, 30 and 210 views.
    assert work.batches == 2 + 9 + 1 + 7
    assert (work.steps_per_epoch, work.steps, work.batch_size) == (2, 100, 32)


def test_fewer_examples_than_a_batch(tmp_path: Path) -> None:
    cached = cache.plan(str(tmp_path), [(SHARD, 1)], seed=0)
    work = estimate.feature_work(cached, batch_size=256, steps=Steps.of(70, 512, 3))
    assert (work.batches, work.steps, work.batch_size) == (2, 3, 70)


def test_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    root = str(tmp_path / "key")
    parts = cache.plan(root, [(SHARD, 3)], seed=0).missing
    generator = np.random.default_rng(0)
    for part in parts:
        values = generator.normal(size=(part.rows, part.stop - part.first, FEATURES))
        cache.write_part(root, part, values.astype(np.float16), np.zeros(part.rows, np.int32))
    found = cache.plan(root, [(SHARD, 3)], seed=0)
    assert estimate.feature_work(found, batch_size=1, steps=Steps.of(70, 1, 1)).batches == 0
    size = sum(path.stat().st_size for path in (tmp_path / "key").rglob("*.parquet"))
    assert abs(estimate.cache_bytes(parts) - size) < 0.05 * size

    mapped = tmp_path / "train.npy"
    cache.assemble(root, found.parts, 3, path=str(mapped))
    told = estimate.local_bytes({"train": 70, "valid": 0, "test": 0}, views=3)
    assert abs(told - mapped.stat().st_size) < 0.01 * told


def test_memory_is_that_of_the_hungrier_stage() -> None:
    common = {"workers": 1, "row_group": 256, "image_size": 256}
    features_first = estimate.node_memory(actors=1, actor_bytes=2_000_000_000, **common)
    head_alone = estimate.node_memory(actors=0, actor_bytes=0, **common)
    assert features_first - head_alone > 1_000_000_000
    assert estimate.node_memory(actors=2, actor_bytes=2_000_000_000, **common) > features_first


def test_what_is_cached_is_not_computed_again(tmp_path: Path) -> None:
    """Of two row groups with three views, all but the other views of the first are there."""
    parts = cache.plan(str(tmp_path), [(SHARD, 3)], seed=0).missing
    plain, others, second, its_others = parts
    cached = cache.Plan(str(tmp_path), (plain, second, its_others), (others,))
    work = estimate.feature_work(cached, batch_size=7, steps=Steps.of(71, 8, 5))
    assert (work.views, work.cached) == (210, 40 + 90)
    assert work.batches == 12  # 80 views, 7 at a time
    assert (work.steps_per_epoch, work.steps, work.batch_size) == (8, 40, 8)


def test_bytes_of_a_view_are_2048_features_of_two_bytes_and_three_numbers(tmp_path: Path) -> None:
    parts = cache.plan(str(tmp_path), [(SHARD, 3)], seed=0).parts
    assert estimate.views_of(parts) == 210
    assert estimate.views_of(parts[:2]) == 120
    # Row, view and label are integers of four bytes.
    several = estimate.cache_bytes(parts) - estimate.cache_bytes(parts[:2])
    pages = estimate.cache_bytes(parts) - 210 * (2 * 2048 + 3 * 4)
    assert several == 90 * (2 * 2048 + 3 * 4) + pages // 2


def test_pages_and_footers_are_those_of_files_of_the_usual_row_group(tmp_path: Path) -> None:
    """256 rows, `row_group`: of the plain view, and of another two."""
    shard = Shard("train-00000.parquet", "train", 256, (256,), 1, "a" * 64)
    parts = cache.plan(str(tmp_path), [(shard, 3)], seed=0).missing
    generator = np.random.default_rng(0)
    for part in parts:
        values = generator.normal(size=(part.rows, part.stop - part.first, FEATURES))
        cache.write_part(str(tmp_path), part, values.astype(np.float16), np.zeros(256, np.int32))
    bare = 3 * 256 * (2 * 2048 + 3 * 4)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.parquet"))
    assert estimate.cache_bytes(parts) - bare == pytest.approx(written - bare, rel=0.3)


def test_arrays_of_a_node_have_all_views_of_train_and_one_of_the_others() -> None:
    """In float16, with a label of four bytes for each example."""
    examples = {"train": 10, "valid": 4, "test": 3}
    assert estimate.local_bytes(examples, views=5) == (50 + 4 + 3) * 2048 * 2 + 17 * 4


def test_photographs_are_kept_where_a_split_of_them_fits() -> None:
    """Three bytes a pixel; the test split is not trained on."""
    examples = {"train": 5, "valid": 2, "test": 9}
    train, valid = 5 * 10 * 10 * 3, 2 * 10 * 10 * 3
    assert estimate.photograph_bytes(examples, 10, most=train) == train + valid
    assert estimate.photograph_bytes(examples, 10, most=train - 1) == valid
    assert estimate.photograph_bytes(examples, 10, most=valid - 1) == 0


def memory(**changes: int) -> int:
    known = {"actors": 0, "actor_bytes": 0, "workers": 1, "row_group": 256, "image_size": 100}
    return estimate.node_memory(**(known | changes))


def test_a_node_that_fits_a_head_needs_two_gigabytes() -> None:
    """Ray's own 0.6 GB, the driver's 0.5, and 0.9 of each process with TensorFlow."""
    assert memory() == 2_000_000_000
    assert memory(workers=3) == 3_800_000_000
    assert memory(actors=1, actor_bytes=5) == 2_000_000_000


def test_a_node_that_fine_tunes_needs_what_each_of_its_processes_does() -> None:
    assert memory(workers=2, tuner_bytes=3_000_000_000) == 7_100_000_000
    assert memory(workers=2, tuner_bytes=1) == 2_900_000_000


def test_a_node_with_actors_needs_their_bytes_and_four_decoded_row_groups_of_each() -> None:
    decoded = 256 * 100 * 100 * 3
    found = memory(actors=2, actor_bytes=3_000_000_000)
    assert found == 1_100_000_000 + 2 * 3_000_000_000 + 2 * 4 * decoded


def test_seconds_are_shared_by_the_actors() -> None:
    assert estimate.extraction_seconds(600, 20.0, 3) == 10.0
