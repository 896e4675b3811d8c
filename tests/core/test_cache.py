import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from leafnet.core import cache as core_cache
from leafnet.core import storage
from leafnet.core.cache import LocalCache, _make_room, read
from leafnet.core.errors import UserError
from leafnet.data import shards
from leafnet.data.shards import ShardIndex

MB = 1_000_000


class Store:
    """Counts what is asked of it."""

    def __init__(self, *contents: bytes) -> None:
        self.contents = {storage.sha256(content): content for content in contents}
        self.asked: list[str] = []

    def read(self, cache: LocalCache | None, sha256: str) -> bytes | None:
        def fetch() -> bytes:
            self.asked.append(sha256)
            return self.contents[sha256]

        return core_cache.read(cache, sha256=sha256, fetch=fetch)


def kept(cache: LocalCache) -> set[str]:
    return {path.name for path in Path(cache.folder).iterdir() if len(path.name) == 64}


def test_each_shard_is_fetched_once(tmp_path: Path) -> None:
    cache, store = LocalCache(str(tmp_path / "a" / "b"), 1.0), Store(b"one", b"two")
    for _ in range(3):
        for sha256, content in store.contents.items():
            assert store.read(cache, sha256) == content
    assert store.asked == list(store.contents)
    assert store.read(None, store.asked[0]) == b"one"
    assert len(store.asked) == 3


def test_what_was_read_least_recently_makes_room(tmp_path: Path) -> None:
    store = Store(*(bytes([i]) * MB for i in range(4)))
    cache = LocalCache(str(tmp_path), 2.5e-3)  # two of them
    first, second, third, fourth = store.contents
    for i, sha256 in enumerate((first, second, first, third)):
        store.read(cache, sha256)
        for path in tmp_path.iterdir():  # a tick of the file system's clock may be long
            if path.name == sha256:
                os.utime(path, (i, i))
    assert kept(cache) == {first, third}
    for path in tmp_path.iterdir():
        assert path.stat().st_size <= MB
    store.read(LocalCache(str(tmp_path), 0.5e-3), fourth)  # it can hold none
    assert fourth not in kept(cache)
    assert store.read(cache, first) == store.contents[first]


def test_room_is_kept_for_a_copy_that_is_being_written(tmp_path: Path) -> None:
    store = Store(b"1" * MB, b"2" * MB)
    cache = LocalCache(str(tmp_path), 2e-3)
    writing = tmp_path / f"{'a' * 64}.tmp"
    with open(writing, "wb") as file:
        file.truncate(MB)
    for sha256 in store.contents:
        store.read(cache, sha256)
    assert len(kept(cache)) == 1
    os.utime(writing, (0, 0))  # of a process that died
    for sha256 in store.contents:
        store.read(cache, sha256)
    assert not writing.exists()
    assert len(kept(cache)) == 2


@pytest.mark.parametrize("damage", [b"", b"onf", b"one and more"])
def test_a_damaged_copy_is_fetched_again(damage: bytes, tmp_path: Path) -> None:
    cache, store = LocalCache(str(tmp_path), 1.0), Store(b"one")
    (sha256,) = store.contents
    store.read(cache, sha256)
    (tmp_path / sha256).write_bytes(damage)
    assert store.read(cache, sha256) == b"one"
    assert (tmp_path / sha256).read_bytes() == b"one"
    assert len(store.asked) == 2


def test_what_the_store_gives_wrongly_is_not_kept(tmp_path: Path) -> None:
    cache, store = LocalCache(str(tmp_path), 1.0), Store(b"one")
    (sha256,) = store.contents
    store.contents[sha256] = b"another"
    assert store.read(cache, sha256) is None
    assert kept(cache) == set()


def test_many_readers_fetch_a_shard_once(tmp_path: Path) -> None:
    """Each opens the lock for itself, as processes do."""
    cache, store = LocalCache(str(tmp_path), 5e-3), Store(*(bytes([i]) * MB for i in range(8)))
    wanted = [sha256 for sha256 in store.contents for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda sha256: store.read(cache, sha256), wanted))
    assert found == [store.contents[sha256] for sha256 in wanted]
    assert sorted(store.asked) == sorted(store.contents)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5 * MB


def test_a_disk_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    store = Store(b"one")
    (sha256,) = store.contents
    for folder in ("/sys/leafnet", str(tmp_path / "file")):
        assert store.read(LocalCache(folder, 1.0), sha256) == b"one"
        assert f"no copy is kept in {folder}" in caplog.text


