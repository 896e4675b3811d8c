"""Measure leafnet against named peers on this machine: benchmarks.json and benchmarks.md.

    make bench                                   drawn leaves and random weights, 10 to 15 minutes
    make bench ARGS='--data DIR --weights FILE.h5 --only a,c'

Every row is a ratio to a peer that was measured in the same run. On a machine that does other
things too, read the ratios and not the rates.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leafnet.models import bundle, rates
from tests.benchmarks import decoding, forward, jobs, memory, rows, scaling, tuning
from tests.benchmarks.rows import Bench, Row

FAMILIES: dict[str, tuple[str, Callable[[Bench], list[Row]]]] = {
    "a": ("forward pass", forward.rows),
    "b": ("whole job", jobs.whole_jobs),  # and c, from the same runs
    "d": ("decode", decoding.rows),
    "e": ("two workers", scaling.rows),
    "f": ("memory", memory.rows),
    "g": ("warm run", jobs.warm_run),
    "t": ("fine-tune step", tuning.rows),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder with train, valid, test; drawn if none")
    parser.add_argument("--weights", default="random", help="random, imagenet or an .h5 file")
    parser.add_argument("--only", default="abcdefgt", help="row families, such as a,c")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the results")
    parser.add_argument("--work", type=Path, help="folder for data and runs; temporary if none")
    parser.add_argument(
        "--article-epochs", type=int, default=3, help="of the article's script; 50: all of them"
    )
    parser.add_argument("--seed", type=int, default=0, help="of head, views and article's script")
    options = parser.parse_args()
    wanted = set(options.only.replace(",", ""))
    if unknown := wanted - set(FAMILIES) - {"c"}:
        parser.error(f"--only {options.only}: no row family {', '.join(sorted(unknown))}")
    if options.article_epochs < 3:
        parser.error("--article-epochs must be at least 3: the first also compiles")
    with tempfile.TemporaryDirectory(prefix="leafnet-bench-") as folder:
        work = (options.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        _measure(options, wanted, work)


def _measure(options: argparse.Namespace, wanted: set[str], work: Path) -> None:
    began = time.perf_counter()
    data, shards, seconds = rows.prepare(work, options.data and options.data.resolve())
    print(f"prepared in {seconds:.0f} s", flush=True)
    weights = options.weights
    bench = Bench(
        work=work,
        data=data,
        shards=shards,
        weights=str(Path(weights).resolve()) if Path(weights).exists() else weights,
        article_epochs=options.article_epochs,
        seed=options.seed,
    )
    measured: list[Row] = []
    took = {"prepare": round(seconds, 1)}
    for family, (title, measure) in FAMILIES.items():
        if family in wanted or (family == "b" and "c" in wanted):
            print(f"({family}) {title} …", flush=True)
            started = time.perf_counter()
            found = [row for row in measure(bench) if row.family in wanted]
            measured += found
            took[family] = round(time.perf_counter() - started, 1)
            print(f"{_table(found)}{took[family]:.0f} s\n", flush=True)
    measured.sort(key=lambda row: row.family)
    document: dict[str, Any] = {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "precision": rates.precision(image_size=256, threads=os.cpu_count() or 1),
            "platform": platform.platform(),
            "load_before": os.getloadavg(),
        },
        "versions": bundle.versions(),
        "data": "drawn leaves" if options.data is None else options.data.name,
        "weights": "random" if weights == "random" else Path(weights).name,
        "seconds": round(time.perf_counter() - began, 1),
        "seconds_of_families": took,
        "rows": [row._asdict() for row in measured],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "benchmarks.json").write_text(json.dumps(document, indent=2) + "\n")
    heading = f"Measured on {os.cpu_count()} cores of {_processor()}.\n\n"
    (options.out / "benchmarks.md").write_text(heading + _table(measured))
    print(f"{options.out / 'benchmarks.json'} and benchmarks.md, {document['seconds']:.0f} s")


def _table(measured: list[Row]) -> str:
    lines = ["| | what | measured | ratio | to | |", "|---|---|--:|--:|---|---|"]
    for row in measured:
        value = f"{row.value:,.2f}" if row.unit == "share" else f"{row.value:,.1f} {row.unit}"
        lines.append(
            f"| {row.family} | {row.what} | {value} | {row.ratio:.2f} | {row.peer} | {row.note} |"
        )
    return "\n".join(lines) + "\n"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
