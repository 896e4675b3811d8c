import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.distributed import checkpoint
from leafnet.training.head.state import TrainState, load, save

IDENTITY = {"data": "abc", "head.epochs": 50}


def state() -> TrainState:
    head = [(np.ones((4, 3), np.float32), np.zeros(3, np.float32))]
    best = [(np.full((4, 3), 2, np.float32), np.zeros(3, np.float32))]
    optimizer: list[NDArray[Any]] = [np.array(7, np.int64), np.full((4, 3), 0.5, np.float32)]
    losses = np.array([0.5, 0.25])
    return TrainState(3, 86, head, optimizer, best, 2, 0.25, [{"epoch": 1.0}], losses, 17.0)


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path, state(), identity=IDENTITY)
    found = load(tmp_path, identity=IDENTITY)
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
    save(tmp_path, early, identity=IDENTITY)
    assert load(tmp_path, identity=IDENTITY).best_loss == np.inf


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, state(), identity=IDENTITY)
    with pytest.raises(UserError, match=r"was started with head\.epochs 50, not 80"):
        load(tmp_path, identity={**IDENTITY, "head.epochs": 80})


def test_damage_is_found(tmp_path: Path) -> None:
    save(tmp_path, state(), identity=IDENTITY)
    arrays = tmp_path / "arrays.npz"
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"is damaged: sha256 of arrays\.npz differs"):
        load(tmp_path, identity=IDENTITY)


def test_other_version_is_refused(tmp_path: Path) -> None:
    save(tmp_path, state(), identity=IDENTITY)
    manifest = str(tmp_path / "manifest.json")
    storage.write_json(manifest, {**storage.read_json(manifest), "version": 99})
    with pytest.raises(UserError, match="has version 99, this leafnet reads 3"):
        load(tmp_path, identity=IDENTITY)


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
        save(tmp_path / name, state(), identity=IDENTITY)
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


def several_layers() -> TrainState:
    """Heads of two and three layers, no two arrays of which are equal."""
    numbers = np.random.default_rng(0)

    def head(*widths: int) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        return [
            (numbers.random((into, out), np.float32), numbers.random(out, np.float32))
            for into, out in itertools.pairwise(widths)
        ]

    optimizer = [numbers.random(i + 1) for i in range(11)]  # so many that "10" comes before "2"
    return dataclasses.replace(
        state(), head=head(4, 3, 2), best_head=head(4, 5, 6, 2), optimizer=optimizer
    )


def test_every_layer_comes_back_in_its_place(tmp_path: Path) -> None:
    stored = several_layers()
    save(tmp_path, stored, identity=IDENTITY)
    found = load(tmp_path, identity=IDENTITY)
    for left, right in ((found.head, stored.head), (found.best_head, stored.best_head)):
        assert len(left) == len(right)
        for layer, other in zip(left, right, strict=True):
            np.testing.assert_array_equal(layer[0], other[0])
            np.testing.assert_array_equal(layer[1], other[1])
            assert layer[0].dtype == layer[1].dtype == np.float32
    for array, other_array in zip(found.optimizer, stored.optimizer, strict=True):
        np.testing.assert_array_equal(array, other_array)


def test_a_state_begins_without_losses() -> None:
    begun = TrainState(0, 0, [], [], [], 0, np.inf)
    assert (begun.losses.size, begun.correct, begun.history) == (0, 0.0, [])


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    arrays = {"a/b": np.arange(6, dtype=np.int16).reshape(2, 3), "c": np.array(0.5)}
    values = {"step": 7, "why": [1, None, "é"]}
    checkpoint.write(tmp_path, arrays, values, identity=IDENTITY)
    found, found_values = checkpoint.read(tmp_path, identity=IDENTITY)
    assert found_values == values
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arrays.npz", "manifest.json"]


