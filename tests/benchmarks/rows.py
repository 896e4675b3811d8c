"""What all rows share: the row itself, the data they run on, and how jobs are called."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from PIL import Image

from leafnet.data import shards as data_shards
from leafnet.data import synthetic
from leafnet.data.shards import SCHEMA, read_index, write_index, write_shard

REPOSITORY = Path(__file__).parents[2]


class Row(NamedTuple):
    """A measurement beside that of its peer, taken in the same run."""

    family: str  # a to g
    what: str
    value: float
    unit: str
    ratio: float  # to the peer; above 1 is better, but for shares, efficiencies and memory
    peer: str
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """Where and on what the rows are measured."""

    work: Path  # a folder for all that is made
    data: Path  # folder with train, valid and test
    shards: Path  # the same, prepared
    weights: str
    article_epochs: int
    seed: int


def prepare(work: Path, data: Path | None) -> tuple[Path, Path, float]:
    """(photographs, shards, seconds of jobs/prepare.py)."""
    if data is None:
        data = work / "photographs"
        _draw(data)
    out, began = work / "shards", time.perf_counter()
    job(work, "prepare.py", "--source", data, "--out", out)
    return data, out, time.perf_counter() - began


def _draw(root: Path) -> None:
    """900, 300 and 300 leaves of the size of the article's photographs, for train, valid, test."""
    for split, count in (("train", 300), ("valid", 100), ("test", 100)):
        for label, name in enumerate(synthetic.CLASS_NAMES):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                path = folder / f"leaf_{i:04d}.jpg"
                if not path.exists():
                    seed = 100_000 * ("train", "valid", "test").index(split) + 10_000 * label + i
                    Image.fromarray(synthetic.draw_leaf(name, seed=seed)).save(path, quality=90)


def environment(work: Path) -> dict[str, str]:
    """Of subprocesses: this checkout's leafnet, and Ray's files beside the rest."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


class Line(NamedTuple):
    """A line that a process printed, and when, in seconds after it was launched."""

    seconds: float
    text: str


def run(
    work: Path, command: Sequence[str | Path], on_start: Callable[[int], None] | None = None
) -> list[Line]:
    """What `command` printed; the last line is empty and marks its end.

    Raises:
        RuntimeError: it failed, with what it printed last.
    """
    began = time.perf_counter()
    with open(work / "stderr.log", "a+") as stderr:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(work),
            cwd=REPOSITORY,
        )
        if on_start:
            on_start(process.pid)
        assert process.stdout is not None
        lines = [Line(time.perf_counter() - began, text.rstrip()) for text in process.stdout]
        code = process.wait()
    if code:
        tail = "\n".join(line.text for line in lines[-5:])
        raise RuntimeError(f"{command} ended with code {code}, see {work / 'stderr.log'}\n{tail}")
    return [*lines, Line(time.perf_counter() - began, "")]


def job(
    work: Path, name: str, *flags: str | Path, on_start: Callable[[int], None] | None = None
) -> list[Line]:
    """What jobs/`name` printed."""
    return run(work, [sys.executable, REPOSITORY / "jobs" / name, *flags], on_start)


def train(
    bench: Bench, name: str, *flags: str | Path, on_start: Callable[[int], None] | None = None
) -> list[Line]:
    """What jobs/train.py printed for a new run `name`."""
    shutil.rmtree(bench.work / "runs" / name, ignore_errors=True)
    return job(
        bench.work, "train.py", "--shards", bench.shards, "--out", bench.work / "runs",
        "--name", name, "--weights", bench.weights, "--seed", str(bench.seed), *flags,
        on_start=on_start,
    )  # fmt: skip


def epochs(lines: Sequence[Line]) -> list[float]:
    """When each epoch of jobs/train.py was told, in seconds after launch."""
    return [line.seconds for line in lines if re.match(r"epoch +\d+/", line.text)]


def read(bench: Bench, run_name: str, file: str) -> dict[str, object]:
    """A JSON file of a run."""
    return dict(json.loads((bench.work / "runs" / run_name / file).read_text()))


def write_copy(source: Path, root: Path, *, times: int = 1, row_group: int = 256) -> None:
    """The data set at `source`, each photograph `times` under as many keys."""
    index = read_index(str(source))
    shutil.rmtree(root, ignore_errors=True)
    written = []
    for shard in index.shards:
        table = pa.concat_tables(data_shards.row_groups(index.root, shard))
        for i in range(times):
            keys = pa.array([f"{i}/{key}" for key in table.column("key").to_pylist()])
            copy = table.set_column(0, SCHEMA.field("key"), keys)
            name = f"{shard.name.removesuffix('.parquet')}-{i}.parquet"
            written.append(write_shard(str(root), name, copy, row_group=row_group))
    write_index(
        str(root),
        class_names=index.class_names,
        shards=written,
        counts={
            split: {name: times * count for name, count in of_split.items()}
            for split, of_split in index.counts.items()
        },
        prepared={},
    )


def process_tree(root: int) -> list[int]:
    """`root` and all processes below it."""
    children = defaultdict(list)
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = Path(f"/proc/{name}/stat").read_text()
            except OSError:  # it has ended
                continue
            children[int(stat.rsplit(")", 1)[1].split()[1])].append(int(name))
    found = [root]
    for process in found:
        found += children[process]
    return found


def pss_mib(process: int) -> float:
    """Its memory, with pages that others share (the object store) counted by parts."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
