"""What earlier versions stored, written by tests/earlier/make.py, is continued by this one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from leafnet.core.errors import UserError
from leafnet.core.settings import validate
from leafnet.data import shards
from leafnet.data.images import decode
from leafnet.distributed import checkpoint
from leafnet.features import cache
from leafnet.training import train
from leafnet.training.head.state import load
from leafnet.training.settings import TrainSettings
from tests.earlier import make

STORED = Path(make.__file__).parent
VERSIONS = sorted(path.parent.name for path in STORED.glob("*/shards"))


@pytest.fixture(params=VERSIONS)
def earlier(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of all that a version stored."""
    return Path(shutil.copytree(STORED / request.param, tmp_path / "earlier"))


def train_settings(earlier: Path) -> TrainSettings:
    places = {"shards": str(earlier / "shards"), "out": str(earlier), "weights": make.WEIGHTS}
    return validate(TrainSettings, make.TRAIN | places)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_something_is_stored() -> None:
    assert "0.1" in VERSIONS


def test_shards_are_read(earlier: Path) -> None:
    index = shards.read_index(str(earlier / "shards"))
    shards.check_sizes(index)
    assert index.class_names == make.CLASSES
    assert [index.examples(split) for split in ("train", "valid", "test")] == [12, 6, 3]
    for shard in index.shards:
        rows = [
            row
            for table in shards.row_groups(index.root, shard)
            for row in table.select(["key", "image", "label"]).to_pylist()
        ]
        assert len(rows) == shard.rows
        for row in rows:
            # The folder of the photograph is its class, and its number the seed.
            label, number = row["key"].removesuffix(".jpg").split("/")
            assert row["image"] == make.leaf(label, int(number))
            assert index.class_names[row["label"]] == label
            assert decode(row["image"], 32).pixels.shape == (32, 32, 3)


def test_features_are_found_and_read(earlier: Path) -> None:
    index = shards.read_index(str(earlier / "shards"))
    (root,) = (earlier / "features").iterdir()
    wanted = [(shard, 2 if shard.split == "train" else 1) for shard in index.shards]
    plan = cache.plan(str(root), wanted, seed=0)
    assert plan.missing == ()
    assert sum(part.rows * (part.stop - part.first) for part in plan.present) == 33
    for part in plan.present:
        read = cache.read_part(str(root), part)
        assert read is not None
        assert np.ptp(read[0].astype(np.float32), axis=2).min() > 0


def test_the_checkpoint_inside_the_head_fit_is_loaded(earlier: Path) -> None:
    folder = str(earlier / "interrupted" / "head")
    newest = checkpoint.newest(folder, print)
    assert newest is not None
    identity = json.loads((Path(folder) / newest / checkpoint.MANIFEST).read_text())["identity"]
    state = load(Path(folder) / newest, identity=identity)
    assert newest == checkpoint.name(state.step, newest.rpartition("_")[2])
    assert 0 < state.epoch < 20
    assert state.epoch == state.step // 3
    assert [row["epoch"] for row in state.history] == list(range(1, state.epoch + 1))
    assert [kernel.shape for kernel, _ in state.head] == [(2048, 2), (2, 3)]
    with pytest.raises(UserError, match="was started with seed 0, not 7"):
        load(Path(folder) / newest, identity=identity | {"seed": 7})


def test_a_run_of_other_settings_is_refused_by_name(earlier: Path) -> None:
    run = (earlier / "interrupted").rename(earlier / "leaves")
    before = tree(run)
    chosen = train_settings(earlier).model_copy(update={"seed": 7})
    with pytest.raises(UserError, match=r"seed 0, not 7; give the same settings") as caught:
        train.run(chosen)
    assert caught.value.reason == "started-differently"
    assert tree(run) == before
