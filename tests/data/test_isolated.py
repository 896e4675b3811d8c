"""Decoding in another process, which photographs kill for real."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from leafnet.core.errors import UserError
from leafnet.data import isolated
from leafnet.data.images import MAX_PIXELS, ImageError, decode, fingerprint
from leafnet.data.isolated import DecoderProcess
from tests.conftest import leaf_jpeg, write_deadly_decoder


@pytest.fixture
def deadly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A photograph that kills the processes which this one starts."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return write_deadly_decoder(tmp_path)


def test_it_decodes_as_the_decoder_does() -> None:
    photograph = leaf_jpeg("healthy", seed=1, size=96)
    with DecoderProcess() as other:
        found = other.decode(photograph, 32, max_pixels=MAX_PIXELS)
        with pytest.raises(ImageError, match="not a picture") as caught:
            other.decode(b"text", 32, max_pixels=MAX_PIXELS)
        with pytest.raises(ImageError, match="that are allowed"):
            other.decode(photograph, 32, max_pixels=100)
        again = other.decode(photograph, 16, max_pixels=MAX_PIXELS)
        assert other.fingerprint(photograph) == fingerprint(photograph)
        with pytest.raises(ImageError, match="that are allowed"):
            other.fingerprint(photograph, max_pixels=100)
    assert caught.value.reason == "not-an-image"
    expected = decode(photograph, 32)
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert (found.width, found.height, found.format) == (96, 96, "JPEG")
    assert (found.captured_at, found.latitude) == (expected.captured_at, expected.latitude)
    np.testing.assert_array_equal(again.pixels, decode(photograph, 16).pixels)


def test_what_kills_it_is_one_photograph(deadly: bytes) -> None:
    photograph = leaf_jpeg("healthy", seed=1)
    with DecoderProcess() as other:
        for data in (deadly, photograph, deadly, photograph):
            if data == photograph:
                assert other.decode(data, 32, max_pixels=MAX_PIXELS).width == 64
                continue
            for ask in (lambda: other.decode(deadly, 32), lambda: other.fingerprint(deadly)):
                with pytest.raises(ImageError, match="the decoder's process died on it") as caught:
                    ask()
                assert caught.value.reason == "crashed"
                assert signal.SIGSEGV.name in str(caught.value)


def test_what_takes_for_ever_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_LIMIT_S", 2.0)
    monkeypatch.syspath_prepend(str(tmp_path))
    slow = write_deadly_decoder(tmp_path, death="import time; time.sleep(1000)")
    with (
        DecoderProcess() as other,
        pytest.raises(ImageError, match="was not done with it after 2 s"),
    ):
        other.decode(slow, 32, max_pixels=MAX_PIXELS)


def test_memory_that_a_photograph_may_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "_BASE_BYTES", 1_000_000_000)
    monkeypatch.syspath_prepend(str(tmp_path))
    hungry = write_deadly_decoder(tmp_path, death="bytearray(4_000_000_000)")
    with DecoderProcess() as other, pytest.raises(ImageError, match="not enough memory") as caught:
        other.decode(hungry, 32, max_pixels=1000)
    assert caught.value.reason == "too-large"


def test_a_try_that_died_is_known_to_the_next(tmp_path: Path) -> None:
    def tried(number: int) -> bool:
        with isolated.tried(tmp_path.name, number) as died:
            return died

    def die(number: int) -> None:
        code = (
            "import os, signal; from leafnet.data import isolated; "
            f"held = isolated.tried({tmp_path.name!r}, {number}); held.__enter__(); "
            "os.kill(os.getpid(), 9)"
        )
        done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
        assert done.returncode == -signal.SIGKILL

    assert not tried(0)
    die(0)
    assert not tried(7)
    assert tried(0)
    assert not tried(0)  # it came to its end
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"leafnet-{os.getuid()}"
    assert not (folder / f"tries-{tmp_path.name}").exists()


def test_the_next_try_decodes_elsewhere(deadly: bytes, tmp_path: Path) -> None:
    with isolated.decoder(tmp_path.name, 0, of="photographs") as here:
        assert (here.decode, here.fingerprint) == (decode, fingerprint)
    left = isolated.tried(tmp_path.name, 0)  # held, or Python would leave it
    left.__enter__()
    with isolated.decoder(tmp_path.name, 0, of="photographs") as other:
        with pytest.raises(ImageError, match="died on it"):
            other.fingerprint(deadly)
        assert other.decode(leaf_jpeg("healthy", seed=1), 32).width == 64


def test_a_task_that_always_dies_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(isolated, "_DEATHS", 2)
    dead = [isolated.tried(tmp_path.name, 0) for _ in range(2)]
    for one in dead:
        one.__enter__()  # and never leaves
    with (
        pytest.raises(UserError, match=r"decodes a\.tar died 2 times in the same place") as caught,
        isolated.tried(tmp_path.name, 0, of="a.tar"),
    ):
        pass
    assert caught.value.reason == "worker-dies"


def test_an_error_is_no_death(tmp_path: Path) -> None:
    with pytest.raises(io.UnsupportedOperation), isolated.tried(tmp_path.name, 0):
        raise io.UnsupportedOperation
    with isolated.tried(tmp_path.name, 0) as died:
        assert not died
