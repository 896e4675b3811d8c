"""What an actor that computes features writes, and what it refuses to."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from leafnet.core.errors import UserError
from leafnet.data.shards import Shard
from leafnet.features import cache
from leafnet.features.extraction import NOT_FINITE, _Extractor
from leafnet.models import resnet, runtime
from leafnet.models.weights import FEATURES

SHARD = Shard("train-00000.parquet", "train", 3, (3,), 1, "a" * 64)


@pytest.fixture
def extractor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], "_Extractor"]:
    """Two views of three photographs, through a network that gives each pixel's value times so."""

    def made(factor: float) -> _Extractor:
        def run(_: Any, stacks: Any) -> Any:
            for stack in stacks:
                yield factor * stack[:, :1, 0, 0].astype(np.float32).repeat(FEATURES, axis=1)

        monkeypatch.setattr(resnet, "build", lambda *_, **__: None)
        monkeypatch.setattr(runtime, "run", run)
        parts = cache.plan(str(tmp_path), [(SHARD, 2)], seed=0).missing
        board = SimpleNamespace(post=SimpleNamespace(remote=lambda rows: None))
        groups = {SHARD: {0: list(parts)}}
        return _Extractor({}, 8, "float32", 4, str(tmp_path), groups, board, 1, False)

    return made


def batch() -> dict[str, Any]:
    """Photographs of one colour each: 1, 2 and 3."""
    pixels = np.arange(1, 4, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
    return {
        "shard": np.array([SHARD.name]),
        "row_group": np.array([0]),
        "keys": np.array([json.dumps(["a\n.jpg", "b.jpg", "c.jpg"])]),
        "labels": np.array([[0, 1, 0]]),
        "pixels": pixels.repeat(3, 3)[None],
    }


def test_each_view_is_in_the_part_of_its_photograph(
    extractor: Callable[[float], _Extractor], tmp_path: Path
) -> None:
    list(extractor(0.5)(batch()))
    plan = cache.plan(str(tmp_path), [(SHARD, 2)], seed=0)
    assert plan.missing == ()
    for part in plan.present:
        read = cache.read_part(str(tmp_path), part)
        assert read is not None
        assert read[0][:, 0, 7].tolist() == [0.5, 1.0, 1.5]
        assert read[1].tolist() == [0, 1, 0]


def test_features_beyond_half_precision_are_refused_by_the_photographs_name(
    extractor: Callable[[float], _Extractor], tmp_path: Path
) -> None:
    """65,504 is the largest number: of the second and third photograph 80,000 and 120,000."""
    with pytest.raises(UserError, match=r"of b\.jpg in train-00000\.parquet .* 1 more") as caught:
        list(extractor(40_000)(batch()))
    assert caught.value.reason == NOT_FINITE
    assert not list(tmp_path.rglob("*.parquet"))
