"""What prepare keeps together is one group in evaluation as well."""

from pathlib import Path

import pyarrow as pa
import pytest

from leafnet.data import groups, shards
from leafnet.data.shards import ShardIndex

KEYS = ["a/plant1_x.jpg", "b/plant2_x.jpg", "a/other.jpg", "b/plant1_y.jpg", "c/plant1", "plant2"]


def index_of(root: Path, group: str | None) -> ShardIndex:
    """A data set of `KEYS` in two test shards, which was prepared with `--group`."""
    written = []
    for number, keys in enumerate((KEYS[:4], KEYS[4:])):
        count = len(keys)
        table = pa.table(
            {
                "key": keys,
                "image": [b"none"] * count,
                "label": [0] * count,
                "split": ["test"] * count,
                "width": [1] * count,
                "height": [1] * count,
                "sha256": [""] * count,
            }
        )
        name = f"test-{number:05d}.parquet"
        written.append(shards.write_shard(str(root), name, table, row_group=3))
    return shards.write_index(
        str(root),
        class_names=("leaf", "rust"),
        shards=written,
        counts={"test": {"leaf": len(KEYS), "rust": 0}},
        prepared={"settings": {"group": group}} if group is not None else {},
    )


@pytest.mark.parametrize("group", [r"(plant\d+)", r"plant\d+", r"(plant\d+)(_.)?"])
def test_keys_with_the_same_match_are_a_group_and_others_are_alone(
    group: str, tmp_path: Path
) -> None:
    index = index_of(tmp_path, group)
    for found in (groups.groups_of(index, KEYS), groups.groups_of_split(index, "test")):
        assert found is not None
        alike = [[int(one == other) for other in found] for one in found]
        assert alike == [
            [1, 0, 0, 1, 1, 0],
            [0, 1, 0, 0, 0, 1],
            [0, 0, 1, 0, 0, 0],
            [1, 0, 0, 1, 1, 0],
            [1, 0, 0, 1, 1, 0],
            [0, 1, 0, 0, 0, 1],
        ]


@pytest.mark.parametrize("group", [None, ""])
def test_without_group_there_are_none(group: str | None, tmp_path: Path) -> None:
    index = index_of(tmp_path, group)
    assert groups.groups_of(index, KEYS) is None
    assert groups.groups_of_split(index, "test") is None
