"""What a walk finds and what it passes over, in folders, by patterns and in stores."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.data import listing
from leafnet.data.listing import PassedOver
from leafnet.preparation import sources
from tests.conftest import make_bucket, use_server
from tests.support.s3_server import Server

FILES = (
    "a/1.jpg", "a/2.JPG", "a/odd", "b/deep/3.png", "a/@eaDir/1.jpg/THUMB.jpg", "#recycle/x.jpg",
    "__MACOSX/a/._1.jpg", "a/.DS_Store", ".git/x.jpg", "lost+found/y.jpg", "a/4.jpg.tmp",
    "$RECYCLE.BIN/z.jpg", "System Volume Information/w.jpg", "a/IMG_1.AAE", "a/IMG_1.MOV",
    "a/IMG_2.CR2", "a/IMG_2.jpg", "a/IMG_3.NEF", "a/DJI_1.jgw", "_SUCCESS", "a/README",
)  # fmt: skip
SHOWN = ["a/1.jpg", "a/2.JPG", "a/IMG_2.jpg", "a/IMG_3.NEF", "a/odd", "b/deep/3.png"]
PASSED = {
    "@eaDir": 1, "#recycle": 1, "__MACOSX": 1, "hidden": 2, "lost+found": 1, "being written": 1,
    "$RECYCLE.BIN": 1, "System Volume Information": 1, ".aae": 1, ".mov": 1, ".jgw": 1,
    ".cr2 beside its photograph": 1, "_SUCCESS": 1, "README": 1,
}  # fmt: skip


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path / "in") if request.param == "local" else f"memory://{tmp_path.name}/in"
    for name in FILES:
        storage.write_bytes(storage.join(root, name), name.encode())
    return root


def names(root: str, pattern: str | None = None) -> tuple[list[str], dict[str, int]]:
    """Names below the root, sorted, and what was passed over."""
    passed = PassedOver()
    if pattern is None:
        found = listing.walk(root, passed)
    else:
        found = listing.matching(storage.join(root, pattern), passed)
    files = list(listing.without_beside(found, passed))
    assert all(storage.read_bytes(file.url) for file in files)
    assert all(file.version is not None and file.size for file in files)
    return sorted(file.url.removeprefix(f"{root}/") for file in files), dict(passed.counts)


def test_one_rule_for_folders_and_stores(root: str) -> None:
    assert names(root) == (SHOWN, PASSED)


@pytest.mark.parametrize("pattern", ["*", "**", "**/*"])
def test_patterns_have_the_rule_of_folders(root: str, pattern: str) -> None:
    assert names(root, pattern) == (SHOWN, PASSED)


def test_a_pattern_may_ask_for_hidden_names(root: str) -> None:
    assert names(root, ".g*")[0] == [".git/x.jpg"]
    assert names(root, "a/*.jpg") == (
        ["a/1.jpg", "a/IMG_2.jpg"],
        {},
    )


def test_what_is_passed_over_is_told_by_kind() -> None:
    passed = PassedOver()
    assert passed.notes() == ()
    passed.counts.update({"hidden": 1000, ".mov": 2, ".aae": 1})
    passed.unreadable.append("/x/y")
    assert passed.notes() == (
        "passed over 1,003 other files (1,000 hidden, 2 .mov, 1 .aae)",
        "warning: 1 folders cannot be read (/x/y, …); what is in them is missing",
    )


def test_links_are_followed_and_not_in_circles(tmp_path: Path) -> None:
    away = tmp_path / "away"
    (away / "deep").mkdir(parents=True)
    (away / "1.jpg").write_bytes(b"1")
    (away / "deep" / "2.jpg").write_bytes(b"2")
    (away / "deep" / "up").symlink_to(away)
    root = tmp_path / "in"
    root.mkdir()
    (root / "folder").symlink_to(away)
    (root / "photo.jpg").symlink_to(away / "1.jpg")
    (root / "again").symlink_to(root)
    (root / "nowhere.jpg").symlink_to(away / "gone.jpg")
    os.mkfifo(root / "pipe.jpg")
    passed = PassedOver()
    found = {file.name: file.size for file in listing.walk(str(root), passed)}
    assert found == {
        "folder/1.jpg": 1,
        "folder/deep/2.jpg": 1,
        "photo.jpg": 1,
        "nowhere.jpg": None,
        "pipe.jpg": None,
    }
    assert passed.counts == {"link into its own folder": 2}
    passed = PassedOver()
    assert {file.name for file in listing.matching(f"{root}/**/*.jpg", passed)} == set(found)


def test_folders_that_cannot_be_read_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/1.jpg", "b/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    scandir = os.scandir

    def refuse(place: str) -> Any:
        if refused == str(place).rstrip("/"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    refused, passed = str(tmp_path / "a"), PassedOver()
    assert [file.name for file in listing.walk(str(tmp_path), passed)] == ["b/2.jpg"]
    assert passed.unreadable == [refused]
    refused = str(tmp_path)
    with pytest.raises(UserError, match="Permission denied; it cannot be read") as caught:
        list(listing.walk(str(tmp_path), passed))
    assert caught.value.reason == "no-access"


def test_a_marker_of_a_folder_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consoles of object stores make an empty object `name/` for a new folder."""
    objects = [(name, {"ETag": name, "size": 3}) for name in ("", "a", "d/", "/b")]
    monkeypatch.setattr(storage, "objects", lambda folder, start: iter(objects))
    found = [tuple(file) for file in listing.walk("s3://b/in", PassedOver())]
    assert found == [("a", "s3://b/in/a", 3, "a"), ("/b", "s3://b/in//b", 3, "/b")]


