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
    assert listing.notes == ("skipped 3 other files (1 without suffix, 1 .db, 1 .txt)",)
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
    (sample,) = samples(listing)
    assert sample.reason == "damaged-parquet"


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
        (["train/a/1.jpg", "train/b/1.jpg", "test/A/1.jpg"], "class-not-in-train"),
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
    write_parquet(tmp_path / "x.parquet", ["a", "b"], split=["train", "dev"])
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
    assert set(listing.notes[0].removeprefix("skipped 2 other files ").strip("()").split(", ")) == {
        "1 .md",
        "1 .xml",
    }


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
    assert found[2].message == "there are no image bytes"
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
    (tmp_path / "train.parquet").unlink()
    assert refused(tmp_path) == "no-train-split"
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
        info = tarfile.TarInfo("d.jpg/0.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"one"))
    (sample,) = samples(sources.look(str(tmp_path)))
    assert (sample.key, sample.image, sample.reason) == ("a.tar/d.jpg/0.jpg", None, "no-label")


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
        {"image": [b"x"], "label": ["a"]},
        {"image": [{"path": "x.jpg"}], "label": ["a"]},
        {"image": image, "class": ["a"]},
        {"photo": image, "label": ["a"]},
    ):
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        with pytest.raises(UserError, match=f"found {', '.join(columns)}$") as caught:
            sources.look(str(tmp_path))
        assert caught.value.reason == "no-image-column"
