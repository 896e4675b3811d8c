"""(b) The whole job against the article's script, (c) its share of the floor, (g) a warm run."""

import json
import re
import shutil
import sys

import numpy as np

from tests.benchmarks import forward
from tests.benchmarks.rows import Bench, Line, Row, epochs, read, run, train

EPOCHS = 50


def whole_jobs(bench: Bench) -> list[Row]:
    """(b) and (c): jobs/train.py from launch to exit on a cold cache, and the article's script."""
    views = {8: _cold(bench, 8), 1: _cold(bench, 1)}
    found = [row for count in views for row in _floor(bench, count, views[count])]
    seconds, accuracy, how = _article(bench)
    peer = "article's script"
    found.append(Row("b", peer, seconds, "s", 1.0, peer, f"{how}; test accuracy {accuracy:.3f}"))
    for count, lines in views.items():
        taken, note = lines[-1].seconds, f"test accuracy {_accuracy(bench, count):.3f}"
        what = f"jobs/train.py, views {count}"
        found.append(Row("b", what, taken, "s", seconds / taken, peer, note))
    return sorted(found, key=lambda row: row.family)


def _cold(bench: Bench, views: int) -> list[Line]:
    shutil.rmtree(bench.work / "runs" / "features", ignore_errors=True)
    return train(bench, f"views{views}", "--views", str(views), "--head.epochs", str(EPOCHS))


def _accuracy(bench: Bench, views: int) -> float:
    metrics = json.loads((bench.work / "runs" / f"views{views}" / "metrics.json").read_text())
    return float(metrics["test"]["accuracy"])


def _article(bench: Bench) -> tuple[float, float, str]:
    """(seconds of 50 epochs, test accuracy, how they were found).

    With the pixels that the weights were trained on: the article's own scaling costs the same time
    and accuracy.
    """
    ran = bench.article_epochs
    script = [sys.executable, "-m", "tests.benchmarks.article", str(bench.data)]
    flags = {"epochs": ran, "weights": bench.weights, "preprocess": "resnet50", "seed": bench.seed}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    lines = run(bench.work, [*script, *words])
    told = [json.loads(line.text) for line in lines[:-1] if line.text.startswith("{")]
    ends = [row["seconds"] for row in told if "epoch" in row]
    accuracy = float(told[-1]["test_accuracy"])
    if ran >= EPOCHS:
        return lines[-1].seconds, accuracy, f"all {ran} epochs run"
    # The first epoch also traces and compiles.
    each = float(np.diff(ends).mean())
    seconds = lines[-1].seconds + each * (EPOCHS - ran)
    return seconds, accuracy, f"{EPOCHS} epochs extrapolated from {ran - 1} of {each:.1f} s"


def _floor(bench: Bench, views: int, lines: list[Line]) -> list[Row]:
    """The share of its time in which a job could have done nothing but forward passes."""
    of_run = read(bench, f"views{views}", "run.json")
    precision, seconds = str(of_run["precision"]), of_run["seconds"]
    assert isinstance(seconds, dict)
    told = [re.search(r"([\d,]+) of ([\d,]+) views", line.text) for line in lines]
    passes = max(int(match[2].replace(",", "")) for match in told if match)
    rate = forward.rates(bench)[f"folded {precision}"]
    floor, peer = passes / rate, f"bare folded {precision} loop, {rate:.1f} images/s"
    return [
        Row("c", f"extraction stage, views {views}", floor / seconds["features"], "share",
            floor / seconds["features"], peer, f"{passes:,} views in {seconds['features']:.1f} s"),
        Row("c", f"whole job, views {views}", floor / lines[-1].seconds, "share",
            floor / lines[-1].seconds, peer, f"{lines[-1].seconds:.1f} s"),
    ]  # fmt: skip


def warm_run(bench: Bench) -> list[Row]:
    """(g) Another head on features that are there: the run of (b), or one made for it."""
    if not (bench.work / "runs" / "views1" / "run.json").exists():
        train(bench, "first", "--views", "1", "--head.epochs", "1")
    flags = ("--views", "1", "--head.epochs", str(EPOCHS), "--explain", "false")
    lines = train(bench, "warm", *flags)
    ends = epochs(lines)
    cold = "a second run's targets: 15 s and 30 s"
    fit = (ends[-1] - ends[0]) * EPOCHS / (EPOCHS - 1)
    return [
        Row("g", "launch to first epoch of the head", ends[0], "s", 15 / ends[0], cold),
        Row("g", f"{EPOCHS} epochs of the head", fit, "s", 30 / fit, cold),
    ]