def test_the_manifest_holds_size_and_sha256_of_the_arrays_and_of_itself(tmp_path: Path) -> None:
    save(tmp_path, state(), identity=IDENTITY)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    data = (tmp_path / "arrays.npz").read_bytes()
    assert manifest["files"] == {
        "arrays.npz": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    }
    assert (manifest["version"], manifest["identity"]) == (3, IDENTITY)
    own = manifest.pop("sha256")
    assert own == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    """To read them would run what is in them."""
    checkpoint.write(tmp_path, {"a": np.array([{}], object)}, {}, identity=IDENTITY)
    with pytest.raises(ValueError, match="allow_pickle"):
        checkpoint.read(tmp_path, identity=IDENTITY)


@pytest.mark.parametrize(
    ("found", "expected", "told"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, "run x was started with b 2, not None;"),
        ({"a": 1}, {"a": 1, "b": 2}, "run x was started with b None, not 2;"),
        ({"d": 1, "c": 2, "b": 3}, {"d": 4, "c": 5, "b": 6}, "run x was started with b 3, not 6;"),
        ({"a": [1, 2]}, {"a": [2, 1]}, "run x was started with a [1, 2], not [2, 1];"),
    ],
)
def test_any_entry_that_differs_is_refused_the_first_by_name(
    found: dict[str, Any], expected: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        checkpoint.compare_identity(found, expected, where="run x")
    assert caught.value.reason == "started-differently"


def test_the_order_of_equal_entries_does_not_matter() -> None:
    checkpoint.compare_identity({"a": 1, "b": [2]}, {"b": [2], "a": 1}, where="run x")


@pytest.mark.parametrize("extra", [{"head.units": [8]}, {"head.units": None, "seed": 1}])
def test_a_checkpoint_of_more_entries_is_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    save(tmp_path, state(), identity={**IDENTITY, **extra})
    with pytest.raises(UserError, match=r"was started with (head\.units|seed) "):
        load(tmp_path, identity=IDENTITY)


def test_names_sort_by_step_and_leave_out_what_is_no_checkpoint(tmp_path: Path) -> None:
    steps = [5, 1_000_000, 40, 999_999_999]
    for step in steps:
        (tmp_path / checkpoint.name(step, "ffff")).mkdir()
    for other in ("checkpoint_manager_snapshot.json", "my_checkpoint_000000001_aaaa", "head"):
        (tmp_path / other).mkdir()
    found = checkpoint.names(str(tmp_path))
    assert found == [checkpoint.name(step, "ffff") for step in sorted(steps, reverse=True)]


def test_the_newest_of_another_version_stops_the_search(tmp_path: Path) -> None:
    for step, version in ((1, 3), (2, 2)):
        folder = tmp_path / checkpoint.name(step, "aaaa")
        save(folder, state(), identity=IDENTITY)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "version": version}))
    with pytest.raises(UserError, match="has version 2, this leafnet reads 3") as caught:
        checkpoint.newest(str(tmp_path), print)
    assert caught.value.reason == "other-version"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xfe{}", "its manifest cannot be read"),
        (b"[]", "sha256 of its manifest differs"),
        (b"{}", "sha256 of its manifest differs"),
        (b'{"version": 3}', "sha256 of its manifest differs"),
    ],
)
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, content: bytes, why: str) -> None:
    save(tmp_path, state(), identity=IDENTITY)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=f"checkpoint {tmp_path} is damaged: {why}") as caught:
        load(tmp_path, identity=IDENTITY)
    assert caught.value.reason == "damaged-checkpoint"


def test_a_file_in_the_place_of_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path / checkpoint.name(1, "aaaa"), state(), identity=IDENTITY)
    (tmp_path / checkpoint.name(2, "aaaa")).write_text("")
    told: list[str] = []
    assert checkpoint.newest(str(tmp_path), told.append) == checkpoint.name(1, "aaaa")
    assert "was not written to the end; passed over, the one before is used" in told[0]


def test_a_store_that_cannot_be_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a whole checkpoint would be passed over, and its run start anew."""

    def away(url: str) -> Any:
        raise UserError("store-unreachable", f"{url} cannot be reached")

    save(tmp_path / checkpoint.name(1, "aaaa"), state(), identity=IDENTITY)
    monkeypatch.setattr(storage, "read_json", away)
    with pytest.raises(UserError, match="cannot be reached"):
        checkpoint.newest(str(tmp_path), print)
