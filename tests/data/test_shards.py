"""The data-set format: what is written is what is read, and what was changed since is refused."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leafnet.core.cache import LocalCache
from leafnet.core.errors import UserError
from leafnet.data import shards
from leafnet.data.shards import Shard, ShardIndex

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


def test_a_shard_is_what_its_entry_says(tmp_path: Path) -> None:
    index = write(tmp_path)
    assert [(shard.name, shard.split, shard.rows) for shard in index.shards] == [
        ("train-00000.parquet", "train", 7),
        ("train-00001.parquet", "train", 2),
        ("test-00000.parquet", "test", 4),
    ]
    assert [shard.row_groups for shard in index.shards] == [(3, 3, 1), (2,), (3, 1)]
    for shard in index.shards:
        data = (tmp_path / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_an_index_says_what_it_was_given(tmp_path: Path) -> None:
    index = write(tmp_path)
    assert index.root == str(tmp_path)
    assert index.counts == {
        "train": {"blight": 5, "healthy": 4},
        "valid": {"blight": 0, "healthy": 0},
        "test": {"blight": 2, "healthy": 2},
    }
    assert index.fingerprint == shards.fingerprint(CLASS_NAMES, index.shards)
    assert json.loads((tmp_path / "index.json").read_text())["version"] == 1


def test_photographs_are_stored_as_they_are_and_their_labels_packed(tmp_path: Path) -> None:
    group = pq.read_metadata(tmp_path / write(tmp_path).shards[0].name).row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    packing = {name: column.compression for name, column in columns.items()}
    assert packing.pop("image") == "UNCOMPRESSED"
    assert set(packing.values()) == {"ZSTD"}
    # A dictionary of photographs that are all different would hold each of them twice.
    assert {name for name, column in columns.items() if column.has_dictionary_page} == {"split"}


def test_pages_of_a_shard_carry_checksums(tmp_path: Path) -> None:
    path = tmp_path / write(tmp_path).shards[0].name
    path.write_bytes(path.read_bytes().replace(b"train0", b"trainX"))
    with pytest.raises(OSError, match="CRC checksum"):
        pq.read_table(path, page_checksum_verification=True)


def test_some_columns_are_read_and_no_others(tmp_path: Path) -> None:
    index = write(tmp_path)
    found = shards.read_columns(index.root, index.shards[2], ["label", "width"])
    assert found.to_pydict() == {"label": [0, 1, 0, 1], "width": [640, 641, 642, 643]}
    groups = list(shards.unchecked_groups(index, "train", ["key"]))
    assert [group.to_pydict() for group in groups] == [
        {"key": [f"train/{i}.jpg" for i in rows]} for rows in ([0, 1, 2], [3, 4, 5], [6], [0, 1])
    ]


def test_rows_at_the_edges_of_row_groups(tmp_path: Path) -> None:
    index = write(tmp_path)
    for wanted in ([2, 3], [5, 6], [3], [6, 5, 4, 3, 2, 1, 0]):
        found = shards.read_rows(index.root, index.shards[0], wanted)
        assert found["key"].to_pylist() == [f"train/{row}.jpg" for row in wanted]
        assert found["width"].to_pylist() == [640 + row for row in wanted]


def test_what_was_changed_is_told_with_a_reason_for_scripts(tmp_path: Path) -> None:
    index = write(tmp_path)
    path = tmp_path / "train-00000.parquet"
    path.write_bytes(path.read_bytes().replace(b"train0", b"trainX"))
    with pytest.raises(UserError) as changed:
        shards.read_rows(index.root, index.shards[0], [0])
    path.unlink()
    with pytest.raises(UserError) as gone:
        shards.read_rows(index.root, index.shards[0], [0])
    assert (changed.value.reason, gone.value.reason) == ("shard-changed", "shard-missing")


def test_how_a_data_set_came_to_be_is_told_again(tmp_path: Path) -> None:
    write(tmp_path)
    assert shards.prepared(str(tmp_path)) == {"by": "hand"}
    shards.write_index(str(tmp_path), class_names=[], shards=[], counts={}, prepared={})
    assert shards.prepared(str(tmp_path)) == {}


def test_an_index_of_before_that_says_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"version": 1, "prepared": null}')
    assert shards.prepared(str(tmp_path)) == {}


def test_pairs_of_duplicates_are_read_by_their_names(tmp_path: Path) -> None:
    assert shards.duplicates(str(tmp_path)) == []
    stored = pa.table({"distance": [0, 2], "key_b": ["b", "d"], "key_a": ["a", "c"]})
    pq.write_table(stored, tmp_path / "duplicates.parquet")
    assert shards.duplicates(str(tmp_path)) == [("a", "b"), ("c", "d")]


def split_in(root: Path, *parts: list[int], names: tuple[str, ...] = CLASS_NAMES) -> str:
    """Fingerprint of a training split with these rows of `table`, a list for each shard."""
    rows = table("train", 7)
    written = [
        shards.write_shard(str(root), f"train-{i}.parquet", rows.take(part), row_group=2)
        for i, part in enumerate(parts)
    ]
    index = shards.write_index(str(root), class_names=names, shards=written, counts={}, prepared={})
    return shards.split_fingerprint(index, "train")


def test_a_split_is_told_by_its_photographs_and_not_by_their_order(tmp_path: Path) -> None:
    lines = sorted(
        f"{hashlib.sha256(f'train{i}'.encode() + bytes(i % 3)).hexdigest()} {CLASS_NAMES[i % 2]}\n"
        for i in range(7)
    )
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    one = split_in(tmp_path / "one", [0, 1, 2, 3, 4, 5, 6])
    assert one == expected
    assert split_in(tmp_path / "turned", [6, 5, 4, 3, 2, 1, 0]) == expected
    assert split_in(tmp_path / "shards", [4, 5], [6, 0], [3, 1, 2]) == expected
    assert split_in(tmp_path / "swapped", [3, 1, 2], [4, 5], [6, 0]) == expected


def test_a_split_of_other_photographs_or_classes_is_another(tmp_path: Path) -> None:
    first = split_in(tmp_path / "first", [0, 1, 2])
    assert split_in(tmp_path / "fewer", [0, 1]) != first
    assert split_in(tmp_path / "other", [0, 1, 3]) != first
    assert split_in(tmp_path / "twice", [0, 1, 2, 2]) != first
    assert split_in(tmp_path / "classes", [0, 1, 2], names=("healthy", "blight")) != first
    index = write(tmp_path / "both")
    assert shards.split_fingerprint(index, "test") != shards.split_fingerprint(index, "train")


def test_a_shard_comes_from_the_cache_that_is_given(tmp_path: Path) -> None:
    index = write(tmp_path / "set")
    cache = LocalCache(str(tmp_path / "cache"), 1.0)
    shard = index.shards[1]
    first = list(shards.row_groups(index.root, shard, cache=cache))
    (tmp_path / "set" / shard.name).unlink()
    assert list(shards.row_groups(index.root, shard, cache=cache)) == first
    with pytest.raises(UserError) as caught:
        list(shards.row_groups(index.root, shard))
    assert caught.value.reason == "shard-missing"


def test_a_shard_of_one_photograph(tmp_path: Path) -> None:
    shard = shards.write_shard(str(tmp_path), "t.parquet", table("test", 1), row_group=3)
    assert (shard.split, shard.rows, shard.row_groups) == ("test", 1, (1,))
    assert shards.read_rows(str(tmp_path), shard, [0])["key"].to_pylist() == ["test/0.jpg"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"name": "../train-00000.parquet"}, r"shards\.0\.name: .* without a folder"),
        ({"sha256": "../victim.txt"}, r"shards\.0\.sha256: String should match"),
        ({"sha256": "A" * 64}, r"shards\.0\.sha256: String should match"),
        ({"sha256": "a" * 64 + "\n"}, r"shards\.0\.sha256: String should match"),
        ({"split": "secret"}, r"shards\.0\.split: Input should be 'train'"),
        ({"rows": 8}, "rows are not the sum of row_groups"),
        ({"bytes": -1}, r"shards\.0\.bytes: "),
        ({"bytes": 1.5}, r"shards\.0\.bytes: "),
    ],
)
def test_an_index_that_names_what_it_must_not_is_refused(
    tmp_path: Path, change: dict[str, Any], found: str
) -> None:
    index = write(str(tmp_path))
    path = tmp_path / "index.json"
    document = json.loads(path.read_text())
    document["shards"][0] |= change
    forged = [dataclasses.replace(index.shards[0], **change), *index.shards[1:]]
    document["fingerprint"] = shards.fingerprint(CLASS_NAMES, forged)
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=found) as caught:
        shards.read_index(str(tmp_path))
    assert caught.value.reason == "bad-index"
    assert "prepare the data set again with jobs/prepare.py" in str(caught.value)
