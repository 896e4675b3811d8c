"""A cluster of several raylets on this machine and a job on it, in processes that can be killed.

`python -m tests.faults.processes cluster` holds the raylets, and adds one for each number of CPUs
that it reads. `… driver FOLDER` fits a head on made features, `… features SHARDS CACHE ADDRESS`
computes features.
"""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from leafnet.distributed import checkpoint

PYTHON = [sys.executable, "-m", "tests.faults.processes"]
ENVIRONMENT = {
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A raylet that is gone is seen after 5 s; with Ray's default of 3000 after 15 s.
    "RAY_health_check_period_ms": "1000",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


class LocalCluster:
    """Raylets on this machine, each a node of a Ray cluster."""

    def __init__(self, process: "subprocess.Popen[str]", environment: dict[str, str]) -> None:
        self._process, self.environment = process, environment
        self.raylets: dict[str, int] = {}  # node id -> process
        self.address = ""

    def add(self, cpus: float) -> str:
        """Add a node; its id."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{cpus}\n")
        self._process.stdin.flush()
        added = json.loads(self._process.stdout.readline())
        self.address = added["address"]
        self.raylets[added["node"]] = added["raylet"]
        return str(added["node"])

    def kill_raylet(self, node: str) -> None:
        os.kill(self.raylets.pop(node), signal.SIGKILL)

    def node_of(self, pid: int) -> str:
        """The node whose raylet started the process."""
        parent = parent_of(pid)
        return next(node for node, raylet in self.raylets.items() if raylet == parent)


@contextmanager
def local_cluster(*cpus: float) -> Iterator[LocalCluster]:
    """A cluster with a node for each of `cpus`; the driver belongs to the first."""
    # A short path: sockets are below it.
    with tempfile.TemporaryDirectory(
        prefix="lf-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "RAY_TMPDIR": folder,
            "FAULT_FOLDER": folder,
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        environment.pop("RAY_ADDRESS", None)
        process = subprocess.Popen(
            [*PYTHON, "cluster"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        cluster = LocalCluster(process, environment)
        try:
            for share in cpus:
                cluster.add(share)
            yield cluster
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


class Job:
    """A fit of the head in a process of its own, and what it leaves in `folder`."""

    def __init__(self, cluster: LocalCluster, folder: Path, job: Any, **spec: Any) -> None:
        self.cluster, self.folder = cluster, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.storage = Path(spec.setdefault("storage", str(folder)))
        job = dataclasses.replace(job, identity={**job.identity, "folder": str(folder)})
        (folder / "job.pickle").write_bytes(pickle.dumps(job))
        spec = {"workers": 2, "cpus": 1.0, "hang_timeout": 5.0, "max_failures": 3, **spec}
        (folder / "spec.json").write_text(json.dumps({**spec, "address": cluster.address}))
        self.start()

    def start(self) -> None:
        with open(self.folder / "driver.err", "ab") as stderr:
            self.process = subprocess.Popen(
                [*PYTHON, "driver", str(self.folder)],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=self.cluster.environment,
            )

    @property
    def log(self) -> str:
        path = self.folder / "train.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def said(self, text: str) -> int:
        return sum(text in line for line in self.log.splitlines() if " INFO leafnet: " in line)

    def worker(self, rank: int) -> int:
        """The process of a worker."""
        return int((self.folder / f"worker-{rank}").read_text())

    def steps(self) -> int:
        """The step of the newest checkpoint, whole or not."""
        found = checkpoint.names(str(self.storage / "head"))
        return int(found[0].split("_")[1]) if found else 0

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 240) -> float:
        """Seconds until `condition`."""
        began = time.monotonic()
        while not condition():
            assert self.process.poll() is None, f"the job ended before {what}:\n{self.tail()}"
            assert time.monotonic() - began < timeout, f"waited for {what}:\n{self.tail()}"
            time.sleep(0.05)
        return time.monotonic() - began

    def wait_for_steps(self, more: int = 3, timeout: float = 240) -> float:
        """Seconds until `more` new steps are saved."""
        goal = self.steps() + more
        return self.wait(lambda: self.steps() >= goal, f"step {goal}", timeout)

    def finish(self, timeout: float = 400) -> int:
        """Let it run fast to its end; the exit code."""
        (self.folder / "slow").unlink(missing_ok=True)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end:\n{self.tail()}") from None

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def tail(self) -> str:
        errors = (self.folder / "driver.err").read_text(errors="replace")
        return "\n".join([*self.log.splitlines()[-60:], errors[-2000:]])

    def head(self) -> np.ndarray:
        """All weights of the head, flat."""
        with np.load(self.folder / "result.npz") as file:
            return np.asarray(file["head"])

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def loop(job: Any, place: Any, post: Any, folder_url: str) -> None:
    """What a worker of the job does: a fit that takes its time while there is a file `slow`."""
    from leafnet.training.head import fit
    from leafnet.training.head.worker import fit_and_evaluate

    folder = Path(job.identity["folder"])
    (folder / f"worker-{place.rank}.part").write_text(str(os.getpid()))
    os.replace(folder / f"worker-{place.rank}.part", folder / f"worker-{place.rank}")
    if _take(folder / "port-in-use"):
        _occupy(place.rank)
    views = fit.cached_views

    def slow_views(*arguments: Any, **more: Any) -> Any:
        gather = views(*arguments, **more)

        def slow(indices: Any, epoch: int) -> Any:
            if (folder / "slow").exists():
                time.sleep(0.3)
            return gather(indices, epoch)

        return slow

    fit.cached_views = slow_views
    fit_and_evaluate(job, place, post, folder_url)


def _take(path: Path) -> bool:
    """True once."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _occupy(rank: int) -> None:
    """Take the port that TensorFlow is about to listen on."""
    import socket

    host, port = json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"][rank].rsplit(":", 1)
    listener = socket.socket()
    listener.bind((host, int(port)))
    listener.listen()
    globals()["_listener"] = listener


def _die_on_import() -> None:
    """End a worker that imports this module, once, where a file asks for it."""
    folder = os.environ.get("FAULT_FOLDER")
    worker = b"RayTrainWorker" in Path("/proc/self/cmdline").read_bytes()
    if folder and worker and _take(Path(folder) / "die-on-import"):
        os._exit(7)


def _hold_cluster() -> None:
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    cluster = Cluster()
    for line in sys.stdin:
        node = cluster.add_node(
            num_cpus=float(line) if float(line) % 1 else int(float(line)),
            include_dashboard=False,
            object_store_memory=100 * 2**20,
        )
        raylet = node.all_processes["raylet"][0].process.pid
        answers.write(
            json.dumps({"node": node.node_id, "raylet": raylet, "address": cluster.address}) + "\n"
        )
    cluster.shutdown()


def _drive(folder: Path) -> None:
    from leafnet.core import interrupts, terminal
    from leafnet.core.settings import RaySettings
    from leafnet.distributed import session
    from leafnet.distributed.group import RestartPolicy
    from leafnet.training.head import worker as head_worker
    from leafnet.training.worker import Placement

    spec = json.loads((folder / "spec.json").read_text())
    job = pickle.loads((folder / "job.pickle").read_bytes())
    # By reference: the workers import this module.
    from tests.faults import processes as fault_processes

    original = head_worker.fit_and_evaluate
    head_worker.fit_and_evaluate = fault_processes.loop
    assert original is not head_worker.fit_and_evaluate
    workers = spec["workers"]
    with (
        terminal.chatter_to(folder / "train.log"),
        session.session(RaySettings(address=spec["address"])),
        interrupts.sigterm_interrupts(),
    ):
        began = time.monotonic()
        terminal.say("the fit begins")
        result = head_worker.fit_head(
            job,
            Placement(
                tuple(workers) if isinstance(workers, list) else workers,
                spec["cpus"],
                False,
                spec["storage"],
                RestartPolicy(spec["max_failures"], spec["hang_timeout"]),
            ),
            on_epoch=lambda row: terminal.say(f"epoch {row['epoch']:.0f}"),
        )
        terminal.say(f"done in {time.monotonic() - began:.1f} s")
    np.savez(folder / "result.npz", head=flat(result.state.head))
    (folder / "result.json").write_text(
        json.dumps(
            {
                "history": result.state.history,
                "restarts": [vars(one) for one in result.restarts],
                "examples": {split: one.examples for split, one in result.tallies.items()},
            }
        )
    )


def _features(root: str, cache: str, address: str) -> None:
    import ray

    from leafnet.core.settings import RaySettings
    from leafnet.data import shards
    from leafnet.distributed import resources, session
    from leafnet.features import cache as features_cache
    from leafnet.features import extraction
    from leafnet.models import weights

    index = shards.read_index(root)
    with session.session(RaySettings(address=address)) as nodes:
        plan = features_cache.plan(cache, [(shard, 6) for shard in index.shards], seed=0)
        extraction.extract(
            index,
            plan,
            ray.put(weights.load_weights("random").convolutions),
            image_size=64,
            precision="float32",
            batch_size=4,
            machines=resources.machines(nodes, False),
            advance=lambda count: None,
        )


def flat(head: Any) -> np.ndarray:
    return np.concatenate([np.asarray(array).ravel() for layer in head for array in layer])


def _run_driver() -> None:
    from leafnet.core import terminal

    sys.exit(terminal.run_job(lambda argv: _drive(Path(argv[0])), sys.argv[2:]))


_die_on_import()

if __name__ == "__main__":
    if sys.argv[1] == "cluster":
        _hold_cluster()
    elif sys.argv[1] == "features":
        _features(*sys.argv[2:])
    else:
        _run_driver()
