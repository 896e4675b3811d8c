"""What a machine has measured is kept, for it alone, and measured again where it is damaged."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leafnet.core import hardware
from leafnet.models import rates

OF = {"image_size": 64, "threads": 2}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "leafnet" / "rates"


def forward(pixels: np.ndarray) -> np.ndarray:
    return np.zeros((len(pixels), 1), np.float32)


def measured(name: str, image_size: int = 64) -> None:
    rates.measure({name: forward}, image_size=image_size, threads=2, others={})


def test_the_rate_is_that_of_the_fastest_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the first pass, which compiles, is none. Eight photographs in 0.5 s are 16 a second."""
    ends = iter([0, 0.1, 1, 3, 4, 5, 6, 6.5, 7, 9])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ends))
    seen: list[tuple[Any, ...]] = []

    def watched(pixels: np.ndarray) -> np.ndarray:
        seen.append((pixels.shape, pixels.dtype))
        return forward(pixels)

    assert rates.measure({"a": watched}, **OF, others={"b": 0.0}) == {"a": 16.0}
    assert seen == [((8, 64, 64, 3), np.dtype(np.uint8))] * 5
    assert rates.kept(**OF)[1] == {"a": 16.0, "b": 0.0}


def test_what_is_kept_is_added_to() -> None:
    measured("a")
    measured("b")
    assert rates.kept(**OF)[1].keys() == {"a", "b"}


def test_another_machine_version_size_or_number_of_threads_has_not_been_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured("a")
    here = rates.kept(**OF)[0]
    others = [rates.kept(image_size=32, threads=2), rates.kept(image_size=64, threads=1)]
    with monkeypatch.context() as patch:
        patch.setattr(hardware, "processor", lambda: "another")
        others.append(rates.kept(**OF))
    with monkeypatch.context() as patch:
        patch.setattr(hardware, "versions", lambda names: dict.fromkeys(names, "9.9"))
        others.append(rates.kept(**OF))
    assert [found for _, found in others] == [{}] * 4
    assert len({here, *(key for key, _ in others)}) == 5


@pytest.mark.parametrize("damaged", [b"", b"{", b"[1]", b'{"a": null}', b'{"a": "fast"}'])
def test_a_damaged_file_counts_as_none_and_is_replaced(folder: Path, damaged: bytes) -> None:
    measured("a")
    (path,) = folder.iterdir()
    path.write_bytes(damaged)
    assert rates.kept(**OF)[1] == {}
    measured("b")
    assert json.loads(path.read_bytes()).keys() == {"b"}


def test_where_nothing_can_be_written_it_is_measured_each_time(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("a file where the folder should be")
    measured("a")
    assert rates.kept(**OF)[1] == {}


def test_what_is_forgotten_is_measured_again() -> None:
    measured("a")
    measured("a", image_size=32)
    rates.forget(**OF)
    rates.forget(**OF)
    assert rates.kept(**OF)[1] == {}
    assert rates.kept(image_size=32, threads=2)[1].keys() == {"a"}


def test_a_job_that_is_half_as_fast_as_measured_has_it_measured_again(folder: Path) -> None:
    measured("a")
    (path,) = folder.iterdir()
    path.write_text('{"a": 10.0, "b": 3.0}')
    rates.correct("a", 5.0, **OF)
    rates.correct("b", 2.0, **OF)
    rates.correct("c", 1.0, **OF)
    assert path.exists()
    rates.correct("a", 4.9, **OF)
    assert not path.exists()


@pytest.mark.parametrize(
    ("kept", "flag", "expected"),
    [
        ({"tensorflow float32": 10, "tensorflow bfloat16": 12.6}, "", "bfloat16"),
        ({"tensorflow float32": 10, "tensorflow bfloat16": 12.4}, "avx512_bf16", "float32"),
        ({"tensorflow float32": 10, "tensorflow bfloat16": 0}, "avx512_bf16", "float32"),
        ({"tensorflow float32": 10}, "avx512_bf16", "bfloat16"),
        ({}, "", "float32"),
    ],
)
def test_the_precision_is_the_faster_as_far_as_it_is_measured(
    monkeypatch: pytest.MonkeyPatch, kept: dict[str, float], flag: str, expected: str
) -> None:
    monkeypatch.setattr(rates, "kept", lambda **_: ("", kept))
    monkeypatch.setattr(hardware, "bfloat16_instructions", lambda: flag)
    assert rates.precision(**OF) == expected
