from pathlib import Path

import numpy as np
import pytest

from leafnet import photographs, shards
from leafnet.images import decode
from leafnet.shards import ShardIndex
from tests.conftest import write_data_set


@pytest.mark.parametrize("max_local", [1e9, 0])
def test_rows_are_those_of_the_shards(data_set: ShardIndex, max_local: float) -> None:
    """Mapped from the disk, and streamed."""
    of_split = data_set.of_split("train")
    tables = list(shards.row_groups(data_set.root, of_split[0]))
    images = [image for table in tables for image in table["image"].to_pylist()]
    labels = [label for table in tables for label in table["label"].to_pylist()]
    opened = photographs.open_split(
        data_set.root, of_split, image_size=32, threads=2, max_local=max_local
    )
    assert opened.labels.tolist() == labels
    assert bool(opened.shard_rows) == (max_local == 0)
    wanted = np.array([35, 0, 20, 20])
    expected = np.stack([decode(images[i], 32).pixels for i in wanted])
    np.testing.assert_array_equal(opened.gather(wanted), expected)


def test_an_interrupted_file_is_written_again(data_set: ShardIndex, tmp_path: Path) -> None:
    index = write_data_set(str(tmp_path), {"train": 2}, seed=9)
    of_split = index.of_split("train")

    def opened() -> photographs.Photographs:
        return photographs.open_split(index.root, of_split, image_size=32, threads=1, max_local=1e9)

    first = opened()
    before = first.gather(np.arange(6))
    assert first.folder
    (first.folder / "labels.npy").unlink()
    (first.folder / "pixels.npy").write_bytes(b"half")
    np.testing.assert_array_equal(opened().gather(np.arange(6)), before)


def test_a_streamed_epoch_takes_every_example_once_and_few_shards_at_a_time() -> None:
    rows = [5, 7, 3, 6, 4]
    order = photographs.streamed_order(rows, seed=0, epoch=1, window=2)
    assert sorted(order) == list(range(25))
    shard = np.repeat(np.arange(5), rows)[order]
    first, second = set(shard[: np.isin(shard, shard[:1]).nonzero()[0].max() + 1]), set(shard[-4:])
    assert len(first) <= 2
    assert not first & second
    assert (order != photographs.streamed_order(rows, seed=0, epoch=2, window=2)).any()
