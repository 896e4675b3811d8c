"""The data-set format: what is written is what is read, and what was changed since is refused."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leafnet import shards
from leafnet.errors import UserError
from leafnet.shards import Shard, ShardIndex

CLASS_NAMES = ("blight", "healthy")


def table(split: str, rows: int) -> pa.Table:
    # Zeros at the end of some images: more than one library has cut them off.
    images = [f"{split}{i}".encode() + bytes(i % 3) for i in range(rows)]
    return pa.table(
        {
            "key": [f"{split}/{i}.jpg" for i in range(rows)],
            "image": images,
            "label": [i % 2 for i in range(rows)],
            "split": [split] * rows,
            "width": [640 + i for i in range(rows)],
            "height": [480] * rows,
            "sha256": [hashlib.sha256(image).hexdigest() for image in images],
        }
    ).cast(shards.SCHEMA)


def write(root: Path | str) -> ShardIndex:
    written = [
        shards.write_shard(str(root), "train-00000.parquet", table("train", 7), row_group=3),
        shards.write_shard(str(root), "train-00001.parquet", table("train", 2), row_group=3),
        shards.write_shard(str(root), "test-00000.parquet", table("test", 4), row_group=3),
    ]
    counts = {
        "train": {"blight": 5, "healthy": 4},
        "valid": {"blight": 0, "healthy": 0},
        "test": {"blight": 2, "healthy": 2},
    }
    return shards.write_index(
        str(root), class_names=CLASS_NAMES, shards=written, counts=counts, prepared={"by": "hand"}
    )


def reason_of(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        shards.read_index(str(root))
    assert str(root) in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("where", ["local", "memory"])
def test_write_and_read(tmp_path: Path, where: str) -> None:
    root = str(tmp_path) if where == "local" else f"memory://{tmp_path.name}"
    index = write(root)
    assert index == shards.read_index(root)
    assert index.class_names == CLASS_NAMES
    assert [shard.name for shard in index.of_split("train")] == [
        "train-00000.parquet",
        "train-00001.parquet",
    ]
    assert index.shards[0].row_groups == (3, 3, 1)
    assert [index.examples(split) for split in ("train", "valid", "test")] == [9, 0, 4]
    shards.check_sizes(index)
    groups = list(shards.row_groups(index.root, index.shards[0]))
    assert [group.num_rows for group in groups] == [3, 3, 1]
    assert pa.concat_tables(groups) == table("train", 7)


def test_others_can_read_a_shard(tmp_path: Path) -> None:
    shard = write(tmp_path).shards[0]
    path = tmp_path / shard.name
    assert path.stat().st_size == shard.bytes
    assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
    found = pq.read_table(path)
    assert found.schema.names == shards.SCHEMA.names
    assert found == table("train", 7)


def test_the_same_table_is_the_same_file(tmp_path: Path) -> None:
    assert write(tmp_path / "a").fingerprint == write(tmp_path / "b").fingerprint


def test_the_fingerprint_is_of_all_that_training_sees(tmp_path: Path) -> None:
    def replaced(**changes: Any) -> list[Shard]:
        return [dataclasses.replace(index.shards[0], **changes), *index.shards[1:]]

    index = write(tmp_path)
    first, second, third = index.shards
    same = index.fingerprint
    assert shards.fingerprint(CLASS_NAMES, replaced(name="renamed.parquet")) == same
    others = [
        shards.fingerprint(("healthy", "blight"), index.shards),
        shards.fingerprint(CLASS_NAMES, (second, first, third)),
        shards.fingerprint(CLASS_NAMES, index.shards[1:]),
        shards.fingerprint(CLASS_NAMES, replaced(split="valid")),
        shards.fingerprint(CLASS_NAMES, replaced(sha256="0" * 64)),
    ]
    assert len({same, *others}) == 6


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist \(nothing is there\)"):
        shards.read_index(str(tmp_path / "nowhere"))
    shards.write_shard(str(tmp_path), "train-00000.parquet", table("train", 2), row_group=3)
    with pytest.raises(UserError, match="an interrupted prepare") as caught:
        shards.read_index(str(tmp_path))
    assert caught.value.reason == "no-data-set"


def test_an_index_of_another_version(tmp_path: Path) -> None:
    write(tmp_path)
    url = tmp_path / shards.INDEX_NAME
    url.write_text(url.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(UserError, match="has version 2, this leafnet reads 1") as caught:
        shards.read_index(str(tmp_path))
    assert caught.value.reason == "other-version"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not-json"),
        ("[]", "other-version"),
        ("{}", "other-version"),
        ('{"version": 1}', "bad-index"),
        ('{"version": 1, "shards": 3}', "bad-index"),
        ('{"version": 1, "shards": ["train-00000.parquet"]}', "bad-index"),
        ('{"version": 1, "shards": [{"name": "train-00000.parquet"}]}', "bad-index"),
    ],
)
def test_a_damaged_index(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / shards.INDEX_NAME).write_text(text)
    assert reason_of(tmp_path) == reason


def test_an_edited_index(tmp_path: Path) -> None:
    write(tmp_path)
    url = tmp_path / shards.INDEX_NAME
    document = json.loads(url.read_text())
    document["class_names"].reverse()
    url.write_text(json.dumps(document))
    assert reason_of(tmp_path) == "bad-index"


def test_a_shard_that_is_gone(tmp_path: Path) -> None:
    index = write(tmp_path)
    (tmp_path / "train-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"train-00001\.parquet is gone") as caught:
        shards.check_sizes(index)
    assert caught.value.reason == "shard-missing"
    with pytest.raises(UserError, match=r"train-00001\.parquet is gone"):
        list(shards.row_groups(index.root, index.shards[1]))


def test_a_shard_of_another_size(tmp_path: Path) -> None:
    index = write(tmp_path)
    with (tmp_path / "test-00000.parquet").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"test-00000\.parquet has .* bytes, the index") as caught:
        shards.check_sizes(index)
    assert caught.value.reason == "shard-changed"


def test_a_shard_with_one_bit_flipped_is_told_by_its_reader(tmp_path: Path) -> None:
    index = write(tmp_path)
    path = tmp_path / "train-00000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    shards.check_sizes(index)
    with pytest.raises(UserError, match="is not the file that was prepared") as caught:
        next(shards.row_groups(index.root, index.shards[0]))
    assert caught.value.reason == "shard-changed"


def test_rows_in_any_order_from_the_row_groups_they_are_in(tmp_path: Path) -> None:
    index = write(tmp_path)
    shard = index.of_split("train")[0]
    found = shards.read_rows(index.root, shard, [6, 0, 4])
    assert found["key"].to_pylist() == ["train/6.jpg", "train/0.jpg", "train/4.jpg"]
    assert found["image"].to_pylist() == [b"train6", b"train0", b"train4\0"]
    file = tmp_path / shard.name
    data = file.read_bytes()
    # In the footer's statistics and in the page: what is read is the page.
    file.write_bytes(data.replace(b"train0", b"trainX"))
    assert shards.read_rows(index.root, shard, [3])["image"].to_pylist() == [b"train3"]
    with pytest.raises(UserError, match=r"train/0.jpg in .* is not the photograph that was"):
        shards.read_rows(index.root, shard, [0])
    file.unlink()
    with pytest.raises(UserError, match="is gone; prepare the data set again"):
        shards.read_rows(index.root, shard, [0])
