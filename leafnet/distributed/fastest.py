"""What runs the network fastest on the nodes of the cluster, by measurement."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import ray.util.scheduling_strategies

from leafnet.core.hardware import gpu_precision
from leafnet.distributed import session

# An engine and its precision, as `models.measure.Way`.
Way = tuple[str, str]
# The kind of a node, and images/s by "engine precision" as far as they have been measured there.
Kept = Callable[[], tuple[str, dict[str, float]]]


def choose(
    ways: Sequence[Way],
    *,
    gpu: bool,
    kept: Kept,
    measure: Callable[..., dict[str, float]],
    weights: Sequence[Any],
    cpus: float,
    margin: float = 1.0,
) -> tuple[str, str, str]:
    """(engine, precision, why): the one of `ways` with the most images/s over all nodes.

    One node of each kind measures what none has measured before, half a minute; afterwards a
    choice costs nothing. On GPUs bfloat16 is taken where they have it.

    Args:
        ways: what the settings allow; the first is the one that needs no reason.
        gpu: whether the network runs on GPUs.
        kept: what the node that calls it has kept.
        measure: measures `ways` with `weights` on the node that calls it.
        weights: arguments of `measure`, each a value or a reference to one in Ray's object store.
        cpus: that a network has to itself [CPUs].
        margin: how many times as fast as the first another must be.
    """
    if len(ways) == 1:
        return *ways[0], "as set"
    if gpu:
        # "float32" sorts last: one node without bfloat16 decides for all.
        return "tensorflow", *max(session.on_every_node(gpu_precision, gpu=True).values())
    rates = _rates([" ".join(way) for way in ways], kept, measure, weights, cpus)
    ahead = {way: rates[" ".join(way)] / (margin if way != ways[0] else 1.0) for way in ways}
    best = max(ways, key=lambda way: ahead[way])
    shown = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items() if rate)
    if sum(map(bool, rates.values())) == 1:
        return *best, "the only one that this processor has"
    return *best, f"measured: {shown} images/s"


def _rates(
    names: Sequence[str],
    kept: Kept,
    measure: Callable[..., dict[str, float]],
    weights: Sequence[Any],
    cpus: float,
) -> dict[str, float]:
    """Images/s of each of `names`, added up over the nodes; 0 where one node cannot run it."""
    of_node: Mapping[str, tuple[str, dict[str, float]]] = session.on_every_node(kept, cpus=cpus)
    by_kind: dict[str, dict[str, float]] = {}
    for kind, rates in of_node.values():
        by_kind.setdefault(kind, {}).update(rates)
    measuring = {}
    for node, (kind, _) in of_node.items():
        if kind not in measuring and not by_kind[kind].keys() >= set(names):
            measuring[kind] = session.on_node(node, measure, *weights, cpus=cpus)
    for kind, answer in measuring.items():
        by_kind[kind] |= ray.get(answer)
    all_rates = [by_kind[kind] for kind, _ in of_node.values()]
    return {
        name: sum(rates[name] for rates in all_rates)
        if all(rates[name] for rates in all_rates)
        else 0.0
        for name in names
    }
