"""What is found in each layout, and what is said about those that cannot be used."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leafnet.core import errors, storage, terminal
from leafnet.core.errors import UserError
from leafnet.preparation import sources
from leafnet.preparation.samples import Listing, Sample, label_text, some, split_of_name


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def samples(listing: Listing) -> list[Sample]:
    return [
        sample
        for item in listing.items.to_pylist()
        for sample in sources.read_samples(listing.layout, item, listing.label_names)
    ]


def write_parquet(
    path: Path, labels: list[Any], *, names: list[str] | None = None, **more: Any
) -> None:
    images = [{"bytes": f"{path.name}{i}".encode(), "path": f"{i}.jpg"} for i in range(len(labels))]
    table = pa.table({"image": images, "label": labels, **more})
    if names:
        feature = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def refused(source: Path) -> str:
    with pytest.raises(UserError) as caught:
        sources.look(str(source))
    assert str(source) in str(caught.value)
    return caught.value.reason


def test_class_folders_with_folders_inside_and_files_beside(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.jpg", "a/plant 7/2.JPG", "a/odd", "a/x.txt", "a/Thumbs.db", "LICENSE")
    listing = sources.look(str(tmp_path))
    assert listing.items["key"].to_pylist() == ["a/odd", "a/plant 7/2.JPG", "b/1.jpg"]
    assert listing.items["label"].to_pylist() == ["a", "a", "b"]
    assert not listing.has_splits
    assert listing.examples == 3
    assert listing.size == len("a/odd" + "a/plant 7/2.JPG" + "b/1.jpg")
    assert listing.notes == ("passed over 3 other files (1 LICENSE, 1 .db, 1 .txt)",)
    assert listing.passed_over == {"LICENSE": 1, ".db": 1, ".txt": 1}
    assert [sample.image for sample in samples(listing)] == [
        b"a/odd",
        b"a/plant 7/2.JPG",
        b"b/1.jpg",
    ]


@pytest.mark.parametrize(
    ("train", "valid", "test"), [("train", "valid", "test"), ("Training", "Val", "Testing")]
)
def test_split_folders_by_their_other_names(
    tmp_path: Path, train: str, valid: str, test: str
) -> None:
    touch(tmp_path, *(f"{split}/{c}/1.jpg" for split in (train, valid, test) for c in "ab"))
    listing = sources.look(str(tmp_path))
    assert listing.has_splits
    found = dict(
        zip(listing.items["key"].to_pylist(), listing.items["split"].to_pylist(), strict=True)
    )
    assert found[f"{train}/a/1.jpg"] == "train"
    assert found[f"{valid}/a/1.jpg"] == "valid"
    assert found[f"{test}/b/1.jpg"] == "test"


def test_train_alone_is_no_split(tmp_path: Path) -> None:
    listing = sources.look(str(touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg")))
    assert not listing.has_splits
    assert listing.items["label"].to_pylist() == ["a", "b"]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    listing = sources.look(str(touch(tmp_path, "train/1.jpg", "bus/1.jpg")))
    assert listing.items["label"].to_pylist() == ["bus", "train"]


def test_any_filesystem(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a/1.jpg", "b/2.jpg"):
        memory.pipe_file(f"/leaves/{name}", name.encode())
    for source in ("memory://leaves", f"file://{touch(tmp_path, 'a/1.jpg', 'b/2.jpg')}"):
        listing = sources.look(source)
        assert listing.items["key"].to_pylist() == ["a/1.jpg", "b/2.jpg"]
        assert [sample.image for sample in samples(listing)] == [b"a/1.jpg", b"b/2.jpg"]


def test_the_fingerprint_is_of_names_and_sizes(tmp_path: Path) -> None:
    first = sources.look(str(touch(tmp_path / "x", "a/1.jpg", "b/1.jpg"))).fingerprint
    assert sources.look(str(touch(tmp_path / "y", "b/1.jpg", "a/1.jpg"))).fingerprint == first
    (tmp_path / "y/a/1.jpg").write_bytes(b"longer than it was")
    assert sources.look(str(tmp_path / "y")).fingerprint != first


def test_parquet_with_class_names(tmp_path: Path) -> None:
    names = ["late", "early"]
    write_parquet(tmp_path / "train-00000-of-00001.parquet", [0, 1, 0], names=names)
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", [1, -1], names=names)
    listing = sources.look(str(tmp_path))
    assert listing.has_splits
    assert listing.examples == 5
    assert listing.items["part"].to_pylist() == [0, 1, 0]
    found = samples(listing)
    assert [s.label for s in found] == ["late", "early", "late", "early", None]
    assert [s.split for s in found] == ["train"] * 3 + ["valid"] * 2
    assert found[2].key == "train-00000-of-00001.parquet/00000002/2.jpg"
    assert found[4].reason == "no-label"
    assert found[4].image is None


def test_one_parquet_file_with_text_labels_and_a_split_column(tmp_path: Path) -> None:
    path = tmp_path / "leaves.parquet"
    write_parquet(path, ["a", "b", "a"], split=["train", "train", "TEST"])
    listing = sources.look(str(path))
    assert listing.has_splits
    assert [(s.label, s.split) for s in samples(listing)] == [
        ("a", "train"),
        ("b", "train"),
        ("a", "test"),
    ]


def test_whole_number_labels_without_names_are_their_digits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [10, 9])
    assert [s.label for s in samples(sources.look(str(tmp_path)))] == ["10", "9"]


def test_a_row_group_that_cannot_be_read_is_a_value(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", ["a", "b"])
    listing = sources.look(str(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"something else")
    # One for each row, so that no photograph is lost without a word.
    assert [(s.row, s.reason) for s in samples(listing)] == [(i, "damaged-parquet") for i in (0, 1)]


def test_tars(tmp_path: Path) -> None:
    files = {
        "d/0.jpg": b"zero",
        "d/0.cls": b"1",
        "d/0.json": b"{}",
        "1.PNG": b"one",
        "1.cls": b"0\n",
    }
    write_tar(tmp_path / "leaves-train-000.tar", files)
    write_tar(tmp_path / "leaves-test-000.tar", {"0.jpg": b"x", "0.cls": b"1", "2.jpg": b"y"})
    (tmp_path / "classes.txt").write_text("rust\nscab\n")
    listing = sources.look(str(tmp_path))
    assert listing.examples is None
    assert listing.label_names == ("rust", "scab")
    test, unlabelled, first, second = samples(listing)
    assert (first.key, first.label, first.image) == (
        "leaves-train-000.tar/d/0.jpg",
        "scab",
        b"zero",
    )
    assert (second.key, second.label, second.split) == (
        "leaves-train-000.tar/1.png",
        "rust",
        "train",
    )
    assert (test.split, test.label) == ("test", "scab")
    assert unlabelled.reason == "no-label"


def test_class_text_in_tars_and_what_is_wrong_with_samples(tmp_path: Path) -> None:
    files = {"0.jpg": b"x", "0.cls": b"rust", "1.cls": b"scab", "2.jpg": b"y", "2.cls": b"scab"}
    write_tar(tmp_path / "a.tar", files)
    found = samples(sources.look(str(tmp_path)))
    assert [(s.label, s.reason) for s in found] == [
        ("rust", None),
        ("scab", "no-image"),
        ("scab", None),
    ]


def test_a_tar_that_breaks_off_gives_what_comes_before(tmp_path: Path) -> None:
    files = {f"{i}.{suffix}": b"7" * 3000 for i in range(9) for suffix in ("jpg", "cls")}
    write_tar(tmp_path / "a.tar", files)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    *good, last = samples(sources.look(str(tmp_path)))
    assert len(good) >= 3
    assert last.reason == "damaged-tar"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "empty-folder"),
        (["readme.txt"], "empty-folder"),
        (["a/1.jpg"], "one-class"),
        (["only/a/1.jpg", "only/b/1.jpg"], "one-class"),
        (["1.jpg", "2.jpg"], "photographs-in-root"),
        (["train/1.jpg", "test/2.jpg"], "photographs-without-class"),
        (["a/1.jpg", "b/notes.txt"], "empty-class"),
        (["train/a/1.jpg", "train/b/1.txt", "test/a/1.jpg"], "empty-class"),
        (["train/a/1.jpg", "train/b/1.jpg", "c/1.jpg"], "mixed-layouts"),
        (["a/1.jpg", "b/1.jpg", "c.tar"], "mixed-layouts"),
        (["train/a/1.jpg", "train/b/1.jpg", "test/c/1.jpg"], "class-not-in-train"),
        (["test/a/1.jpg", "valid/a/1.jpg"], "no-train-split"),
        (["x.parquet"], "bad-parquet"),
        (["train.tar", "more.tar"], "mixed-layouts"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, names: list[str], reason: str) -> None:
    assert refused(touch(tmp_path, *names)) == reason


def test_one_folder_too_high_is_told(tmp_path: Path) -> None:
    touch(tmp_path, "only/a/1.jpg", "only/b/1.jpg")
    with pytest.raises(UserError, match=f"give --source {tmp_path}/only$"):
        sources.look(str(tmp_path))


def test_parquet_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "x.parquet")
    assert refused(tmp_path) == "no-image-column"
    write_parquet(tmp_path / "x.parquet", ["a", "b"], split=["train", "other"])
    assert refused(tmp_path) == "unknown-split"
    write_parquet(tmp_path / "x.parquet", [0, 1], names=["a", "b"])
    write_parquet(tmp_path / "y.parquet", [0, 1], names=["b", "a"])
    assert refused(tmp_path) == "mixed-layouts"


def test_a_photograph_that_is_gone_is_a_value(tmp_path: Path) -> None:
    listing = sources.look(str(touch(tmp_path, "a/1.jpg", "b/1.jpg")))
    (tmp_path / "a/1.jpg").unlink()
    assert samples(listing)[0].reason == "not-found"


def test_a_missing_source_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code = terminal.run_job(lambda argv: print(sources.look(argv[0])), ["/no/such/folder"])
    assert code == errors.EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert told == "error[no-such-folder]: --source /no/such/folder does not exist\n"


# What decides in a listing


def keys_of(root: Path) -> list[str]:
    return [str(key) for key in sources.look(str(root)).items["key"].to_pylist()]


def test_what_a_listing_says_of_class_folders(tmp_path: Path) -> None:
    listing = sources.look(str(touch(tmp_path, "b/2.jpg", "a/1.jpg", "a/x/3.png")))
    assert (listing.source, listing.layout) == (str(tmp_path), "folders")
    assert (listing.label_names, listing.notes) == ((), ())
    assert listing.items.to_pylist() == [
        {
            "key": key,
            "url": f"{tmp_path}/{key}",
            "part": 0,
            "size": len(key),
            "examples": 1,
            "label": key[0],
            "split": None,
        }
        for key in ("a/1.jpg", "a/x/3.png", "b/2.jpg")
    ]
    found = samples(listing)
    assert [(s.row, s.key, s.label, s.split, s.reason) for s in found] == [
        (0, key, key[0], None, None) for key in ("a/1.jpg", "a/x/3.png", "b/2.jpg")
    ]


def test_a_fingerprint_is_sha256_of_a_line_for_each_file(tmp_path: Path) -> None:
    listing = sources.look(str(touch(tmp_path, "a/1.jpg", "b/two.jpg", "b/notes.txt")))
    lines = b'["a/1.jpg", 7]\n["b/two.jpg", 9]\n'
    assert listing.fingerprint == hashlib.sha256(lines).hexdigest()


def test_labels_below_split_folders(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/x/1.jpg", "train/b/1.jpg", "valid/a/1.jpg", "test/b/1.jpg")
    found = sources.look(str(tmp_path)).items.to_pylist()
    assert [(item["key"], item["split"], item["label"]) for item in found] == [
        ("test/b/1.jpg", "test", "b"),
        ("train/a/x/1.jpg", "train", "a"),
        ("train/b/1.jpg", "train", "b"),
        ("valid/a/1.jpg", "valid", "a"),
    ]


def test_train_alone_is_told_as_no_split_for_each_photograph(tmp_path: Path) -> None:
    listing = sources.look(str(touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg")))
    assert listing.items["split"].to_pylist() == [None, None]
    write_parquet(tmp_path / "p/train.parquet", ["a", "b"])
    assert sources.look(str(tmp_path / "p")).items["split"].to_pylist() == [None]


def test_files_and_folders_that_are_no_photographs(tmp_path: Path) -> None:
    """Archives of a Mac, hidden folders, and what tools leave in class folders and beside them."""
    touch(tmp_path, "a/1.jpg", "a/1.xml", "b/1.jpg", "__MACOSX/a/1.jpg", "readme.md")
    (tmp_path / ".cache").mkdir()
    listing = sources.look(str(tmp_path))
    assert listing.items["key"].to_pylist() == ["a/1.jpg", "b/1.jpg"]
    assert listing.passed_over == {"hidden": 1, "__MACOSX": 1, ".md": 1, ".xml": 1}


def test_an_empty_folder_beside_the_splits_is_no_class_of_training(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg")
    (tmp_path / "test/c").mkdir()
    assert len(keys_of(tmp_path)) == 3
    (tmp_path / "train/c").mkdir()
    with pytest.raises(UserError, match=r"the class folder c of .* holds no photograph") as caught:
        sources.look(str(tmp_path))
    assert caught.value.reason == "empty-class"


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="the class folder c of") as caught:
        sources.look(str(tmp_path))
    assert caught.value.reason == "empty-class"


def test_a_name_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    with open(os.fsencode(tmp_path) + b"/a/\xff.jpg", "wb"):
        pass
    with pytest.raises(UserError, match="is not valid UTF-8") as caught:
        sources.look(str(tmp_path))
    assert caught.value.reason == "bad-name"


def test_one_class_folder_with_one_folder_in_it(tmp_path: Path) -> None:
    """Nothing says that the folder inside is a class: no hint is given."""
    touch(tmp_path, "only/a/1.jpg", "only/2.jpg")
    with pytest.raises(UserError, match="has one class only, only; a classifier needs") as caught:
        sources.look(str(tmp_path))
    assert caught.value.reason == "one-class"


def test_splits_of_some_photographs_only_are_refused_with_their_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a", "b"])
    write_parquet(tmp_path / "test.parquet", ["a", "b"])
    with pytest.raises(
        UserError, match=r"test\.parquet names its split and a\.parquet does not"
    ) as caught:
        sources.look(str(tmp_path))
    assert caught.value.reason == "mixed-layouts"


def test_the_split_of_a_file_is_a_word_of_its_name_or_a_folder() -> None:
    told = {
        "train.parquet": "train",
        "x/val_000.tar": "valid",
        "Validation/0.tar": "valid",
        "leaf test.tar": "test",
        "a-testing-b.tar": "test",
        "trainer.tar": None,
        "contest-0.tar": None,
        "latest/0.tar": None,
        "train/test-0.tar": "train",  # the folder comes first
    }
    assert {name: split_of_name(name) for name in told} == told


# Parquet


def test_what_a_listing_says_of_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", ["a", "b", "a"])
    listing = sources.look(str(tmp_path))
    file = tmp_path / "x.parquet"
    assert (listing.source, listing.layout, listing.has_splits) == (str(tmp_path), "parquet", False)
    assert (listing.label_names, listing.notes) == ((), ())
    line = json.dumps(["x.parquet", file.stat().st_size]) + "\n"
    assert listing.fingerprint == hashlib.sha256(line.encode()).hexdigest()
    metadata = pq.read_metadata(file)
    packed = [
        sum(metadata.row_group(g).column(c).total_compressed_size for c in range(3))
        for g in range(2)
    ]
    assert metadata.num_columns == 3  # bytes, path and label
    shared = {"key": "x.parquet", "url": str(file), "label": None, "split": None}
    assert listing.items.to_pylist() == [
        shared | {"part": 0, "size": packed[0], "examples": 2},
        shared | {"part": 1, "size": packed[1], "examples": 1},
    ]


def test_rows_of_parquet_are_numbered_in_their_file_and_in_their_group(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", ["a", "b", "a", "b", "a"])
    found = samples(sources.look(str(tmp_path)))
    assert [s.row for s in found] == [0, 1, 0, 1, 0]
    assert [s.key for s in found] == [f"x.parquet/{i:08d}/{i}.jpg" for i in range(5)]
    assert [s.image for s in found] == [b"x.parquet%d" % i for i in range(5)]


def test_rows_of_parquet_without_a_path_bytes_or_label(tmp_path: Path) -> None:
    images = [
        {"bytes": b"0", "path": None},
        {"bytes": b"1", "path": "some/folder/leaf.jpg"},
        {"bytes": None, "path": "2.jpg"},
        None,
        {"bytes": b"4", "path": ""},
    ]
    table = pa.table({"image": images, "label": ["a", " b ", "a", "b", None]})
    pq.write_table(table, tmp_path / "x.parquet")
    found = samples(sources.look(str(tmp_path)))
    assert [s.key.removeprefix("x.parquet/") for s in found] == [
        "00000000",
        "00000001/leaf.jpg",
        "00000002/2.jpg",
        "00000003",
        "00000004",
    ]
    assert [s.label for s in found] == ["a", "b", "a", "b", None]
    assert [s.image for s in found] == [b"0", b"1", None, None, None]
    assert [s.reason for s in found] == [None, None, "no-image", "no-image", "no-label"]
    assert found[2].message is not None
    assert found[2].message.startswith("the column image has no bytes, and nothing is at its path")
    assert found[3].message == "there are no image bytes"
    assert found[4].message == "the label None names no class"


def test_keys_are_taken_from_leafnet_s_own_files_alone(tmp_path: Path) -> None:
    for name, metadata, expected in (
        ("own", {"leafnet": "examples with keys"}, ["k0", "k1"]),
        ("other", {"leafnet": "something"}, ["x.parquet/00000000", "x.parquet/00000001"]),
        ("none", None, ["x.parquet/00000000", "x.parquet/00000001"]),
    ):
        images = [{"bytes": b"x", "path": None}] * 2
        table = pa.table({"image": images, "label": ["a", "b"], "key": ["k0", "k1"]})
        (tmp_path / name).mkdir()
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / name / "x.parquet")
        assert [s.key for s in samples(sources.look(str(tmp_path / name)))] == expected


def test_the_column_of_labels_may_be_named_in_plural(tmp_path: Path) -> None:
    images = [{"bytes": b"x", "path": None}] * 3
    feature = {"info": {"features": {"labels": {"names": ["zero", "one", "two"]}}}}
    table = pa.table({"image": images, "labels": [2, 0, 3]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
    pq.write_table(table, tmp_path / "x.parquet")
    found = samples(sources.look(str(tmp_path)))
    assert [s.label for s in found] == ["two", "zero", None]


def test_split_columns_of_several_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", ["a", "b"], split=["train", "Training"])
    assert not sources.look(str(tmp_path)).has_splits
    write_parquet(tmp_path / "y.parquet", ["a", "a"], split=["val", "TESTING"])
    listing = sources.look(str(tmp_path))
    assert listing.has_splits
    assert [s.split for s in samples(listing)] == ["train", "train", "valid", "test"]
    write_parquet(tmp_path / "y.parquet", ["a", "c"], split=["val", "test"])
    with pytest.raises(UserError, match=r"test of .* has c, which train has not"):
        sources.look(str(tmp_path))


def test_parquet_whose_classes_do_not_fit(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", ["a", "a"])
    write_parquet(tmp_path / "test.parquet", ["a", "b"])
    assert refused(tmp_path) == "one-class"
    write_parquet(tmp_path / "train.parquet", ["a", "c"])
    assert refused(tmp_path) == "class-not-in-train"
    (tmp_path / "train.parquet").rename(tmp_path / "valid.parquet")
    assert refused(tmp_path) == "no-train-split"
    (tmp_path / "valid.parquet").unlink()
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    none = pa.schema([("image", image), ("label", pa.string())]).empty_table()
    pq.write_table(none, tmp_path / "test.parquet")
    assert refused(tmp_path) == "empty-folder"


# Tars


def test_what_a_listing_says_of_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "x" / "b-000.tar", {"0.jpg": b"x", "0.cls": b"0"})
    (tmp_path / "x" / "classes.txt").write_text("rust\n\n scab \n")
    listing = sources.look(str(tmp_path))
    size = (tmp_path / "x" / "b-000.tar").stat().st_size
    assert (listing.source, listing.layout, listing.has_splits) == (str(tmp_path), "tars", False)
    assert listing.label_names == ("rust", "scab")
    assert listing.notes == ()
    line = json.dumps(["x/b-000.tar", size]) + "\n"
    assert listing.fingerprint == hashlib.sha256(line.encode()).hexdigest()
    assert listing.size == size
    (item,) = listing.items.to_pylist()
    assert item == {
        "key": "x/b-000.tar",
        "url": f"{tmp_path}/x/b-000.tar",
        "part": 0,
        "size": size,
        "examples": None,
        "label": None,
        "split": None,
    }


def test_tars_of_tests_alone_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "test-000.tar", {"0.jpg": b"x", "0.cls": b"0"})
    write_tar(tmp_path / "val-000.tar", {"0.jpg": b"x", "0.cls": b"0"})
    assert refused(tmp_path) == "no-train-split"
    write_tar(tmp_path / "train-000.tar", {"0.jpg": b"x", "0.cls": b"0"})
    assert sources.look(str(tmp_path)).has_splits


def test_members_of_tars_are_put_together_by_their_names(tmp_path: Path) -> None:
    files = {
        "./d/0.seg.png": b"mask",  # another suffix of the same sample, and no kind of photograph
        "./d/0.jpg": b"zero",
        "./d/0.cls": b"12",
        "d/._1.jpg": b"what a Mac leaves",
        "e/0.cls": b"rust",
        "e/0.PNG": b"one",
        "e/2.jpeg": b"two",
        "e/2.cls": b"-1",
    }
    write_tar(tmp_path / "a.tar", files)
    found = samples(sources.look(str(tmp_path)))
    assert [(s.row, s.key, s.label, s.image, s.reason) for s in found] == [
        (0, "a.tar/d/0.jpg", "12", b"zero", None),
        (1, "a.tar/e/0.png", "rust", b"one", None),
        (2, "a.tar/e/2.jpeg", None, None, "no-label"),
    ]


def test_a_name_that_comes_again_in_a_tar_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("0.jpg", b"x"), ("0.cls", b"a"), ("1.jpg", b"y"), ("1.cls", b"b"),
                           ("0.jpg", b"z"), ("0.cls", b"a")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = samples(sources.look(str(tmp_path)))
    assert [(s.row, s.key, s.image, s.reason) for s in found] == [
        (0, "a.tar/0.jpg", b"x", None),
        (1, "a.tar/1.jpg", b"y", None),
        (2, "a.tar/0.jpg#2", None, "duplicate-key"),
    ]
    assert found[2].message == "the tar has an earlier sample of this name"


def test_folders_in_tars_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("d.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("d.jpg/0.jpg", "e/0.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"one"))
    found = samples(sources.look(str(tmp_path)))
    assert [(s.key, s.label, s.image) for s in found] == [
        ("a.tar/d.jpg/0.jpg", "d.jpg", b"one"),
        ("a.tar/e/0.jpg", "e", b"one"),
    ]


@pytest.mark.parametrize("packed", ["tar.gz", "tgz"])
def test_compressed_tars(tmp_path: Path, packed: str) -> None:
    write_tar(tmp_path / "plain.tar", {"0.jpg": b"x", "0.cls": b"a"})
    data = (tmp_path / "plain.tar").read_bytes()
    (tmp_path / "plain.tar").unlink()
    (tmp_path / f"a.{packed}").write_bytes(gzip.compress(data))
    (sample,) = samples(sources.look(str(tmp_path)))
    assert (sample.key, sample.image) == (f"a.{packed}/0.jpg", b"x")


def test_a_tar_without_its_end_is_told_after_its_samples(tmp_path: Path) -> None:
    """Cut off between two members: 512 bytes of header and 512 of content for each."""
    files = {"0.jpg": b"x", "0.cls": b"a", "1.jpg": b"y", "1.cls": b"b"}
    write_tar(tmp_path / "a.tar", files)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: 4 * 1024])
    *good, last = samples(sources.look(str(tmp_path)))
    assert [s.key for s in good] == ["a.tar/0.jpg", "a.tar/1.jpg"]
    assert (last.row, last.key, last.reason) == (2, "a.tar", "damaged-tar")
    assert last.message is not None
    assert "after its first 2 examples: the end-of-archive mark is missing" in last.message


def test_labels_are_told_by_number_only_where_there_are_names_for_them() -> None:
    names = ["zero", "one"]
    assert [label_text(i, names) for i in (-1, 0, 1, 2)] == [None, "zero", "one", None]
    assert [label_text(i, []) for i in (-1, 0, 7)] == [None, "0", "7"]
    assert [label_text(text, names) for text in ("", " ", "1", None)] == [
        None,
        None,
        "1",
        None,
    ]


# Photographs that cannot be read


def test_a_store_that_cannot_be_reached_says_nothing_of_a_photograph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    item = {"key": "a/1.jpg", "url": "/a/1.jpg", "label": "a", "split": "test", "part": 0}

    def read(error: Exception) -> Sample:
        def fail(url: str) -> bytes:
            raise error

        monkeypatch.setattr(storage, "read_bytes", fail)
        (sample,) = sources.read_samples("folders", item, ())
        return sample

    for error, reason in (
        (UserError("no-access", "not  for\nyou"), "cannot-read"),
        (OSError("not  for\nyou"), "cannot-read"),
        (FileNotFoundError("not  for\nyou"), "not-found"),
    ):
        sample = read(error)
        assert sample == Sample(
            0, "a/1.jpg", "a", "test", None, reason, "cannot read it: not for you"
        )
    assert read(OSError()).message == "cannot read it: OSError"
    with pytest.raises(UserError, match="away"):
        read(UserError("no-answer", "away"))


def test_of_many_names_four_are_told_and_the_rest_counted() -> None:
    assert some("dcba") == "a, b, c, d"
    assert some("edcba") == "a, b, c, d and 1 more"
    assert some(str(i) for i in range(10_004)).endswith(" and 10,000 more")


def test_columns_of_other_kinds_are_no_photographs(tmp_path: Path) -> None:
    image = [{"bytes": b"x", "path": "x.jpg"}]
    for columns in (
        {"image": image, "class": ["a"]},
        {"photo": image, "label": ["a"]},
    ):
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        with pytest.raises(UserError, match=f"found {', '.join(columns)}$") as caught:
            sources.look(str(tmp_path))
        assert caught.value.reason == "no-image-column"


# Levels, splits and names


@pytest.mark.parametrize(
    ("train", "valid", "test"),
    [
        ("training_set", "validation-set", "test_set"),
        ("split=train", "split=validation", "split=test"),
        ("train", "dev", "eval"),
        ("TrainImages", "val_images", "Test Data"),
        ("train2017", "val2017", "test2017"),
        ("PlantVillage_train", "PlantVillage_val", "PlantVillage_test"),
        ("trainset", "devset", "testset"),
    ],
)
def test_splits_in_every_usual_spelling(tmp_path: Path, train: str, valid: str, test: str) -> None:
    """By folders, by folders around Parquet, by file names, and by values of a column."""
    told = {train: "train", valid: "valid", test: "test"}
    touch(tmp_path / "folders", *(f"{s}/{c}/1.jpg" for s in told for c in "ab"))
    for name in told:
        write_parquet(tmp_path / "inside" / name / "part-0.parquet", ["a", "b"])
        write_parquet(tmp_path / "files" / f"{name}.parquet", ["a", "b"])
    values = [name for name in told for _ in "ab"]
    write_parquet(tmp_path / "column" / "x.parquet", ["a", "b"] * 3, split=values)
    for kind in ("folders", "inside", "files", "column"):
        listing = sources.look(str(tmp_path / kind))
        assert listing.has_splits
        found = [(s.key, s.label, s.split) for s in samples(listing)]
        assert len(found) == 6
        if kind == "column":
            assert [split for _, _, split in found] == ["train"] * 2 + ["valid"] * 2 + ["test"] * 2
            continue
        for key, label, split in found:
            (name,) = (name for name in told if key.startswith(name))
            assert split == told[name]
            assert label in ("a", "b")


@pytest.mark.parametrize(
    ("names", "reason", "told"),
    [
        (
            ["leaf_train/a/1.jpg", "leaf_train/b/1.jpg", "other/c/1.jpg"],
            "unclear-split",
            "leaf_train",
        ),
        ([f"{k}/{c}/1.jpg" for k in ("color", "grey") for c in "ab"], "wrong-level", "/color$"),
        (
            [f"{c}/{s}/1.jpg" for s in ("train", "test") for c in "ab"],
            "wrong-level",
            "train/healthy",
        ),
        ([f"train/{k}/{c}/1.jpg" for k in ("x", "y") for c in "ab"], "wrong-level", "train/x$"),
        (
            ["a/1.jpg", "b/1.jpg", "all/a/1.jpg", "all/b/1.jpg"],
            "classes-twice",
            "the folder all of",
        ),
        (["Blight/1.jpg", "blight/1.jpg"], "class-twice", "Blight and blight"),
        (["train/a/1.jpg", "train/b/1.jpg", "test/1.jpg"], "photographs-without-class", "score"),
        (["blobs/123", "snapshots/abc/a/1.jpg", "snapshots/abc/b/1.jpg"], "hub-cache", "/abc$"),
        (
            ["train/data-0.arrow", "train/state.json", "dataset_dict.json"],
            "save-to-disk",
            "Parquet",
        ),
    ],
)
def test_what_names_and_levels_say_is_told_with_the_remedy(
    tmp_path: Path, names: list[str], reason: str, told: str
) -> None:
    touch(tmp_path, *names)
    with pytest.raises(UserError, match=told) as caught:
        sources.look(str(tmp_path))
    assert caught.value.reason == reason


def test_numbered_plants_in_every_class_are_no_classes(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/plant_{i}/1.jpg" for c in "ab" for i in range(3)))
    assert set(sources.look(str(tmp_path)).items["label"].to_pylist()) == {"a", "b"}


def test_a_class_may_end_with_the_word_of_a_split(tmp_path: Path) -> None:
    touch(tmp_path, "steam train/1.jpg", "bus/1.jpg")
    assert set(sources.look(str(tmp_path)).items["label"].to_pylist()) == {"bus", "steam train"}


def test_names_of_classes_are_stored_in_one_way(tmp_path: Path) -> None:
    composed, apart = "br\u00fblure", "bru\u0302lure"
    touch(tmp_path / "f", f"{composed}/1.jpg", f"{apart}/2.jpg", "saine/1.jpg")
    listing = sources.look(str(tmp_path / "f"))
    assert set(listing.items["label"].to_pylist()) == {composed, "saine"}
    assert listing.notes[-1].endswith(f"are one class: {composed}")
    write_parquet(tmp_path / "p" / "x.parquet", [composed, apart, "saine"])
    assert [s.label for s in samples(sources.look(str(tmp_path / "p")))] == [
        composed,
        composed,
        "saine",
    ]
    write_parquet(tmp_path / "n" / "x.parquet", [0, 1], names=[apart, "saine"])
    assert [s.label for s in samples(sources.look(str(tmp_path / "n")))] == [composed, "saine"]
    write_tar(tmp_path / "t" / "x.tar", {"0.jpg": b"x", "0.cls": apart.encode()})
    assert [s.label for s in samples(sources.look(str(tmp_path / "t")))] == [composed]


def test_linked_photographs_classes_and_splits_are_read(tmp_path: Path) -> None:
    store = touch(tmp_path / "store", "v/a/1.jpg", "v/b/1.jpg", "b/2.jpg")
    root = touch(tmp_path / "in", "train/a/1.jpg")
    (root / "valid").symlink_to(store / "v")
    (root / "train" / "b").symlink_to(store / "b")
    listing = sources.look(str(root))
    assert listing.items["key"].to_pylist() == [
        "train/a/1.jpg",
        "train/b/2.jpg",
        "valid/a/1.jpg",
        "valid/b/1.jpg",
    ]
    assert all(s.image for s in samples(listing))
    (root / "test").symlink_to(store / "gone")
    with pytest.raises(UserError, match=f"the link {root}/test leads to {store}/gone") as caught:
        sources.look(str(root))
    assert caught.value.reason == "broken-link"


def test_a_test_split_alone_is_for_evaluation(tmp_path: Path) -> None:
    listing = sources.look(str(touch(tmp_path, "test/a/1.jpg", "test/b/1.jpg")))
    assert listing.has_splits
    assert listing.notes[-1].startswith("a test split alone")
    alone = touch(tmp_path / "one", "a/1.jpg")
    assert refused(alone) == "one-class"
    assert sources.look(str(alone), evaluation=True).examples == 1


# Types of columns


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("label", "of_type"),
    [
        ([1, 2], pa.list_(pa.int64())),
        ({"x": 1}, pa.struct([("x", pa.int64())])),
        (1.0, pa.float64()),
        (b"a", pa.binary()),
        (None, pa.null()),
        (True, pa.bool_()),
        (0, pa.timestamp("s")),
    ],
)
def test_labels_of_other_types_are_refused_with_column_and_type(
    tmp_path: Path, label: Any, of_type: pa.DataType
) -> None:
    image = pa.array([{"bytes": b"x", "path": None}] * 2, IMAGE)
    table = pa.table({"image": image, "labels": pa.array([label] * 2, of_type)})
    pq.write_table(table, tmp_path / "x.parquet")
    told = pq.read_schema(tmp_path / "x.parquet").field("labels").type
    with pytest.raises(UserError) as caught:
        sources.look(str(tmp_path))
    assert caught.value.reason == "label-type"
    assert f"the column labels of {tmp_path}/x.parquet is {told}; " in str(caught.value)


@pytest.mark.parametrize(
    "of_type",
    [pa.int8(), pa.uint64(), pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())],
)
def test_labels_that_are_texts_or_whole_numbers_are_read(
    tmp_path: Path, of_type: pa.DataType
) -> None:
    values = [0, 1] if pa.types.is_integer(of_type) else ["0", "1"]
    image = pa.array([{"bytes": b"x", "path": None}] * 2, IMAGE)
    pq.write_table(
        pa.table({"image": image, "label": pa.array(values, of_type)}), tmp_path / "x.parquet"
    )
    assert [s.label for s in samples(sources.look(str(tmp_path)))] == ["0", "1"]


@pytest.mark.parametrize(
    ("image", "remedy"),
    [(["aGk="] * 2, "base64"), ([{"bytes": "aGk="}] * 2, "base64"), ([b"x"] * 2, "encoded bytes")],
)
def test_images_of_other_types_are_refused_with_column_and_type(
    tmp_path: Path, image: list[Any], remedy: str
) -> None:
    pq.write_table(pa.table({"image": image, "label": ["a", "b"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=f"the column image of .*: .*{remedy}") as caught:
        sources.look(str(tmp_path))
    assert caught.value.reason == "image-type"


def test_a_split_column_in_some_files_only(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a", "b", "a"], split=["train", "train", "test"])
    write_parquet(tmp_path / "b.parquet", ["a", "b"])
    with pytest.raises(
        UserError, match=r"a\.parquet has a column split and b\.parquet has neither"
    ):
        sources.look(str(tmp_path))
    (tmp_path / "b.parquet").rename(tmp_path / "valid.parquet")
    found = samples(sources.look(str(tmp_path)))
    assert [s.split for s in found] == ["train", "train", "test", "valid", "valid"]


def test_parts_without_rows_say_nothing_of_splits(tmp_path: Path) -> None:
    for name in ("train-0", "test-0", "more-0"):
        write_parquet(tmp_path / f"{name}.parquet", ["a", "b"])
    empty = pq.read_table(tmp_path / "train-0.parquet").slice(0, 0)
    pq.write_table(empty, tmp_path / "part-3.parquet")
    with pytest.raises(UserError, match=r"more-0\.parquet does not"):
        sources.look(str(tmp_path))
    (tmp_path / "more-0.parquet").unlink()
    listing = sources.look(str(tmp_path))
    assert (listing.has_splits, listing.examples) == (True, 4)
    assert listing.notes == ("passed over 1 Parquet files without rows",)


# Layouts that people have


def test_parquet_with_paths_and_no_bytes(tmp_path: Path) -> None:
    """Absolute, below the Parquet file, below the source, and gone."""
    touch(tmp_path, "images/1.jpg", "data/2.jpg", "images/3.jpg")
    paths = [str(tmp_path / "images/1.jpg"), "2.jpg", "images/3.jpg", "gone.jpg"]
    images = pa.array([{"bytes": None, "path": path} for path in paths], IMAGE)
    table = pa.table({"image": images, "label": ["a", "b", "a", "b"]})
    pq.write_table(table, tmp_path / "data" / "train.parquet")
    found = samples(sources.look(str(tmp_path)))
    assert [s.image for s in found] == [b"images/1.jpg", b"data/2.jpg", b"images/3.jpg", None]
    assert found[3].reason == "no-image"
    assert "nothing is at its path gone.jpg" in str(found[3].message)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_metadata_as_the_datasets_library_reads_it(tmp_path: Path, suffix: str) -> None:
    """It says more than the folders; a photograph that it does not name has no label."""
    touch(tmp_path, "train/x/1.jpg", "train/y/2.jpg", "train/3.jpg", "test/4.jpg")
    for split, rows in (
        ("train", [("x/1.jpg", "a"), ("y/2.jpg", "b")]),
        ("test", [("4.jpg", "a")]),
    ):
        lines = [json.dumps({"file_name": n, "label": c, "note": "x"}) for n, c in rows]
        if suffix == "csv":
            lines = ["file_name,label", *(f"{n},{c}" for n, c in rows)]
        (tmp_path / split / f"metadata.{suffix}").write_text("\n".join(lines))
    listing = sources.look(str(tmp_path))
    found = {s.key: (s.label, s.split, s.reason) for s in samples(listing)}
    assert found == {
        "train/x/1.jpg": ("a", "train", None),
        "train/y/2.jpg": ("b", "train", None),
        "train/3.jpg": (None, "train", "no-label"),
        "test/4.jpg": ("a", "test", None),
    }
    assert listing.passed_over == {}


def test_a_csv_of_labels_beside_photographs(tmp_path: Path) -> None:
    """Kaggle's: names without folder, also without suffix; submissions are no labels."""
    touch(tmp_path, "images/p1.jpg", "images/p2.jpg", "images/p3.jpg")
    (tmp_path / "train.csv").write_text(
        "image;labels\np1.jpg;scab, rust\np2;healthy\ngone;healthy\n"
    )
    (tmp_path / "sample_submission.csv").write_text("image,labels\np3.jpg,healthy\n")
    listing = sources.look(str(tmp_path))
    assert not listing.has_splits
    found = {s.key: (s.label, s.reason) for s in samples(listing)}
    assert found == {
        "gone": ("healthy", "not-found"),
        "images/p1.jpg": ("scab, rust", None),
        "images/p2.jpg": ("healthy", None),
        "images/p3.jpg": (None, "no-label"),
    }
    assert "labels from train.csv: 2 of 3 photographs" in listing.notes


