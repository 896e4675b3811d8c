"""The night's metrics: on a real cluster's endpoint, and in what reads them."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from leafnet.core.errors import UserError
from leafnet.core.settings import RaySettings
from leafnet.distributed import session as distributed_session
from leafnet.scoring import telemetry
from tests.jobs.test_jobs import free_port, job, kill_session, run
from tests.scoring.test_score import write_leaves

MONITORING = Path(__file__).parents[2] / "cluster" / "monitoring"
EXPECTED = {"value": 0.9, "low": 0.85, "high": 0.95}
NONE = pytest.approx(math.nan, nan_ok=True)
SUMMARY: dict[str, Any] = {
    "expected_accuracy": EXPECTED,
    "audited_accuracy": None,
    "scored": 10,
    "status": {"ok": 6, "review": 3, "failed": 1},
    "reasons": {"low-confidence": 3, "truncated": 1},
    "images_per_second": {"from_start_to_end": 40.5},
    "seconds": {"total": 12.5},
}


def test_what_is_told_of_a_night() -> None:
    told = telemetry.of_night(SUMMARY, max_failed=10)
    assert told[:-1] == [
        ("leafnet_nights", {"result": "published"}, 1),
        ("leafnet_photographs", {"status": "ok"}, 6),
        ("leafnet_photographs", {"status": "review"}, 3),
        ("leafnet_photographs", {"status": "failed"}, 1),
        ("leafnet_reasons", {"reason": "low-confidence"}, 3),
        ("leafnet_reasons", {"reason": "truncated"}, 1),
        ("leafnet_night_photographs", {"status": "ok"}, 6),
        ("leafnet_night_photographs", {"status": "review"}, 3),
        ("leafnet_night_photographs", {"status": "failed"}, 1),
        ("leafnet_night_reasons", {"reason": "low-confidence"}, 3),
        ("leafnet_night_reasons", {"reason": "truncated"}, 1),
        ("leafnet_images_per_second", {"stage": "from_start_to_end"}, 40.5),
        ("leafnet_night_seconds", {"stage": "total"}, 12.5),
        *(("leafnet_expected_accuracy", {"bound": b}, v) for b, v in EXPECTED.items()),
        ("leafnet_audited_accuracy", {"bound": "value"}, NONE),
        ("leafnet_review_share", {}, 0.3),
        ("leafnet_failed_share", {}, 0.1),
    ]
    assert told[-1][0] == "leafnet_last_success_timestamp_seconds"
    for name, labels, _ in told:
        assert set(labels) == {telemetry.METRICS[name].label} - {None}


def test_too_many_failed_is_no_success() -> None:
    told = telemetry.of_night(SUMMARY, max_failed=5)
    assert told[0] == ("leafnet_nights", {"result": "too_many_failed"}, 1)
    assert "leafnet_last_success_timestamp_seconds" not in {name for name, _, _ in told}


@pytest.mark.parametrize(
    ("scored", "failed", "max_failed", "success"),
    [
        (40, 2, 5.0, True),
        (40, 3, 5.0, False),
        (40, 1, 0.0, False),
        (40, 0, 0.0, True),
        (0, 0, 5.0, True),
    ],
)
def test_a_night_succeeds_up_to_its_limit(
    scored: int, failed: int, max_failed: float, success: bool
) -> None:
    summary = SUMMARY | {"scored": scored}
    summary["status"] = {"ok": scored - failed, "review": 0, "failed": failed}
    told = telemetry.of_night(summary, max_failed=max_failed)
    assert told[0][1] == {"result": "published" if success else "too_many_failed"}
    times = [value for name, _, value in told if name == "leafnet_last_success_timestamp_seconds"]
    assert len(times) == success
    assert all(abs(value - time.time()) < 60 for value in times)


def test_shares_are_of_all_that_was_scored() -> None:
    summary = SUMMARY | {"scored": 16, "status": {"ok": 2, "review": 12, "failed": 2}}
    told = {name: value for name, _, value in telemetry.of_night(summary, max_failed=50)}
    assert told["leafnet_review_share"] == 0.75
    assert told["leafnet_failed_share"] == 0.125
    summary = SUMMARY | {"scored": 0, "status": {"ok": 0, "review": 0, "failed": 0}}
    del summary["images_per_second"]
    names = {name for name, _, _ in telemetry.of_night(summary, max_failed=50)}
    absent = {"leafnet_review_share", "leafnet_failed_share", "leafnet_images_per_second"}
    assert not names & absent


class Kept:
    """A counter or a gauge that remembers what it was told."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.description, self.tag_keys = name, description, tag_keys
        self.values: dict[tuple[tuple[str, str], ...], float] = {}

    def inc(self, value: float, labels: dict[str, str]) -> None:
        key = tuple(sorted(labels.items()))
        self.values[key] = self.values.get(key, 0) + value

    def set(self, value: float, labels: dict[str, str]) -> None:
        self.values[tuple(sorted(labels.items()))] = value


