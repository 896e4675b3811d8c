import dataclasses
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from leafnet.core.cache import LocalCache
from leafnet.data import shards
from leafnet.data.images import decode
from leafnet.data.shards import Shard, ShardIndex
from leafnet.training.finetune import pixels
from tests.conftest import write_data_set


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a test could find what an earlier run of the tests has decoded."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("local")))


@pytest.mark.parametrize("max_local", [1e9, 0])
def test_rows_are_those_of_the_shards(data_set: ShardIndex, max_local: float) -> None:
    """Mapped from the disk, and streamed."""
    of_split = data_set.of_split("train")
    tables = list(shards.row_groups(data_set.root, of_split[0]))
    images = [image for table in tables for image in table["image"].to_pylist()]
    labels = [label for table in tables for label in table["label"].to_pylist()]
    opened = pixels.open_split(
        data_set.root, of_split, image_size=32, threads=2, max_local=max_local
    )
    assert opened.labels.tolist() == labels
    assert bool(opened.shard_rows) == (max_local == 0)
    wanted = np.array([35, 0, 20, 20])
    expected = np.stack([decode(images[i], 32).pixels for i in wanted])
    np.testing.assert_array_equal(opened.gather(wanted), expected)


def folder_of(found: pixels.Photographs) -> Path:
    assert found.shared is not None
    return found.shared.path


def test_an_interrupted_file_is_written_again(data_set: ShardIndex, tmp_path: Path) -> None:
    index = write_data_set(str(tmp_path), {"train": 2}, seed=9)
    of_split = index.of_split("train")

    def opened() -> pixels.Photographs:
        return pixels.open_split(index.root, of_split, image_size=32, threads=1, max_local=1e9)

    first = opened()
    before = first.gather(np.arange(6))
    assert first.shared
    (first.shared.path / "pixels.npy").write_bytes(b"half")
    first.shared._lock.close()  # the process has been killed
    np.testing.assert_array_equal(opened().gather(np.arange(6)), before)


def test_a_streamed_epoch_takes_every_example_once_and_few_shards_at_a_time() -> None:
    rows = [5, 7, 3, 6, 4]
    order = pixels.streamed_order(rows, seed=0, epoch=1, window=2)
    assert sorted(order) == list(range(25))
    shard = np.repeat(np.arange(5), rows)[order]
    first, second = set(shard[: np.isin(shard, shard[:1]).nonzero()[0].max() + 1]), set(shard[-4:])
    assert len(first) <= 2
    assert not first & second
    assert (order != pixels.streamed_order(rows, seed=0, epoch=2, window=2)).any()


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Train photographs in shards of 6, 3 and 9 rows."""
    index = write_data_set(
        str(tmp_path_factory.mktemp("three")), {"train": 2, "valid": 1, "test": 3}, seed=3
    )
    of_train = [dataclasses.replace(shard, split="train") for shard in index.shards]
    return dataclasses.replace(index, shards=tuple(of_train))


def all_of(index: ShardIndex) -> tuple[list[bytes], list[int]]:
    """Photographs and labels in order of the shards' names."""
    tables = [
        table
        for shard in sorted(index.shards, key=lambda shard: shard.name)
        for table in shards.row_groups(index.root, shard)
    ]
    images = [image for table in tables for image in table["image"].to_pylist()]
    return images, [label for table in tables for label in table["label"].to_pylist()]


def opened(index: ShardIndex, *, max_local: float, **more: Any) -> pixels.Photographs:
    """Its shards are given in another order than that of their names."""
    return pixels.open_split(
        index.root, index.shards[::-1], image_size=20, threads=2, max_local=max_local, **more
    )


@pytest.mark.parametrize("max_local", [1e9, 0])
def test_rows_are_in_order_of_the_shards_names(max_local: float, three_shards: ShardIndex) -> None:
    images, labels = all_of(three_shards)
    found = opened(three_shards, max_local=max_local)
    assert found.labels.tolist() == labels
    assert found.labels.dtype == np.int32
    wanted = np.array([17, 0, 8, 9, 6, 5, 8, 15, 3])  # first and last ones of each shard
    expected = np.stack([decode(images[i], 20).pixels for i in wanted])
    np.testing.assert_array_equal(found.gather(wanted), expected)


def test_what_just_fits_is_kept_on_the_disk(three_shards: ShardIndex) -> None:
    """18 photographs of 20 x 20 pixels of three bytes."""
    kept = opened(three_shards, max_local=18 * 20 * 20 * 3)
    assert kept.shared is not None
    assert kept.shard_rows == ()
    assert isinstance(kept.gather(np.arange(2)), np.ndarray)
    streamed = opened(three_shards, max_local=18 * 20 * 20 * 3 - 1)
    assert streamed.shared is None
    rows = {shard.name: shard.rows for shard in three_shards.shards}
    assert streamed.shard_rows == tuple(rows[name] for name in sorted(rows))


