from collections.abc import Callable
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
    losses = np.array([0.5, 0.25])
    return TrainState(3, 86, head, optimizer, best, 2, 0.25, [{"epoch": 1.0}], losses, 17.0)


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(), identity=IDENTITY)
    found = checkpoint.load(tmp_path, identity=IDENTITY)
    assert (found.epoch, found.step, found.best_epoch, found.best_loss) == (3, 86, 2, 0.25)
    assert found.history == [{"epoch": 1.0}]
    assert (found.losses.tolist(), found.correct) == ([0.5, 0.25], 17.0)
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
    with pytest.raises(UserError, match=r"is damaged: sha256 of arrays\.npz differs"):
        checkpoint.load(tmp_path, identity=IDENTITY)


def test_other_version_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(), identity=IDENTITY)
    manifest = str(tmp_path / "manifest.json")
    storage.write_json(manifest, {**storage.read_json(manifest), "version": 99})
    with pytest.raises(UserError, match="has version 99, this leafnet reads 3"):
        checkpoint.load(tmp_path, identity=IDENTITY)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"step": 86', b'"step": 87'))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "not written to the end"),
        (lambda folder: _cut(folder / "manifest.json"), "its manifest cannot be read"),
        (lambda folder: (folder / "manifest.json").write_bytes(b""), "its manifest cannot be read"),
        (lambda folder: _flip(folder / "manifest.json"), "sha256 of its manifest differs"),
        (lambda folder: (folder / "arrays.npz").unlink(), "arrays.npz is gone"),
        (lambda folder: _cut(folder / "arrays.npz"), "sha256 of arrays.npz differs"),
    ],
)
def test_the_newest_whole_one_is_found(
    tmp_path: Path, damage: Callable[[Path], None], why: str
) -> None:
    older, newer = checkpoint.name(86, "aaaa"), checkpoint.name(100, "0000")
    for name in (older, newer):
        checkpoint.save(tmp_path / name, state(), identity=IDENTITY)
    for other in ("restarts.json", "checkpoint_manager_snapshot.json"):
        (tmp_path / other).write_text("[]")
    told: list[str] = []
    assert checkpoint.newest(str(tmp_path), told.append) == newer
    assert told == []
    damage(tmp_path / newer)
    assert checkpoint.newest(str(tmp_path), told.append) == older
    assert len(told) == 1
    assert why in told[0]
    assert "passed over" in told[0]
    damage(tmp_path / older)
    assert checkpoint.newest(str(tmp_path), told.append) is None


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert checkpoint.newest(str(tmp_path / "missing"), print) is None
