import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from leafnet import storage
from leafnet.errors import UserError


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def test_write_read_list_delete(root: str) -> None:
    storage.write_bytes(storage.join(root, "a", "one.bin"), b"1")
    storage.write_bytes(storage.join(root, "a", "two.bin"), b"22")
    storage.write_bytes(storage.join(root, "a", "two.bin"), b"222")
    storage.write_bytes(storage.join(root, "a", ".hidden"), b"x")
    storage.write_bytes(storage.join(root, "a", "half.tmp"), b"x")
    files = storage.list_files(storage.join(root, "a"))
    assert [(file.url.rsplit("/", 1)[-1], file.size) for file in files] == [
        ("one.bin", 1),
        ("two.bin", 3),
    ]
    assert [storage.read_bytes(file.url) for file in files] == [b"1", b"222"]
    assert storage.exists(storage.join(root, "a"))
    assert storage.is_folder(storage.join(root, "a"))
    storage.delete(storage.join(root, "a"))
    assert storage.list_files(storage.join(root, "a")) == []
    storage.delete(storage.join(root, "a"))


def test_missing_file(root: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))
    assert storage.list_names(storage.join(root, "nothing")) == []


def test_json(root: str) -> None:
    url = storage.join(root, "a.json")
    storage.write_json(url, {"a": [1, "ä"]})
    assert storage.read_json(url) == {"a": [1, "ä"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(url, float("nan"))
    storage.write_bytes(url, b"{")
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        storage.read_json(url)


def test_local_copy(root: str) -> None:
    url = storage.join(root, "w.h5")
    storage.write_bytes(url, b"weights")
    with storage.local_copy(url) as path:
        assert Path(path).read_bytes() == b"weights"
        assert Path(path).name == "w.h5"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    url = str(tmp_path / "a.json")
    storage.write_json(url, 1)
    with pytest.raises(TypeError):
        storage.write_bytes(url, "text")  # type: ignore[arg-type]
    assert json.loads((tmp_path / "a.json").read_text()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_unknown_protocol() -> None:
    with pytest.raises(UserError, match="cannot open ftpx://host/a"):
        storage.exists("ftpx://host/a")


@pytest.fixture
def fresh_filesystems() -> Iterator[None]:
    """Filesystems take their endpoints from the environment once a process; here and not after."""
    storage._filesystem.cache_clear()
    yield
    storage._filesystem.cache_clear()


def test_a_store_that_does_not_answer(
    fresh_filesystems: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="cannot reach --source s3://leaves/a: ") as caught:
        storage.reach("s3://leaves/a", flag="--source")
    assert caught.value.reason == "cannot-reach"
    assert address in str(caught.value)


def test_relative_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/") == str(tmp_path / "runs")
    assert storage.absolute(f"file://{tmp_path}/runs") == str(tmp_path / "runs")


def test_create_only_what_is_not_there(root: str) -> None:
    url = storage.join(root, "new", "a.json")
    assert storage.create_bytes(url, b"first")
    assert not storage.create_bytes(url, b"second")
    assert storage.read_bytes(url) == b"first"
    assert storage.list_names(storage.join(root, "new")) == ["a.json"]


def test_move_in(root: str, tmp_path: Path) -> None:
    url = storage.join(root, "date=1", "a.bin")
    for content in (b"one", b"two"):
        local = tmp_path / "local"
        local.write_bytes(content)
        storage.move_in(local, url)
        assert storage.read_bytes(url) == content
        assert not local.exists()
    assert storage.list_names(storage.join(root, "date=1")) == ["a.bin"]