class KeptCounter(Kept):
    set = None  # type: ignore[assignment]


class KeptGauge(Kept):
    inc = None  # type: ignore[assignment]


def record(keeper: telemetry.Keeper, values: list[telemetry.Value], *, out: str = "o") -> None:
    keeper.record(
        [
            (name, telemetry.METRICS[name]._asdict(), {**labels, "out": out}, value)
            for name, labels, value in values
        ]
    )


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch) -> telemetry.Keeper:
    monkeypatch.setattr(telemetry, "Counter", KeptCounter)
    monkeypatch.setattr(telemetry, "Gauge", KeptGauge)
    monkeypatch.setattr(telemetry.Keeper, "_refresh", lambda self: None)
    return telemetry.Keeper()


def test_counters_grow_and_gauges_are_set(keeper: telemetry.Keeper) -> None:
    for count in (3, 4, 0):
        ok = {"status": "ok"}
        photographs = ("leafnet_photographs", ok, count)
        record(keeper, [photographs, ("leafnet_night_photographs", ok, count)])
    counter = keeper._metrics["leafnet_photographs"]
    gauge = keeper._metrics["leafnet_night_photographs"]
    key = (("out", "o"), ("status", "ok"))
    assert counter.values == {key: 7}
    assert gauge.values == {key: 0}
    assert (counter.name, counter.tag_keys) == ("leafnet_photographs", ("out", "status"))
    assert gauge.description == telemetry.METRICS["leafnet_night_photographs"].description


def test_a_counter_is_not_there_before_it_has_counted(keeper: telemetry.Keeper) -> None:
    record(keeper, [("leafnet_photographs", {"status": "failed"}, 0)])
    assert keeper._metrics["leafnet_photographs"].values == {}


def test_only_the_last_night_of_each_folder_is_shown(keeper: telemetry.Keeper) -> None:
    def reasons(**counts: int) -> list[telemetry.Value]:
        return [("leafnet_night_reasons", {"reason": r}, n) for r, n in counts.items()]

    record(keeper, reasons(empty=1, corrupt=2), out="here")
    record(keeper, reasons(empty=3), out="there")
    record(keeper, [("leafnet_review_share", {}, 0.5)], out="here")
    record(keeper, reasons(truncated=4), out="here")
    shown = {
        (name, dict(labels)["out"], dict(labels).get("reason")): value
        for (name, labels), value in keeper._gauges.items()
    }
    assert shown == {
        ("leafnet_night_reasons", "there", "empty"): 3,
        ("leafnet_review_share", "here", None): 0.5,
        ("leafnet_night_reasons", "here", "truncated"): 4,
    }


def test_gauges_are_set_again_before_a_node_drops_them(
    keeper: telemetry.Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    record_of = {"status": "ok"}
    monkeypatch.setattr(telemetry, "Gauge", KeptGauge)
    record(keeper, [("leafnet_night_photographs", record_of, 5)])
    gauge = keeper._metrics["leafnet_night_photographs"]
    gauge.values.clear()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise InterruptedError

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(InterruptedError):
        keeper._refresh()
    assert gauge.values == {(("out", "o"), ("status", "ok")): 5}
    assert slept == [10.0, 10.0]  # Ray's own interval of metrics, if nobody sets another


@pytest.mark.parametrize(
    ("settings", "environment", "asked"),
    [
        (RaySettings(), {}, False),
        (RaySettings(address="auto"), {}, True),
        (RaySettings(), {"RAY_ADDRESS": "127.0.0.1:1"}, True),
    ],
)
def test_a_night_with_nothing_to_do_is_told_to_a_cluster_that_is_named(
    settings: RaySettings,
    environment: dict[str, str],
    asked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[list[telemetry.Value], str]] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed_session, "session", lambda given: nullcontext())
    monkeypatch.setattr(telemetry, "tell", lambda values, *, out: told.append((values, out)))
    telemetry.nothing_new(settings, out="o")
    assert len(told) == asked
    for values, out in told:
        assert out == "o"
        assert values[0] == ("leafnet_nights", {"result": "nothing_new"}, 1)
        assert values[1][0] == "leafnet_last_success_timestamp_seconds"
        assert len(values) == 2


def test_a_cluster_that_is_away_fails_no_night_with_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def session(settings: RaySettings) -> None:
        raise UserError("no-cluster", "it is away")

    monkeypatch.setattr(distributed_session, "session", session)
    telemetry.nothing_new(RaySettings(address="auto"), out="o")


