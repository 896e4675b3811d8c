import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data import shards
from leafnet.data.shards import Shard
from leafnet.scoring import listing
from leafnet.scoring.listing import Listing


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
    assert found.notes == ("passed over 2 other files (1 hidden, 1 .txt)",)
    assert found.passed_over == {"hidden": 1, ".txt": 1}
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


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**", ["a-1.jpg", "a-2.jpg", "b-1.jpg", "deep/er/c.png"]),
        ("*", ["a-1.jpg", "a-2.jpg", "b-1.jpg", "deep/er/c.png"]),
        ("**/*", ["a-1.jpg", "a-2.jpg", "b-1.jpg", "deep/er/c.png"]),
        # `deep` and `deep/er` match, each with the photograph in it, which does not.
        ("**/*ee*", ["deep/er/c.png"]),
        ("**/*e*", ["deep/er/c.png"]),
        ("deep/*r", ["deep/er/c.png"]),
        (".h*", [".hidden"]),
    ],
)
def test_a_photograph_is_listed_once_however_often_it_matches(
    root: str, pattern: str, expected: list[str]
) -> None:
    storage.write_bytes(storage.join(root, "half.jpg.tmp"), b"being written")
    storage.write_bytes(storage.join(root, ".cache", "d.jpg"), b"hidden")
    assert names(listing.look(storage.join(root, pattern)), root) == expected


def test_hidden_files_and_those_being_written_are_passed_over(root: str) -> None:
    for name in (".git/a.jpg", "deep/.cache/b.jpg", "deep/c.jpg.tmp", ".tmp", "deep/x.tmp.jpg"):
        storage.write_bytes(storage.join(root, name), b"x")
    expected = ["a-1.jpg", "a-2.jpg", "b-1.jpg", "deep/er/c.png", "deep/x.tmp.jpg"]
    assert names(listing.look(root), root) == expected


def local_version(path: Path, content: bytes, *, mtime_ns: int) -> tuple[str, str, int]:
    """The version of a file by its folder and by itself, and its size."""
    path.write_bytes(content)
    os.utime(path, ns=(0, mtime_ns))
    (row,) = listing.look(str(path.parent)).photographs.to_pylist()
    (alone,) = listing.look(str(path)).photographs.to_pylist()
    return row["version"], alone["version"], row["size"]


def test_version_of_a_file_is_its_time_and_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    now = 1_700_000_000_123_456_789
    assert local_version(path, b"one", mtime_ns=now) == (f"{now}-3", f"{now}-3", 3)
    # Replaced by one of the same size, a billionth of a second later.
    assert local_version(path, b"two", mtime_ns=now + 1) == (f"{now + 1}-3", f"{now + 1}-3", 3)
    assert local_version(path, b"three", mtime_ns=now + 1)[0] == f"{now + 1}-5"


def test_the_five_most_frequent_kinds_of_other_files_are_told(root: str) -> None:
    kinds = {".csv": 6, ".json": 5, ".md": 4, ".xml": 3, ".log": 2, ".TXT": 1}
    for kind, count in kinds.items():
        for i in range(count):
            storage.write_bytes(storage.join(root, f"{i}{kind}"), b"x")
    told = "6 .csv, 5 .json, 4 .md, 3 .xml, 2 .log"
    assert listing.look(f"{root}/[0-9a]*").notes == (
        f"passed over 21 other files ({told} and 1 more)",
    )
    assert listing.look(f"{root}/a-").notes == ()


def test_one_file_is_listed_as_its_folder_lists_it(root: str) -> None:
    of_folder = {row["image"]: row for row in listing.look(root).photographs.to_pylist()}
    url = storage.join(root, "deep/er/c.png")
    found = listing.look(url)
    assert (found.kind, found.images, found.notes) == ("file", url, ())
    assert found.photographs.to_pylist() == [of_folder[url]]
    assert found.photographs.schema.equals(listing.SCHEMA)