def test_version_from_what_a_filesystem_tells() -> None:
    moment = datetime(2026, 11, 1, 12, tzinfo=UTC)
    seconds = moment.timestamp()
    assert listing.version({"mtime": 12.5, "size": 3}) != listing.version({"mtime": 13, "size": 3})
    assert listing.version({"mtime": 12.5, "size": 3}) != listing.version(
        {"mtime": 12.5, "size": 4}
    )
    for key in ("LastModified", "last_modified", "Last-Modified", "updated", "created", "mtime"):
        assert listing.version({key: moment, "size": 3}) == f"{seconds}-3"
        assert listing.version({key: seconds, "size": 3}) == f"{seconds}-3"
    for key in ("ETag", "etag", "e_tag", "md5Hash", "content_md5"):
        assert listing.version({key: '"abc"', "mtime": 1, "size": 3}) == "abc"
    assert listing.version({"ETag": "", "mtime": 1.5, "size": 3}) == "1.5-3"
    assert listing.version({"size": 3}) == "-3"


def test_keys_with_two_slashes_are_files(moto: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use_server(monkeypatch, moto.environment())
    root = make_bucket("slashes") + "/in"
    keys = ["/b.jpg", "a/1.jpg", "a//2.jpg", "/healthy/3.jpg", "a/@eaDir/x.jpg", "c.mov"]
    for key in keys:
        storage.write_bytes(f"{root}/{key}", key.encode())
    try:
        for pattern in (None, "*", "**"):
            found, passed = names(root, pattern)
            assert found == sorted(keys[:4])
            assert passed == {"@eaDir": 1, ".mov": 1}
        assert names(root, "a/")[0] == ["a//2.jpg", "a/1.jpg"]
        storage.delete(f"{root}//b.jpg")
        items = sources.look(root).items.to_pylist()
        assert [(item["key"], item["label"], item["url"]) for item in items] == [
            ("a/1.jpg", "a", f"{root}/a/1.jpg"),
            ("a/2.jpg", "a", f"{root}/a//2.jpg"),
            ("healthy/3.jpg", "healthy", f"{root}//healthy/3.jpg"),
        ]
        assert [storage.read_bytes(item["url"]) for item in items] == [
            b"a/1.jpg",
            b"a//2.jpg",
            b"/healthy/3.jpg",
        ]
    finally:
        storage._filesystem.cache_clear()
