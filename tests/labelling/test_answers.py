"""Labels that people gave, on their way into a data set, without the job that writes it."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.core.settings import validate
from leafnet.data import shards
from leafnet.data.shards import ShardIndex
from leafnet.labelling import answers
from leafnet.labelling.answers import _Labelled
from leafnet.labelling.labelstudio import Answer
from leafnet.labelling.settings import ReviewSettings

CLASSES = ("healthy", "rust")
PHOTOGRAPHS = {"1.jpg": b"one", "2.jpg": b"two", "3.jpg": b"three", "gone.jpg": b"gone"}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """What was written for people to label, and two files that are not what they were."""
    folder = tmp_path / "review-7"
    for name, data in PHOTOGRAPHS.items():
        storage.write_bytes(str(folder / "photographs" / name), data)
    digests = {name: storage.sha256(data) for name, data in PHOTOGRAPHS.items()}
    review = {"version": 1, "class_names": list(CLASSES), "photographs": digests}
    (folder / "review.json").write_text(json.dumps(review))
    (folder / "photographs" / "gone.jpg").unlink()
    (folder / "photographs" / "3.jpg").write_bytes(b"another")
    return str(folder)


def taken(folder: str, *given: Answer) -> list[_Labelled]:
    return answers._taken(given, folder, answers._read_review(folder), CLASSES)


def test_an_answer_is_taken_with_the_photograph_that_was_shown(folder: str) -> None:
    found = taken(folder, Answer("2.jpg", "rust"), Answer("1.jpg", "healthy"))
    assert found == [
        ("review-7/2.jpg", "rust", b"two", storage.sha256(b"two")),
        ("review-7/1.jpg", "healthy", b"one", storage.sha256(b"one")),
    ]


def test_the_last_answer_to_a_photograph_counts(folder: str) -> None:
    (found,) = taken(folder, Answer("1.jpg", "rust"), Answer("1.jpg", "healthy"))
    assert found.label == "healthy"


def test_what_is_not_taken_is_told(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = taken(
        folder,
        Answer("1.jpg", "rust"),
        Answer("2.jpg", None),
        Answer("2.jpg", None, "several labels"),
        Answer("2.jpg", "blight"),
        Answer("3.jpg", "rust"),
        Answer("gone.jpg", "rust"),
        *(Answer(f"{name}.jpg", "rust") for name in "abcd"),
    )
    assert [answer.key for answer in found] == ["review-7/1.jpg"]
    told = " ".join(capfd.readouterr().out.split())
    assert "answers 1 taken, 1 without a label, 8 refused" in told
    for line in (
        "several labels: 2.jpg;",
        "unknown class 'blight': 2.jpg;",
        "the photograph was changed: 3.jpg;",
        "the photograph is gone: gone.jpg;",
        "no such photograph: a.jpg, b.jpg, c.jpg, … (the classes are healthy, rust)",
    ):
        assert line in told


def test_no_more_is_told_where_all_are_taken(
    folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    taken(folder, Answer("1.jpg", "rust"), Answer("2.jpg", None))
    assert "refused   " not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason", "message"),
    [
        (None, "no-review", "does not exist; name the folder that jobs/review.py wrote"),
        ('{"version": 2}', "other-version", "has version 2, this leafnet reads 1"),
        ('{"class_names": []}', "other-version", "has version None, this leafnet reads 1"),
        ("[1]", "other-version", "has version None, this leafnet reads 1"),
    ],
)
def test_a_folder_that_is_no_review(
    text: str | None, reason: str, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "review.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        answers._read_review(str(tmp_path))
    assert caught.value.reason == reason


def write_base(root: str, splits: dict[str, dict[str, bytes]]) -> ShardIndex:
    """A data set in which the class of an example is the parity of the length of its bytes."""
    written = []
    for split, images in splits.items():
        rows = [
            {
                "key": key,
                "image": image,
                "label": len(image) % 2,
                "split": split,
                "width": 1,
                "height": 1,
                "sha256": storage.sha256(image),
            }
            for key, image in images.items()
        ]
        table = pa.Table.from_pylist(rows, shards.SCHEMA)
        written.append(shards.write_shard(root, f"{split}-0.parquet", table, row_group=2))
    return shards.write_index(root, class_names=CLASSES, shards=written, counts={}, prepared={})


def test_examples_of_the_data_set_keep_their_split_and_give_way_to_answers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    splits = {
        "train": {"a": b"1", "b": b"22", "review-7/3.jpg": b"333"},
        "valid": {"c": b"4444"},
        "test": {"d/e": b"55555", "f": b"6"},
    }
    base = write_base(str(tmp_path / "base"), splits)
    given = [
        _Labelled("review-7/1.jpg", "healthy", b"1", storage.sha256(b"1")),  # in train
        _Labelled("review-7/2.jpg", "rust", b"6", storage.sha256(b"6")),  # in test
        _Labelled("review-7/3.jpg", "rust", b"new", storage.sha256(b"new")),  # a key of the base
        _Labelled("review-7/4.jpg", "rust", b"more", storage.sha256(b"more")),
    ]
    new = answers._write_base(base, given, str(tmp_path / "source"))
    digest = storage.sha256(b"new")[:8]
    assert [answer.key for answer in new] == [
        *("review-7/1.jpg", f"{digest}/review-7/3.jpg", "review-7/4.jpg"),
    ]
    assert [answer.data for answer in new] == [b"1", b"new", b"more"]
    written = {}
    for split in splits:
        table = pq.read_table(tmp_path / "source" / f"{split}-0.parquet")
        assert set(table["split"].to_pylist()) == {split}
        written[split] = [(r["key"], r["image"], r["label"]) for r in table.to_pylist()]
    assert written == {
        "train": [
            ("b", {"bytes": b"22", "path": "b"}, "healthy"),
            ("review-7/3.jpg", {"bytes": b"333", "path": "3.jpg"}, "rust"),
        ],
        "valid": [("c", {"bytes": b"4444", "path": "c"}, "healthy")],
        "test": [
            ("d/e", {"bytes": b"55555", "path": "e"}, "rust"),
            ("f", {"bytes": b"6", "path": "f"}, "rust"),
        ],
    }
    told = capfd.readouterr().out
    assert "1 training examples give way to answers of the same bytes" in told
    assert "1 answers are left out: their bytes are in valid or test" in told


def test_nothing_is_told_of_answers_that_are_all_new(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = write_base(str(tmp_path / "base"), {"train": {"a": b"1"}})
    given = [_Labelled("k", "rust", b"new", storage.sha256(b"new"))]
    assert answers._write_base(base, given, str(tmp_path / "source")) == given
    assert capfd.readouterr().out == ""


def test_examples_as_they_are_read_back(tmp_path: Path) -> None:
    url = str(tmp_path / "a.parquet")
    answers._write_examples(url, [("k/1.jpg", b"1", "rust")], split=None)
    table = pq.read_table(url)
    assert table.to_pylist() == [
        {"key": "k/1.jpg", "image": {"bytes": b"1", "path": "1.jpg"}, "label": "rust"}
    ]
    # So that the key is taken for the example's name.
    assert table.schema.metadata[b"leafnet"] == b"examples with keys"
    # Photographs are compressed already.
    column = pq.read_metadata(url).row_group(0).column(0)
    assert column.compression == "UNCOMPRESSED"
    answers._write_examples(str(tmp_path / "none.parquet"), [], split="train")
    assert not (tmp_path / "none.parquet").exists()


def test_examples_are_prepared_as_those_of_the_data_set_were(tmp_path: Path) -> None:
    base = write_base(str(tmp_path), {"train": {"a": b"1"}})
    assert answers._prepared_as(base) == {}
    kept: dict[str, Any] = {
        "duplicates": "report",
        "near_duplicates": "drop",
        "near_distance": 1,
        "shard_mb": 2,
        "row_group": 3,
        "seed": 4,
    }
    others = {"source": "x", "group": "y", "split": "1/1/98", "max_megapixels": 1}
    shards.write_index(
        str(tmp_path),
        class_names=CLASSES,
        shards=base.shards,
        counts={},
        prepared={"settings": others | kept},
    )
    assert answers._prepared_as(base) == kept


@pytest.mark.parametrize("with_base", [False, True])
def test_a_data_set_says_that_it_came_of_answers(with_base: bool, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    made = write_base(out, {"train": {"a": b"1"}})
    base = write_base(str(tmp_path / "base"), {"test": {"b": b"2"}}) if with_base else None
    shards.write_index(
        out,
        class_names=made.class_names,
        shards=made.shards,
        counts={"train": {"healthy": 0, "rust": 1}},
        prepared={
            "listing_sha256": "x",
            "source": "out.source",
            "settings": {"source": "s", "seed": 1},
        },
    )
    answers._tell_origin(out, answers="/a.csv", base=base, count=7)
    assert shards.prepared(out) == {
        "source": "/a.csv",
        "settings": {"source": "/a.csv", "seed": 1},
        "review": {
            "answers": "/a.csv",
            "answered": 7,
            "base": base.root if base else None,
            "base_fingerprint": base.fingerprint if base else None,
        },
    }
    found = shards.read_index(out)
    assert (found.fingerprint, found.class_names) == (made.fingerprint, CLASSES)
    assert found.counts == {"train": {"healthy": 0, "rust": 1}}


def test_a_folder_of_somebody_beside_the_data_set_stays(folder: str, tmp_path: Path) -> None:
    """The examples are gathered in OUT.source, which may be there already."""
    taken = str(tmp_path / "answers.csv")
    storage.write_bytes(taken, b"key,label\n1.jpg,rust\n")
    thesis = tmp_path / "new.source" / "thesis.txt"
    storage.write_bytes(str(thesis), b"years")
    given = validate(
        ReviewSettings, {"answers": taken, "photographs": folder, "out": str(tmp_path / "new")}
    )
    with pytest.raises(UserError, match=r"new\.source is not deleted: .* may not be leafnet's"):
        answers.take_back(given, taken, str(tmp_path / "new"))
    assert thesis.read_bytes() == b"years"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("key", ["../../secret.jpg", "..", "a/b.jpg", "a\\b.jpg"])
def test_a_review_names_files_in_its_own_folder(folder: str, key: str) -> None:
    """Its document may come from somebody else, with the digest of a file of this machine."""
    place = Path(folder) / "review.json"
    document = json.loads(place.read_text())
    document["photographs"][key] = storage.sha256(b"secret")
    place.write_text(json.dumps(document))
    with pytest.raises(UserError, match="without a folder; choose the photographs again") as told:
        answers._read_review(folder)
    assert told.value.reason == "bad-review"
