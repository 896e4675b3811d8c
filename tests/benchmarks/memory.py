"""(f) Peak memory of jobs/train.py on the images and on ten times as many."""

import shutil
import threading
from dataclasses import replace

from tests.benchmarks.rows import Bench, Row, process_tree, pss_mib, train, write_copy

TIMES, INTERVAL_S = 10, 0.5
FLAGS = ("--image_size", "32", "--views", "1", "--head.epochs", "2", "--explain", "false")


def rows(bench: Bench) -> list[Row]:
    peaks = {}
    for times in (1, TIMES):
        root = bench.work / f"times{times}"
        write_copy(bench.shards, root, times=times)
        peaks[times] = _peak(replace(bench, shards=root), f"memory{times}")
        shutil.rmtree(root)
    return [
        Row("f", f"{what}, {times}x the images", peaks[times][i], "MB",
            peaks[times][i] / peaks[1][i], "1x the images")
        for i, what in enumerate(("driver", "all processes of the job"))
        for times in (1, TIMES)
    ]  # fmt: skip


def _peak(bench: Bench, name: str) -> tuple[float, float]:
    """Peak (driver, driver and all below it) in MB, as PSS: shared pages are counted once."""
    over = threading.Event()
    peak = [0.0, 0.0]

    def watch(pid: int) -> None:
        while not over.wait(INTERVAL_S):
            memory = {process: pss_mib(process) for process in process_tree(pid)}
            peak[0] = max(peak[0], memory.get(pid, 0.0))
            peak[1] = max(peak[1], sum(memory.values()))

    watcher: list[threading.Thread] = []

    def start(pid: int) -> None:
        watcher.append(threading.Thread(target=watch, args=(pid,), daemon=True))
        watcher[0].start()

    try:
        train(bench, name, *FLAGS, on_start=start)
    finally:
        over.set()
        watcher[0].join()
    return peak[0], peak[1]
