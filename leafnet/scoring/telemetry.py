"""The night in Ray's metrics, which Prometheus reads from every node of a cluster.

Ray drops a gauge that is not set again within some seconds, and gives the counters of each driver
labels of their own; and a night's driver ends when its numbers are known. So a small actor, which
asks for no CPU and stays when the job is over, keeps them. On a local Ray, which ends with the job,
there is nobody to read them.
"""

import math
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import ray
from ray.util.metrics import Counter, Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from leafnet.core.errors import UserError
from leafnet.core.settings import RaySettings
from leafnet.core.terminal import say
from leafnet.distributed import ray_train, session

NAME, NAMESPACE = "leafnet-telemetry", "leafnet"
_WAIT_S = 30.0


class Metric(NamedTuple):
    """One of the night's metrics; `out`, the folder of the predictions, is a label of each."""

    kind: Literal["counter", "gauge"]
    description: str
    label: str | None = None

    def exposed(self, name: str) -> str:
        """As Prometheus sees `name`: Ray puts its own name before it.

        >>> METRICS["leafnet_photographs"].exposed("leafnet_photographs")
        'ray_leafnet_photographs_total'
        """
        return f"ray_{name}" + ("_total" if self.kind == "counter" else "")


# What Prometheus sees has `ray_` before it and, for a counter, `_total` after it.
METRICS = {
    "leafnet_nights": Metric(
        "counter", "nights by how they ended: published, too_many_failed, nothing_new", "result"
    ),
    "leafnet_photographs": Metric(
        "counter", "photographs of published nights by status: ok, review, failed", "status"
    ),
    "leafnet_reasons": Metric(
        "counter", "photographs for review or failed, by the slug of their reason", "reason"
    ),
    "leafnet_night_photographs": Metric("gauge", "photographs of the last night", "status"),
    "leafnet_night_reasons": Metric(
        "gauge", "photographs of the last night for review or failed, by reason", "reason"
    ),
    "leafnet_review_share": Metric("gauge", "share of the last night for review [0 to 1]"),
    "leafnet_failed_share": Metric("gauge", "share of the last night that failed [0 to 1]"),
    "leafnet_expected_accuracy": Metric(
        "gauge",
        "accuracy that the last night's confidences let expect, and its 95 % interval; none of a "
        "night unlike validation [0 to 1]",
        "bound",
    ),
    "leafnet_audited_accuracy": Metric(
        "gauge",
        "accuracy by people's answers, of the nights audited last, its 95 % interval, and `alarm`: "
        "1 where it is under that of the test split by more than chance [0 to 1]",
        "bound",
    ),
    "leafnet_images_per_second": Metric(
        "gauge", "speed of the last night by stage, as in its summary [images/s]", "stage"
    ),
    "leafnet_night_seconds": Metric("gauge", "time of the last night by stage [s]", "stage"),
    "leafnet_last_success_timestamp_seconds": Metric(
        "gauge", "when a night last ended with code 0, also with nothing new [Unix time, s]"
    ),
}

# (name, labels, value): counters are increased by it, gauges set to it.
Value = tuple[str, dict[str, str], float]


def of_night(summary: Mapping[str, Any], *, max_failed: float) -> list[Value]:
    """What a published night comes to.

    Args:
        summary: as in `_runs/RUN_ID.json`.
        max_failed: more failed photographs than this make it no success [%].
    """
    scored, status = summary["scored"], summary["status"]
    too_many = status["failed"] > scored * max_failed / 100
    result = "too_many_failed" if too_many else "published"
    values: list[Value] = [
        ("leafnet_nights", {"result": result}, 1),
        *(("leafnet_photographs", {"status": name}, count) for name, count in status.items()),
        *(("leafnet_reasons", {"reason": slug}, n) for slug, n in summary["reasons"].items()),
        *(("leafnet_night_photographs", {"status": name}, n) for name, n in status.items()),
        *(("leafnet_night_reasons", {"reason": slug}, n) for slug, n in summary["reasons"].items()),
        *(
            ("leafnet_images_per_second", {"stage": stage}, rate)
            for stage, rate in summary.get("images_per_second", {}).items()
        ),
        *(
            ("leafnet_night_seconds", {"stage": stage}, seconds)
            for stage, seconds in summary["seconds"].items()
        ),
    ]
    for name in ("expected_accuracy", "audited_accuracy"):
        # Else that of an earlier night would stay.
        bounds = summary.get(name) or {"value": math.nan}
        values += [(f"leafnet_{name}", {"bound": bound}, bounds[bound]) for bound in bounds]
    if scored:
        values += [
            ("leafnet_review_share", {}, status["review"] / scored),
            ("leafnet_failed_share", {}, status["failed"] / scored),
        ]
    return values if too_many else [*values, _success()]


def _success() -> Value:
    return ("leafnet_last_success_timestamp_seconds", {}, time.time())


def tell(values: list[Value], *, out: str) -> None:
    """Give `values` to the cluster that this process is connected to; never fails a night."""
    if not ray_train.dashboard_url():
        return  # a local Ray: it has no metrics, and ends with the job
    try:
        here = ray.get_runtime_context().get_node_id()
        keeper: Any = (
            ray.remote(Keeper)
            .options(
                name=NAME,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_restarts=-1,
                # The head, in a submitted job: other machines go when they have nothing to do.
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
            )
            .remote()
        )
        known = [
            (name, METRICS[name]._asdict(), {**labels, "out": out}, float(value))
            for name, labels, value in values
        ]
        ray.get(keeper.record.remote(known), timeout=_WAIT_S)
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        say(f"warning   the night is not in Ray's metrics: {type(error).__name__}: {line}")


def nothing_new(settings: RaySettings, *, out: str) -> None:
    """Tell a cluster that is named that there was nothing to do, which is a success, too."""
    if not (settings.address or os.environ.get("RAY_ADDRESS")):
        return
    # A night with nothing to do needs no cluster.
    with suppress(UserError), session.session(settings):
        tell([("leafnet_nights", {"result": "nothing_new"}, 1), _success()], out=out)


class Keeper:
    """Keeps the metrics of all nights of a cluster; it may be older than the job that calls it."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._refresh, daemon=True).start()

    def record(self, values: list[tuple[str, dict[str, Any], dict[str, str], float]]) -> None:
        """Increase counters and set gauges: (name, description of the metric, labels, value)."""
        with self._lock:
            # A reason that the last night did not have is not to be shown as one of it.
            said = {(name, labels["out"]) for name, _, labels, _ in values}
            for known in list(self._gauges):
                if (known[0], dict(known[1])["out"]) in said:
                    del self._gauges[known]
            for name, metric, labels, value in values:
                if name not in self._metrics:
                    kind = Counter if metric["kind"] == "counter" else Gauge
                    self._metrics[name] = kind(name, metric["description"], tuple(sorted(labels)))
                if metric["kind"] == "gauge":
                    self._metrics[name].set(value, labels)
                    self._gauges[name, tuple(labels.items())] = value
                elif value > 0:
                    self._metrics[name].inc(value, labels)

    def _refresh(self) -> None:
        # A node drops a gauge that was not set for two of these intervals.
        every_s = max(1.0, ray_train.metrics_interval_s())
        while True:
            time.sleep(every_s)
            with self._lock:
                for (name, labels), value in self._gauges.items():
                    self._metrics[name].set(value, dict(labels))
