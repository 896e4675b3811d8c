"""The way with the most images a second over all nodes is taken."""

import subprocess
from typing import Any

import pytest
import ray

from leafnet.core import hardware
from leafnet.distributed import fastest, session

WAYS = [("a", "float32"), ("a", "bfloat16"), ("b", "float32")]
SLOW = {"a float32": 10.0, "a bfloat16": 6.0, "b float32": 9.0}
FAST = {"a float32": 20.0, "a bfloat16": 60.0, "b float32": 50.0}


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    nodes: dict[str, tuple[str, dict[str, float]]],
    measured: dict[str, dict[str, float]] | None = None,
    **more: Any,
) -> tuple[tuple[str, str, str], list[str]]:
    """(choice, nodes that were measured): of nodes with kinds and what they have kept."""
    asked: list[str] = []

    def on_node(name: str, *_: Any, **__: Any) -> dict[str, float]:
        asked.append(name)
        return (measured or {})[nodes[name][0]]

    monkeypatch.setattr(session, "on_every_node", lambda *_, **__: nodes)
    monkeypatch.setattr(session, "on_node", on_node)
    monkeypatch.setattr(ray, "get", lambda value: value)
    found = fastest.choose(
        more.pop("ways", WAYS),
        gpu=False,
        kept=lambda: ("", {}),
        measure=lambda: {},
        weights=(),
        cpus=1.0,
        **more,
    )
    return found, asked


def test_what_has_been_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = chosen(monkeypatch, {"n1": ("old", SLOW)})
    assert found[:2] == ("a", "float32")
    assert found[2] == "measured: a float32 10, a bfloat16 6, b float32 9 images/s"
    assert asked == []


def test_one_node_of_each_kind_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What any node of a kind has kept holds for all of it."""
    nodes: dict[str, tuple[str, dict[str, float]]] = {
        **{"n1": ("old", {}), "n2": ("old", {}), "n3": ("new", {}), "n4": ("new", FAST)},
        "n5": ("other", {"a float32": 1.0}),
    }
    found, asked = chosen(monkeypatch, nodes, {"old": SLOW, "other": SLOW})
    assert asked == ["n1", "n5"]
    assert found[:2] == ("a", "bfloat16")
    # 3 x 6 + 2 x 60 = 138, against 3 x 9 + 2 x 50 = 127 and 3 x 10 + 2 x 20 = 70.
    assert found[2] == "measured: a float32 70, a bfloat16 138, b float32 127 images/s"


def test_what_one_node_cannot_run_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {"n1": ("new", FAST), "n2": ("old", SLOW | {"a bfloat16": 0.0})}
    assert chosen(monkeypatch, nodes)[0][:2] == ("b", "float32")
    only = {"n2": ("old", {"a float32": 1.0, "a bfloat16": 0.0})}
    found, _ = chosen(monkeypatch, only, ways=WAYS[:2])
    assert found == ("a", "float32", "the only one that this processor has")


@pytest.mark.parametrize(("faster", "expected"), [(1.24, "float32"), (1.26, "bfloat16")])
def test_another_than_the_first_has_to_be_ahead_by_the_margin(
    monkeypatch: pytest.MonkeyPatch, faster: float, expected: str
) -> None:
    nodes = {"n1": ("new", {"a float32": 100.0, "a bfloat16": 100.0 * faster})}
    assert chosen(monkeypatch, nodes, ways=WAYS[:2], margin=1.25)[0][1] == expected
    assert chosen(monkeypatch, nodes, ways=WAYS[:2])[0][1] == "bfloat16"


def test_one_way_is_taken_as_set(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = chosen(monkeypatch, {}, ways=WAYS[2:])
    assert found == ("b", "float32", "as set")


def test_on_gpus_one_node_without_bfloat16_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the GPUs of a node the oldest: 7.5 is before 10.0."""
    nodes = {"n1": ("bfloat16", "new"), "n2": ("float32", "old"), "n3": ("bfloat16", "new")}

    def on_every_node(function: Any, *, gpu: bool) -> dict[str, tuple[str, str]]:
        assert (function, gpu) == (hardware.gpu_precision, True)
        return nodes

    monkeypatch.setattr(session, "on_every_node", on_every_node)
    found = fastest.choose(
        WAYS[:2],
        gpu=True,
        kept=lambda: ("", {}),
        measure=lambda: {},
        weights=(),
        cpus=1.0,
    )
    assert found == ("tensorflow", "float32", "old")
    done = subprocess.CompletedProcess([], 0, stdout="10.0\n7.5\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert hardware.gpu_precision()[0] == "float32"