def test_a_photograph_with_two_labels_in_tables_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.jpg", "images/2.jpg")
    (tmp_path / "x.csv").write_text("image,label\n1.jpg,a\n2.jpg,b\n1.jpg,b\n")
    assert refused(tmp_path) == "two-labels"


def test_labels_in_json_and_keys_with_dots_in_tars(tmp_path: Path) -> None:
    """The key ends at the first dot and the last extension decides, as in webdataset."""
    files = {
        "0.jpg": b"0", "0.json": b'{"label": "a", "n": 1}', "1.jpg": b"1", "1.json": b'"b"',
        "a.v1.jpg": b"2", "a.v1.cls": b"a", "b.rgb.png": b"3", "b.cls": b"b",
        "f_2024.05.01.jpg": b"4", "f_2024.05.01.cls": b"a",
        "f_2024.05.02.jpg": b"5", "f_2024.05.02.cls": b"b",
        "c.left.png": b"6", "c.right.png": b"7", "c.cls": b"a",
    }  # fmt: skip
    write_tar(tmp_path / "x.tar", files)
    found = [
        (s.key.removeprefix("x.tar/"), s.label, s.image)
        for s in samples(sources.look(str(tmp_path)))
    ]
    assert found == [
        ("0.jpg", "a", b"0"),
        ("1.jpg", "b", b"1"),
        ("a.v1.jpg", "a", b"2"),
        ("b.rgb.png", "b", b"3"),
        ("f_2024.05.01.jpg", "a", b"4"),
        ("f_2024.05.02.jpg", "b", b"5"),
        ("c.left.png", "a", None),
    ]


def test_tars_of_class_folders(tmp_path: Path) -> None:
    names = [f"photos/{s}/{c}/1.jpg" for s in ("train", "test") for c in "ab"]
    write_tar(tmp_path / "p.tar", {name: name.encode() for name in [*names, "photos/.x/y.jpg"]})
    listing = sources.look(str(tmp_path))
    assert listing.has_splits
    assert [(s.key, s.label, s.split, s.image) for s in samples(listing)] == [
        (f"p.tar/{name}", name.split("/")[2], name.split("/")[1], name.encode()) for name in names
    ]


def test_what_spark_leaves_is_no_photograph(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet" / "part-0.parquet", ["a", "b"])
        touch(tmp_path / f"{split}.parquet", "_SUCCESS", "._SUCCESS.crc", "odd")
    listing = sources.look(str(tmp_path))
    assert (listing.layout, listing.has_splits, listing.examples) == ("parquet", True, 4)
    assert listing.passed_over == {"_SUCCESS": 2, "hidden": 2, "without suffix": 2}
