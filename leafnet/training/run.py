"""What a run of training has while it is at work: its lock, log, trackers, cluster and clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from leafnet.core import interrupts, storage, terminal
from leafnet.core import settings as core_settings
from leafnet.core.lock import Lock
from leafnet.core.settings import to_yaml
from leafnet.core.terminal import say
from leafnet.distributed import session
from leafnet.distributed.group import RestartPolicy
from leafnet.models.weights import Weights
from leafnet.training import mlflow, tensorboard
from leafnet.training.plan import Plan, Resources, allocate, say_data, say_work
from leafnet.training.worker import Placement


@dataclass(frozen=True)
class Network:
    """The weights of a network, also in Ray's object store."""

    weights: Weights
    reference: Any  # to `weights.convolutions`

    @classmethod
    def of(cls, weights: Weights) -> "Network":
        """Put `weights` into the store."""
        return cls(weights, ray.put(weights.convolutions))


@dataclass(frozen=True)
class Run:
    """A run at work; `began` [s] and `seconds` are of `time.monotonic`."""

    plan: Plan
    resources: Resources
    network: Network  # as the plan has it
    lock: Lock
    events: tensorboard.EventLog
    tracker: mlflow.Tracker
    began: float
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage

    @property
    def url(self) -> str:
        """Folder or URL of the run."""
        return self.plan.url

    @property
    def placement(self) -> Placement:
        """The workers of Ray Train, and where they save."""
        settings, resources = self.plan.settings, self.resources
        return Placement(
            resources.workers,
            resources.cpus_per_worker,
            resources.gpu,
            self.url,
            RestartPolicy(settings.max_failures, settings.hang_timeout, settings.checkpoint.keep),
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to those of the stage, without those of stages in it."""
        began, others = time.monotonic(), sum(self.seconds.values())
        yield
        inside = sum(self.seconds.values()) - others
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began - inside


@contextmanager
def open_run(plan: Plan, held: Lock, began: float) -> Iterator[Run]:
    """Open all that a run needs, from its log to the cluster, and close it after the block.

    Args:
        plan: of the run.
        held: the lock on the run.
        began: when the job began, of `time.monotonic`.

    Raises:
        UserError: no cluster answers, or it has too little.
    """
    settings, url = plan.settings, plan.url
    again = storage.exists(storage.join(url, "config.yaml"))
    terminal.keeps(f"features and checkpoints are kept in {settings.out}")
    with terminal.log_to(url, "train.log"):
        say(f"run {url}" + ("   goes on where it stopped" if again else ""))
        storage.write_bytes(storage.join(url, "config.yaml"), to_yaml(settings).encode())
        parameters = core_settings.flat(settings.model_dump(mode="json"))
        with (
            mlflow.follow(
                settings.mlflow, url, name=settings.name, parameters=parameters
            ) as tracker,
            session.session(settings.ray) as nodes,
            interrupts.sigterm_interrupts(),
        ):
            nodes = session.with_room(nodes, settings.gpu, settings.workers, settings.ray)
            resources = allocate(plan, nodes)
            say_data(plan)
            say_work(plan, resources)
            run = Run(
                plan,
                resources,
                Network.of(plan.weights),
                held,
                tensorboard.EventLog(url),
                tracker,
                began,
            )
            run.seconds["start"] = time.monotonic() - began
            yield run