def test_errors_of_the_store_pass(tmp_path: Path) -> None:
    def fetch() -> bytes:
        raise UserError("no-answer", "away")

    with pytest.raises(UserError, match="away"):
        core_cache.read(LocalCache(str(tmp_path), 1.0), sha256="a" * 64, fetch=fetch)
    # And the lock is free again.
    assert core_cache.read(LocalCache(str(tmp_path), 1.0), sha256="a" * 64, fetch=bytes) is None


def test_shards_are_read_from_the_cache(
    data_set: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = LocalCache(str(tmp_path), 1.0)
    shard = data_set.shards[0]
    first = list(shards.row_groups(data_set.root, shard, cache=cache))
    monkeypatch.setattr(storage, "read_bytes", None)
    assert list(shards.row_groups(data_set.root, shard, cache=cache)) == first


def filled(folder: Path, *sizes: int) -> list[Path]:
    """Copies of these sizes, the first read longest ago; their ages are in hours."""
    now = time.time()
    paths = [folder / f"{i:x}{'0' * 63}" for i in range(len(sizes))]
    for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        path.write_bytes(bytes(size))
        os.utime(path, (now - 3600 * (20 - i),) * 2)
    return paths


@pytest.mark.parametrize(
    ("size", "limit", "fits", "left"),
    [
        (30, 90, True, [0, 1, 2]),  # 10 + 20 + 30 and 30 are 90
        (31, 90, True, [1, 2]),
        (40, 90, True, [1, 2]),
        (41, 90, True, [2]),
        (60, 90, True, [2]),
        (61, 90, True, []),
        (90, 90, True, []),
        (91, 90, False, []),
    ],
)
def test_no_more_is_deleted_than_makes_room(
    tmp_path: Path, size: int, limit: float, fits: bool, left: list[int]
) -> None:
    paths = filled(tmp_path, 10, 20, 30)
    (tmp_path / "lock-ab").write_bytes(bytes(5000))  # not a copy
    assert _make_room(tmp_path, size, limit) == fits
    assert [i for i, path in enumerate(paths) if path.exists()] == left
    assert (tmp_path / "lock-ab").exists()


@pytest.mark.parametrize(("seconds", "stays"), [(3500, True), (3700, False)])
def test_what_is_written_for_more_than_an_hour_is_of_a_dead_process(
    tmp_path: Path, seconds: float, stays: bool
) -> None:
    writing = tmp_path / f"{'a' * 64}.tmp"
    writing.write_bytes(bytes(50))
    os.utime(writing, (time.time() - seconds,) * 2)
    (copy,) = filled(tmp_path, 50)
    os.utime(copy)
    assert _make_room(tmp_path, 60, 110)
    assert writing.exists() == stays
    assert copy.exists() != stays


def test_a_copy_that_is_read_counts_as_read_now(tmp_path: Path) -> None:
    cache, store = LocalCache(str(tmp_path), 1.0), Store(b"one")
    (sha256,) = store.contents
    store.read(cache, sha256)
    os.utime(tmp_path / sha256, (0, 0))
    store.read(cache, sha256)
    assert time.time() - (tmp_path / sha256).stat().st_mtime < 60


def test_the_limit_is_in_gigabytes_of_a_thousand_million_bytes(tmp_path: Path) -> None:
    store = Store(bytes(1000), bytes(1001))
    exact, more = store.contents
    cache = LocalCache(str(tmp_path), 1e-6)
    store.read(cache, more)
    assert kept(cache) == set()
    store.read(cache, exact)
    assert kept(cache) == {exact}


def test_what_is_kept_is_the_copy_and_its_locks_alone(tmp_path: Path) -> None:
    cache, store = LocalCache(str(tmp_path), 1.0), Store(b"one")
    (sha256,) = store.contents
    assert store.read(cache, sha256) == b"one"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [sha256, "lock", f"lock-{sha256[:2]}"]
    )
    assert (tmp_path / sha256).read_bytes() == b"one"


def test_without_a_cache_what_the_store_gives_is_checked_too() -> None:
    store = Store(b"one")
    (sha256,) = store.contents
    store.contents[sha256] = b"another"
    assert store.read(None, sha256) is None


def test_a_copy_that_cannot_be_written_whole_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    cache, store = LocalCache(str(tmp_path), 1.0), Store(b"one")
    (sha256,) = store.contents
    assert store.read(cache, sha256) == b"one"
    assert all(path.name.startswith("lock") for path in tmp_path.iterdir())
    assert "disk full" in caplog.text


@pytest.mark.parametrize("name", ["../victim.txt", "", "a" * 63, "A" * 64, "a" * 64 + "\n"])
def test_a_name_that_is_no_digest_touches_no_file(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    for folder in (LocalCache(str(tmp_path / "cache"), 1.0), None):
        with pytest.raises(ValueError, match="is no sha256"):
            read(folder, sha256=name, fetch=lambda: b"")
    assert victim.read_text() == "mine"
