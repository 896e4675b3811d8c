"""The night's metrics: on a real cluster's endpoint, and in what reads them."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from leafnet import telemetry
from tests.test_jobs import free_port, job, kill_session, run
from tests.test_nightly import write_leaves

MONITORING = Path(__file__).parents[1] / "cluster" / "monitoring"
SUMMARY: dict[str, Any] = {
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
    page = (MONITORING.parent / "README.md").read_text()
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
