"""What a run will take, against what a run takes."""

from pathlib import Path

import numpy as np

from leafnet import features, plan
from leafnet.backbone import FEATURES
from leafnet.shards import Shard

SHARD = Shard("train-00000.parquet", "train", 70, (40, 30), 1, "a" * 64)


def test_steps_and_batches(tmp_path: Path) -> None:
    cached = features.plan(str(tmp_path), [(SHARD, 8)], seed=0)
    work = plan.work(cached, batch_size=32, train_examples=70, global_batch=32, epochs=50)
    assert work.views == 70 * 8
    assert work.cached == 0
    # The plain view and the seven others of each row group: 40, 280, 30 and 210 views.
    assert work.batches == 2 + 9 + 1 + 7
    assert (work.steps_per_epoch, work.steps, work.batch_size) == (2, 100, 32)


def test_fewer_examples_than_a_batch(tmp_path: Path) -> None:
    cached = features.plan(str(tmp_path), [(SHARD, 1)], seed=0)
    work = plan.work(cached, batch_size=256, train_examples=70, global_batch=512, epochs=3)
    assert (work.batches, work.steps, work.batch_size) == (2, 3, 70)


def test_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    root = str(tmp_path / "key")
    parts = features.plan(root, [(SHARD, 3)], seed=0).missing
    generator = np.random.default_rng(0)
    for part in parts:
        values = generator.normal(size=(part.rows, part.stop - part.first, FEATURES))
        features.write_part(root, part, values.astype(np.float16), np.zeros(part.rows, np.int32))
    found = features.plan(root, [(SHARD, 3)], seed=0)
    assert plan.work(found, batch_size=1, train_examples=70, global_batch=1, epochs=1).batches == 0
    size = sum(path.stat().st_size for path in (tmp_path / "key").rglob("*.parquet"))
    assert abs(plan.cache_bytes(parts) - size) < 0.05 * size

    mapped = tmp_path / "train.npy"
    features.assemble(root, found.parts, 3, path=str(mapped))
    told = plan.local_bytes({"train": 70, "valid": 0, "test": 0}, views=3)
    assert abs(told - mapped.stat().st_size) < 0.01 * told


def test_memory_is_that_of_the_hungrier_stage() -> None:
    common = {"workers": 1, "row_group": 256, "image_size": 256}
    features_first = plan.node_memory(actors=1, actor_bytes=2_000_000_000, **common)
    head_alone = plan.node_memory(actors=0, actor_bytes=0, **common)
    assert features_first - head_alone > 1_000_000_000
    assert plan.node_memory(actors=2, actor_bytes=2_000_000_000, **common) > features_first
