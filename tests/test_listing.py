import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leafnet import listing, shards, storage
from leafnet.errors import UserError
from leafnet.listing import Listing


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path / "in") if request.param == "local" else f"memory://{tmp_path.name}/in"
    for name in ("a-1.jpg", "a-2.jpg", "b-1.jpg", "deep/er/c.png", ".hidden", "note.txt"):
        storage.write_bytes(storage.join(root, name), name.encode())
    return root


def names(found: Listing, root: str) -> list[str]:
    images = found.photographs["image"].to_pylist()
    assert all(image.startswith(root) for image in images)
    return sorted(image.removeprefix(root).lstrip("/") for image in images)


def test_folder(root: str) -> None:
    found = listing.look(root + "/")
    assert names(found, root) == ["a-1.jpg", "a-2.jpg", "b-1.jpg", "deep/er/c.png"]
    assert found.kind == "folder"
    assert found.notes == ("passed over 1 other files (1 .txt)",)
    assert sorted(found.photographs["size"].to_pylist()) == [7, 7, 7, 13]
    assert found.photographs["row"].null_count == 4


@pytest.mark.parametrize(
    ("pattern", "expected", "kind"),
    [
        ("a-", ["a-1.jpg", "a-2.jpg"], "prefix"),
        ("de", ["deep/er/c.png"], "prefix"),
        ("*-1.jpg", ["a-1.jpg", "b-1.jpg"], "glob"),
        ("**/*.png", ["deep/er/c.png"], "glob"),
        ("de*", ["deep/er/c.png"], "glob"),
        ("a-2.jpg", ["a-2.jpg"], "file"),
    ],
)
def test_prefix_glob_and_file(root: str, pattern: str, expected: list[str], kind: str) -> None:
    found = listing.look(storage.join(root, pattern))
    assert names(found, root) == expected
    assert found.kind == kind


@pytest.mark.parametrize("pattern", ["none-*.jpg", "none", "none/"])
def test_nothing_there(root: str, pattern: str) -> None:
    with pytest.raises(UserError, match="nothing is there") as caught:
        listing.look(f"{root}/{pattern}")
    assert caught.value.reason == "no-images"


def test_an_empty_folder_is_a_night_without_photographs(tmp_path: Path) -> None:
    assert listing.look(str(tmp_path)).photographs.num_rows == 0


def test_version_follows_content(root: str) -> None:
    def versions() -> dict[str, str]:
        table = listing.look(root).photographs
        return dict(zip(table["image"].to_pylist(), table["version"].to_pylist(), strict=True))

    before = versions()
    storage.write_bytes(storage.join(root, "a-1.jpg"), b"other bytes")
    after = versions()
    assert {url for url in before if before[url] != after[url]} == {storage.join(root, "a-1.jpg")}
    assert versions() == after


def test_text_list(root: str) -> None:
    url = storage.join(root, "list.txt")
    lines = [storage.join(root, "a-1.jpg"), "", "# a remark", "b-1.jpg", "gone.jpg", "b-1.jpg"]
    storage.write_bytes(url, "\r\n".join(lines).encode())
    found = listing.look(url)
    assert names(found, root) == ["a-1.jpg", "b-1.jpg", "gone.jpg"]
    assert found.notes == ("1 of 4 lines are repeated",)
    by_image = {row["image"]: row for row in found.photographs.to_pylist()}
    assert by_image[storage.join(root, "gone.jpg")]["version"] is None
    of_folder = {row["image"]: row for row in listing.look(root).photographs.to_pylist()}
    for name in ("a-1.jpg", "b-1.jpg"):
        place = storage.join(root, name)
        assert by_image[place] == of_folder[place]


def test_parquet_list(root: str) -> None:
    url = storage.join(root, "list.parquet")

    def write(table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        storage.write_bytes(url, sink.getvalue().to_pybytes())

    images = [storage.join(root, "a-1.jpg"), storage.join(root, "b-1.jpg")]
    write(pa.table({"other": [1, 2], "url": images}))
    assert names(listing.look(url), root) == ["a-1.jpg", "b-1.jpg"]
    write(pa.table({"image": images, "version": ["v1", "v2"]}))
    assert listing.look(url).photographs["version"].to_pylist() == ["v1", "v2"]
    write(pa.table({"name": images}))
    with pytest.raises(UserError, match="has the columns name; expected one of image"):
        listing.look(url)
    storage.write_bytes(url, b"PAR1 no")
    with pytest.raises(UserError, match="is not a Parquet file"):
        listing.look(url)


def test_shards(tmp_path: Path) -> None:
    root = str(tmp_path)
    rows = [("k/1.jpg", b"1"), ("k/2.jpg", b"2"), ("k/3.jpg", b"3")]
    made = {
        "key": [key for key, _ in rows],
        "image": [image for _, image in rows],
        "label": [0, 1, 0],
        "split": ["test"] * 3,
        "width": [1] * 3,
        "height": [1] * 3,
        "sha256": ["x"] * 3,
    }
    shard = shards.write_shard(root, "test-00000.parquet", pa.table(made), row_group=2)
    shards.write_index(root, class_names=("a", "b"), shards=[shard], counts={}, prepared={})
    for given in (root, f"{root}/index.json"):
        found = listing.look(given)
        assert found.kind == "shards"
        assert found.photographs["image"].to_pylist() == [
            f"{root}/test-00000.parquet#{key}" for key, _ in rows
        ]
        assert found.photographs["row"].to_pylist() == [0, 1, 2]
        assert set(found.photographs["version"].to_pylist()) == {shard.sha256[:16]}


def test_a_folder_with_an_index_of_others_is_a_folder(root: str) -> None:
    storage.write_bytes(storage.join(root, "index.json"), b'{"pages": []}')
    assert listing.look(root).kind == "folder"


def test_what_is_no_regular_file_is_listed_without_a_version(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.jpg")).write_bytes(b"x")
    table = listing.look(str(tmp_path)).photographs
    rows = {row["image"].rsplit("/", 1)[1]: row["version"] for row in table.to_pylist()}
    assert rows["pipe.jpg"] is None
    assert rows["link.jpg"] is None
    assert rows["\\udcff.jpg"] is not None