def test_photographs_are_decoded_once_for_all_processes_of_a_node(
    three_shards: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(three_shards, max_local=1e9)
    monkeypatch.setattr(pixels, "decode", None)  # to decode again would fail
    again = opened(three_shards, max_local=1e9)
    assert folder_of(again) == folder_of(first)
    assert isinstance(again.gather(slice(0, 1)), np.memmap)  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.gather(np.arange(18)), first.gather(np.arange(18)))


def test_another_size_and_another_shard_are_files_of_their_own(three_shards: ShardIndex) -> None:
    folders = {folder_of(opened(three_shards, max_local=1e9))}
    for shards_of, size in ((three_shards.shards, 24), (three_shards.shards[:2], 20)):
        one = pixels.open_split(
            three_shards.root, shards_of, image_size=size, threads=1, max_local=1e9
        )
        assert one.gather(np.arange(2)).shape == (2, size, size, 3)
        folders.add(folder_of(one))
    assert len(folders) == 3


def test_more_photographs_than_are_decoded_at_a_time(
    three_shards: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is written in blocks, of which the last of a row group is not full."""
    monkeypatch.setattr(pixels, "_BLOCK", 2)
    found = opened(three_shards, max_local=1e9)
    images, _ = all_of(three_shards)
    expected = np.stack([decode(image, 20).pixels for image in images])
    np.testing.assert_array_equal(found.gather(np.arange(18)), expected)
    assert found.shared is not None
    assert np.load(found.shared.path / "pixels.npy").dtype == np.uint8


@pytest.mark.parametrize("max_local", [1e9, 0])
def test_shards_are_read_by_way_of_the_nodes_cache(
    max_local: float, three_shards: ShardIndex, tmp_path: Path
) -> None:
    cache = LocalCache(str(tmp_path), max_gb=1.0)
    opened(three_shards, max_local=max_local, cache=cache).gather(np.arange(18))
    copies = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert {shard.bytes for shard in three_shards.shards} <= set(copies)


def test_streaming_reads_a_shard_once_while_it_is_among_the_last(
    three_shards: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the window is held, here two shards; the one asked for longest ago goes."""
    read: list[str] = []
    plain = shards.row_groups

    def noted(root: str, shard: Shard, **how: Any) -> Iterator[pa.Table]:
        read.append(shard.name)
        return plain(root, shard, **how)

    found = opened(three_shards, max_local=0)
    monkeypatch.setattr(shards, "row_groups", noted)
    monkeypatch.setattr(pixels, "_WINDOW", 1)
    a, b, c = sorted(shard.name for shard in three_shards.shards)
    rows = np.cumsum([0, *found.shard_rows])
    of = dict(zip((a, b, c), rows, strict=False))
    for name in (a, b, a, c, a, b):
        found.gather(np.array([of[name]]))
    assert read == [a, b, c, b]


def test_an_order_mixes_the_examples_of_a_window_and_its_shards() -> None:
    """Windows of four shards unless another is asked for."""
    rows = [3, 8, 5, 6, 4, 7, 2, 9, 1, 5]
    shard = np.repeat(np.arange(10), rows)
    order = pixels.streamed_order(rows, seed=3, epoch=0)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(50))
    windows, at = [], 0
    while at < 50:  # four shards, until all of their rows are taken
        seen = list(dict.fromkeys(shard[order[at:]]))[:4]
        stop = at + sum(rows[each] for each in seen)
        assert set(shard[order[at:stop]]) == set(seen)
        assert (np.diff(shard[order[at:stop]]) != 0).sum() > len(seen) - 1, "not mixed"
        windows.append(seen)
        at = stop
    assert [len(window) for window in windows] == [4, 4, 2]
    assert windows != [sorted(window) for window in windows]
    assert set(windows[0]) != {0, 1, 2, 3}
    for changed in ({"seed": 4, "epoch": 0}, {"seed": 3, "epoch": 1}):
        assert (pixels.streamed_order(rows, **changed) != order).any()


def test_processes_that_open_a_split_at_once_decode_it_once(
    three_shards: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for the first; each opens the lock for itself, as threads do here."""
    decoded: list[int] = []

    def slowly(data: bytes, size: int) -> Any:
        decoded.append(size)
        time.sleep(0.01)
        return decode(data, size)

    monkeypatch.setattr(pixels, "decode", slowly)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: opened(three_shards, max_local=1e9), range(3)))
    assert len(decoded) == 18
    assert len({folder_of(each) for each in found}) == 1