@pytest.mark.parametrize("rows", [0, 2, 3, 4, 7])
def test_a_long_list_is_put_together_from_pieces(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_CHUNK", 3)
    urls = [f"/nowhere/{i}.jpg" for i in range(rows)]
    (tmp_path / "list.lst").write_text("\n".join(urls))
    table = listing.look(str(tmp_path / "list.lst")).photographs
    assert table["image"].to_pylist() == urls
    pieces = [len(piece) for piece in table["image"].chunks]
    assert pieces == [*[3] * (rows // 3), rows % 3]
    assert table.schema.equals(listing.SCHEMA)


def test_what_a_list_names(root: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.jpg"
    elsewhere.write_bytes(b"12345")
    storage.write_bytes(f"memory://{tmp_path.name}/other/d.jpg", b"123")
    lines = ["\ufeff" + f"memory://{tmp_path.name}/other/d.jpg", str(elsewhere), "deep/er/c.png"]
    lines += ["  a-1.jpg  ", "#b-1.jpg", "", "a-2.jpg#"]
    storage.write_bytes(storage.join(root, "LIST.TXT"), "\n".join(lines).encode())
    found = listing.look(storage.join(root, "LIST.TXT"))
    assert (found.kind, found.notes) == ("list", ())
    rows = {row["image"]: row["size"] for row in found.photographs.to_pylist()}
    assert rows == {
        f"memory://{tmp_path.name}/other/d.jpg": 3,
        str(elsewhere): 5,
        storage.join(root, "deep/er/c.png"): 13,
        storage.join(root, "a-1.jpg"): 7,
        storage.join(root, "a-2.jpg#"): None,
    }


def test_a_list_that_is_no_text(root: str) -> None:
    storage.write_bytes(storage.join(root, "list.txt"), b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"list\.txt is not UTF-8 text: ") as caught:
        listing.look(storage.join(root, "list.txt"))
    assert caught.value.reason == "bad-list"


def test_columns_of_a_parquet_list(tmp_path: Path) -> None:
    columns = {
        "url": ["/wrong"] * 5,
        "image": ["/a", None, "/b", "/a", "c"],
        "version": ["1", "2", "3", "4", None],
        "label": [0] * 5,
    }
    pq.write_table(pa.table(columns), tmp_path / "list.PARQUET")
    found = listing.look(str(tmp_path / "list.PARQUET"))
    # The first of what is repeated, and no row for what has no URL.
    assert found.photographs.to_pylist() == [
        {"image": "/a", "version": "1", "size": None, "row": None},
        {"image": "/b", "version": "3", "size": None, "row": None},
        {"image": f"{tmp_path}/c", "version": None, "size": None, "row": None},
    ]
    assert found.notes == ("1 of 4 lines are repeated",)


@pytest.mark.parametrize("column", ["image", "url", "path", "file", "uri"])
def test_names_of_the_column_of_a_parquet_list(column: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"123")
    pq.write_table(pa.table({column: ["a.jpg"]}), tmp_path / "list.parquet")
    (row,) = listing.look(str(tmp_path / "list.parquet")).photographs.to_pylist()
    assert (row["image"], row["size"]) == (f"{tmp_path}/a.jpg", 3)
    assert row["version"].endswith("-3")


def write_shard(root: str, name: str, keys: list[str]) -> Shard:
    made = {
        "key": keys,
        "image": [key.encode() for key in keys],
        "label": [0] * len(keys),
        "split": ["test"] * len(keys),
        "width": [1] * len(keys),
        "height": [1] * len(keys),
        "sha256": ["x"] * len(keys),
    }
    return shards.write_shard(root, name, pa.table(made), row_group=2)


def test_examples_of_several_shards(root: str) -> None:
    two = write_shard(root, "test-00000.parquet", ["a/1", "b/2"])
    three = write_shard(root, "test-00001.parquet", ["c", "d#e", "f"])
    shards.write_index(root, class_names=("a",), shards=[two, three], counts={}, prepared={})
    found = listing.look(root).photographs
    assert found.schema.equals(listing.SCHEMA)
    first, second = (storage.join(root, shard.name) for shard in (two, three))
    expected = [
        (f"{first}#a/1", two.sha256[:16], None, 0),
        (f"{first}#b/2", two.sha256[:16], None, 1),
        (f"{second}#c", three.sha256[:16], None, 0),
        (f"{second}#d#e", three.sha256[:16], None, 1),
        (f"{second}#f", three.sha256[:16], None, 2),
    ]
    assert [tuple(row.values()) for row in found.to_pylist()] == expected
    storage.delete(first)
    with pytest.raises(UserError, match=f"cannot read {first} .* prepare the data set") as caught:
        listing.look(root)
    assert caught.value.reason == "shard-missing"


@pytest.mark.parametrize(
    "text",
    ['[{"shards": 1, "class_names": 2}]', '{"shards": []}', "3", "no JSON", '{"class_names": []}'],
)
def test_an_index_of_others_is_a_file_of_theirs(root: str, text: str) -> None:
    storage.write_bytes(storage.join(root, "index.json"), text.encode())
    assert names(listing.look(root), root) == ["a-1.jpg", "a-2.jpg", "b-1.jpg", "deep/er/c.png"]
    with pytest.raises(UserError):  # no list of photographs, and no photograph
        listing.look(storage.join(root, "index.json"))


def test_an_index_of_shards_is_told_by_its_name_and_its_keys(root: str) -> None:
    text = b'{"shards": [], "class_names": []}'
    storage.write_bytes(storage.join(root, "other.json"), text)
    with pytest.raises(UserError, match="is no list of rows"):
        listing.look(storage.join(root, "other.json"))
    storage.write_bytes(storage.join(root, "index.json"), text)
    with pytest.raises(UserError):  # it is one of shards, and says not enough
        listing.look(root)


def test_a_photograph_has_one_url_however_a_list_spells_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "in" / name).write_bytes(b"1")
    spelled = ["in/a.jpg", "./in/a.jpg", "in/../in//a.jpg", f"{tmp_path}/in/./a.jpg", "in/b.jpg"]
    spelled.append(f"file://{tmp_path}/in/a.jpg")
    place = tmp_path / "tonight.txt"
    place.write_text("\n".join(spelled))
    found = listing.look(str(place))
    expected = [f"{tmp_path}/in/a.jpg", f"{tmp_path}/in/b.jpg"]
    assert found.photographs["image"].to_pylist() == expected
    pq.write_table(pa.table({"url": spelled, "version": ["1"] * 6}), tmp_path / "tonight.parquet")
    found = listing.look(str(tmp_path / "tonight.parquet"))
    assert found.photographs["image"].to_pylist() == expected


@pytest.mark.parametrize("secret", ["https://user:pass@host/a.jpg", "https://host/a.jpg?sig=1"])
def test_a_list_with_a_secret_is_refused_before_anything_is_stored(
    secret: str, tmp_path: Path
) -> None:
    (tmp_path / "tonight.txt").write_text(f"a.jpg\n{secret}\n")
    with pytest.raises(UserError, match="a URL at https://host holds a password") as told:
        listing.look(str(tmp_path / "tonight.txt"))
    assert told.value.reason == "secret-in-url"
    assert "pass" not in str(told.value).replace("password", "")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("photos.csv", "Image;label\na-1.jpg;x\ndeep/er/c.png;y\n"),
        ("photos.tsv", "id\tfile_name\n1\ta-1.jpg\n2\tdeep/er/c.png\n"),
        ("photos.csv", "a-1.jpg\ndeep/er/c.png\n"),
        ("photos.jsonl", '{"url": "a-1.jpg"}\n\n{"url": "deep/er/c.png"}\n'),
        ("photos.json", '["a-1.jpg", "deep/er/c.png"]'),
    ],
)
def test_lists_of_every_kind_name_photographs(root: str, name: str, text: str) -> None:
    storage.write_bytes(storage.join(root, name), text.encode())
    found = listing.look(storage.join(root, name))
    assert (names(found, root), found.kind) == (["a-1.jpg", "deep/er/c.png"], "list")


def test_a_table_without_photographs_is_refused_with_its_columns(root: str) -> None:
    storage.write_bytes(storage.join(root, "x.csv"), b"plant,date\n1,2026\n")
    with pytest.raises(UserError, match="has the columns plant, date; expected one of image"):
        listing.look(storage.join(root, "x.csv"))


@pytest.mark.parametrize("name", ["clip.MOV", "photos.zip", "night.xlsx", "photos.tar"])
def test_a_file_of_another_kind_is_no_failed_photograph(root: str, name: str) -> None:
    storage.write_bytes(storage.join(root, name), b"x")
    with pytest.raises(UserError, match=f"{name} is no photograph; give a folder") as caught:
        listing.look(storage.join(root, name))
    assert caught.value.reason == "no-images"


def test_a_parquet_data_set_is_no_list(tmp_path: Path) -> None:
    image = [{"bytes": b"x", "path": "x.jpg"}]
    pq.write_table(pa.table({"image": image, "label": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"the column image of .* is struct<.*jobs/prepare\.py"):
        listing.look(str(tmp_path / "x.parquet"))


def test_a_list_passes_over_what_a_folder_does(tmp_path: Path) -> None:
    """`find . > list.txt` names them all."""
    for name in ("a.jpg", "@eaDir/a.jpg/S.jpg", ".x.jpg", "b/IMG.MOV", "b/c.jpg.part", "b/d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = listing.look(str(tmp_path))
    every = sorted(str(p) for p in tmp_path.rglob("*") if p.is_file())
    (tmp_path / "list.txt").write_text("\n".join(every))
    of_list = listing.look(str(tmp_path / "list.txt"))
    assert sorted(of_list.photographs["image"].to_pylist()) == [
        f"{tmp_path}/a.jpg",
        f"{tmp_path}/b/d.jpg",
    ]
    assert found.photographs.sort_by("image").equals(of_list.photographs.sort_by("image"))
    told = {"hidden": 1, "@eaDir": 1, ".mov": 1, "being written": 1}
    assert found.passed_over == of_list.passed_over == told
