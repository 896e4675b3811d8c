"""What is found in each layout, and what is said about those that cannot be used."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leafnet import errors, sources, terminal
from leafnet.errors import UserError
from leafnet.sources import Listing, Sample


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
