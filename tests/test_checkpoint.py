from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from leafnet import checkpoint, storage
from leafnet.checkpoint import TrainState
from leafnet.errors import UserError

IDENTITY = {"data": "abc", "head.epochs": 50}


def state() -> TrainState:
    head = [(np.ones((4, 3), np.float32), np.zeros(3, np.float32))]
    best = [(np.full((4, 3), 2, np.float32), np.zeros(3, np.float32))]
    optimizer: list[NDArray[Any]] = [np.array(7, np.int64), np.full((4, 3), 0.5, np.float32)]
    return TrainState(3, 84, head, optimizer, best, 2, 0.25, [{"epoch": 1.0}])


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(), identity=IDENTITY)
    found = checkpoint.load(tmp_path, identity=IDENTITY)
    assert (found.epoch, found.step, found.best_epoch, found.best_loss) == (3, 84, 2, 0.25)
    assert found.history == [{"epoch": 1.0}]
    for left, right in zip(found.optimizer, state().optimizer, strict=True):
        np.testing.assert_array_equal(left, right)
        assert left.dtype == right.dtype
    np.testing.assert_array_equal(found.head[0][0], 1)
    np.testing.assert_array_equal(found.best_head[0][0], 2)


def test_no_best_yet(tmp_path: Path) -> None:
    early = state()
    early.best_epoch, early.best_loss = 0, np.inf
    checkpoint.save(tmp_path, early, identity=IDENTITY)
    assert checkpoint.load(tmp_path, identity=IDENTITY).best_loss == np.inf


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(), identity=IDENTITY)
    with pytest.raises(UserError, match=r"was started with head\.epochs 50, not 80"):
        checkpoint.load(tmp_path, identity={**IDENTITY, "head.epochs": 80})


def test_damage_is_found(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(), identity=IDENTITY)
    arrays = tmp_path / "arrays.npz"
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(tmp_path, identity=IDENTITY)


def test_other_version_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(), identity=IDENTITY)
    manifest = str(tmp_path / "manifest.json")
    storage.write_json(manifest, {**storage.read_json(manifest), "version": 99})
    with pytest.raises(UserError, match="has version 99, this leafnet reads 1"):
        checkpoint.load(tmp_path, identity=IDENTITY)
