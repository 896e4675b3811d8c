"""Plans of train and score on a growing and shrinking Ray of pretended nodes: a JSON line each."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from leafnet.core.errors import UserError
from leafnet.core.settings import RaySettings, worker_range
from leafnet.distributed import resources, session
from tests.distributed.test_resources import OF_CPUS, OF_GPUS, Shape, planned_train

_PLACE_S = 20.0


def _placed(bundles: list[dict[str, float]]) -> tuple[list[str], Any]:
    """The nodes where Ray puts `bundles`, which stay there."""
    group = placement_group(bundles, strategy="PACK")
    ray.get(group.ready(), timeout=_PLACE_S)
    return list(placement_group_table(group)["bundles_to_node_id"].values()), group


def _train(shape: Shape, gpu: bool, kinds: dict[str, str]) -> dict[str, Any]:
    workers, cpus, gpus = planned_train(shape.nodes, gpu, shape.workers)
    count = workers if isinstance(workers, int) else workers[0]
    nodes, group = _placed([{"CPU": cpus} | ({"GPU": 1} if gpus else {})] * count)
    remove_placement_group(group)
    return {"cpus": cpus, "on": sorted(kinds[node] for node in nodes)}


def _score(shape: Shape, gpu: bool, kinds: dict[str, str]) -> dict[str, Any]:
    span = worker_range(shape.workers)
    plan = resources.machines(shape.nodes, gpu, actors="auto" if span else int(shape.workers))
    bundle = {"CPU": plan.cpus_per_actor} | ({"GPU": 1} if plan.gpus else {})
    nodes, group = _placed([bundle] * plan.actors)
    _, decoding = _placed([{"CPU": plan.cpus_per_decode}])
    remove_placement_group(decoding)
    remove_placement_group(group)
    return {"cpus": plan.cpus_per_actor, "on": sorted(kinds[node] for node in nodes)}


def main() -> None:
    """Walk all shapes, one machine more or less at a time."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    settings = RaySettings(address=cluster.address)
    standing: dict[str, list[Any]] = {"cpu": [], "gpu": []}
    walk = [(0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (2, 1), (1, 1), (0, 1)]
    with session.session(settings) as found:
        began = time.monotonic()
        for gpu in (True, False):
            try:
                session.with_room(found, gpu, 2, settings)
            except UserError as error:
                print(json.dumps({"alone": gpu, "refused": error.reason}), flush=True)
        print(json.dumps({"seconds": time.monotonic() - began}), flush=True)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(session.with_room, found, False, 2, settings)
            joined = cluster.add_node(num_cpus=2)
            print(json.dumps({"joined": sorted(waiting.result())}), flush=True)
        cluster.remove_node(joined)
        for cpu_nodes, gpu_nodes in [*walk, (0, 2), (1, 2), (2, 2), (3, 2)]:
            for kind, wanted, of in (("cpu", cpu_nodes, OF_CPUS), ("gpu", gpu_nodes, OF_GPUS)):
                while len(standing[kind]) > wanted:
                    cluster.remove_node(standing[kind].pop())
                while len(standing[kind]) < wanted:
                    node = of[len(standing[kind])]
                    added = cluster.add_node(num_cpus=int(node.cpus), num_gpus=int(node.gpus))
                    standing[kind].append(added)
            cluster.wait_for_nodes()
            kinds = {
                node["NodeID"]: f"{'gpu' if node['Resources'].get('GPU') else 'cpu'} node"
                for node in ray.nodes()
                if node["Alive"]
            }
            for workers in (2, "1..4"):
                shape = Shape(cpu_nodes, gpu_nodes, workers)
                for job, plan in (("train", _train), ("score", _score)):
                    for gpu in (True, False):
                        told = {"shape": list(shape), "job": job, "gpu": gpu}
                        try:
                            told |= plan(shape, gpu, kinds)
                        except UserError as error:
                            told |= {"refused": error.reason}
                        print(json.dumps(told), flush=True)
        # Ray was told of GPUs that are not there.
        try:
            session.with_room(shape.nodes, True, 2, settings)
        except UserError as error:
            print(json.dumps({"unseen": str(error), "reason": error.reason}), flush=True)
        print(json.dumps({"unseen": session.with_room(shape.nodes, "auto", 2, settings)}))
    cluster.shutdown()


if __name__ == "__main__":
    main()