def expressions(document: Any) -> Iterator[str]:
    """Everything that is asked of Prometheus."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key in ("expr", "query") and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(document, list):
        for value in document:
            yield from expressions(value)


def names(document: Any) -> set[str]:
    return {name for text in expressions(document) for name in re.findall(r"ray_leafnet_\w+", text)}


def test_the_dashboard_and_the_alerts_use_the_names_that_are_there() -> None:
    exposed = {metric.exposed(name) for name, metric in telemetry.METRICS.items()}
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    assert names(dashboard) == exposed
    alerts = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    assert names(alerts)
    assert names(alerts) <= exposed
    page = (MONITORING.parent / "NIGHTLY.md").read_text()
    assert set(re.findall(r"`(ray_leafnet_\w+)`", page)) == exposed


def test_the_dashboard_holds_together() -> None:
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        taken = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not taken & cells, f"{panel['title']} lies over another panel"
        cells |= taken
        labels = {
            name
            for target in panel["targets"]
            for name in re.findall(r"by \((\w+)\)", target["expr"])
        }
        for target in panel["targets"]:
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == labels
            (name,) = names(target)
            metric = next(m for n, m in telemetry.METRICS.items() if m.exposed(n) == name)
            assert labels <= {metric.label, "out"}


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], str]]:
    """The environment of a client of a cluster with metrics, and where these are served."""
    folder = tmp_path_factory.mktemp("r")
    (folder / "token").write_text("f" * 64)
    ports = [free_port() for _ in range(5)]
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TMPDIR": f"/tmp/lt{free_port()}",
    }
    command = [
        str(Path(sys.executable).with_name("ray")),
        *("start", "--head", "--block", "--num-cpus=2", f"--port={ports[0]}"),
        *(f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"),
        f"--dashboard-agent-listen-port={ports[3]}",
        f"--metrics-export-port={ports[4]}",
        '--system-config={"metrics_report_interval_ms": 1000}',
    ]
    with open(folder / "head.log", "w") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            start_new_session=True,
            stdout=log,
            stderr=log,
        )
        metrics = f"http://127.0.0.1:{ports[4]}/metrics"
        deadline = time.monotonic() + 60
        while not _scrape(metrics):
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield environment | {"RAY_ADDRESS": f"127.0.0.1:{ports[0]}"}, metrics
        kill_session(process.pid)
        process.wait()
    shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


def _scrape(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def scraped(url: str) -> dict[tuple[str, str], float]:
    """(name, value of the label of leafnet) -> value, of leafnet's metrics alone."""
    labels = {metric.label for metric in telemetry.METRICS.values()} - {None}
    found = {}
    for family in text_string_to_metric_families(_scrape(url)):
        for sample in family.samples:
            if sample.name.startswith("ray_leafnet_"):
                (label,) = [v for k, v in sample.labels.items() if k in labels] or [""]
                found[sample.name, label] = sample.value
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_a_night_on_a_cluster_is_at_its_metrics_endpoint(
    head: tuple[dict[str, str], str], random_model: str, tmp_path: Path
) -> None:
    environment, url = head
    images, out = tmp_path / "in", tmp_path / "out"
    write_leaves(images, 6)
    (images / "empty.jpg").write_bytes(b"")
    command = job(
        *("score.py", "--model", random_model, "--images", images, "--out", out),
        *("--max_failed", 50, "--batch_size", 4),
    )
    done = run(command, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + 15
    while len(found := scraped(url)) < 12 and time.monotonic() < deadline:
        time.sleep(0.3)
    time.sleep(4)  # longer than Ray keeps what is not set again, here 2 s
    found = scraped(url)
    # The job has ended; what it told stays.
    assert found["ray_leafnet_photographs_total", "ok"] == 6
    assert found["ray_leafnet_photographs_total", "failed"] == 1
    assert found["ray_leafnet_reasons_total", "empty"] == 1
    assert found["ray_leafnet_nights_total", "published"] == 1
    assert found["ray_leafnet_night_photographs", "ok"] == 6
    assert found["ray_leafnet_night_reasons", "empty"] == 1
    assert found["ray_leafnet_review_share", ""] == 0
    assert found["ray_leafnet_failed_share", ""] == pytest.approx(1 / 7)
    assert found["ray_leafnet_images_per_second", "from_start_to_end"] > 0
    assert found["ray_leafnet_night_seconds", "total"] > 0
    assert time.time() - 300 < found["ray_leafnet_last_success_timestamp_seconds", ""] < time.time()

    done = run(command, **environment)
    assert "nothing new" in done.stdout, done.stdout + done.stderr
    deadline = time.monotonic() + 15
    nothing_new = ("ray_leafnet_nights_total", "nothing_new")
    while nothing_new not in scraped(url) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert scraped(url)[nothing_new] == 1
    assert scraped(url)["ray_leafnet_photographs_total", "ok"] == 6
