"""The main job end to end on drawn photographs: prepare, train, evaluate, score.

Nothing is downloaded.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from leafnet.core import terminal
from leafnet.core.errors import UserError
from leafnet.core.terminal import say
from leafnet.data import synthetic

EXAMPLES = """\
  python jobs/demo.py
  python jobs/demo.py --out /tmp/leaves
  make demo PYTHON=python3.12
"""
JOBS = Path(__file__).parent
DRAWN = (
    "The photographs are drawn and the weights of the ResNet50 are random; the head is really "
    "trained, and the figures hold for these drawings only."
)
PER_CLASS, NEW_PER_CLASS = 150, 12


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="jobs/demo.py",
        description=__doc__,
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for all it makes")
    out: Path = parser.parse_args(argv).out
    photographs, incoming = out / "drawn_photographs", out / "drawn_night"
    shards, runs, predictions = out / "shards", out / "runs", out / "predictions"
    model = runs / "demo" / "model"

    say(DRAWN)
    total = len(synthetic.CLASS_NAMES) * (PER_CLASS + NEW_PER_CLASS)
    with terminal.progress("draw", total) as advance:
        synthetic.write_photographs(photographs, per_class=PER_CLASS, advance=advance)
        synthetic.write_photographs(incoming, per_class=NEW_PER_CLASS, seed=1, advance=advance)
    synthetic.write_odd(incoming / "odd")
    run("prepare.py", "--source", photographs, "--out", shards, "--split", "70/15/15")
    config = JOBS / "demo.yaml"
    run("train.py", "--config", config, "--shards", shards, "--out", runs, "--name", "demo")
    run("evaluate.py", "--model", model, "--shards", shards, "--split", "test")
    run("score.py", "--model", model, "--images", incoming, "--out", predictions)

    say()
    say(DRAWN)
    say("The night has a few odd pictures in odd/: no leaf, a covered lens, a broken file.")
    say(f"  photographs  {photographs} to train on, {incoming} to score")
    say(f"  shards       {shards}")
    say(f"  model        {model}")
    say(f"  results      {runs / 'demo'}: metrics.json history.csv curves.png confusion.png")
    say(f"  predictions  {predictions}: Parquet, a row for each photograph")
    say(f"  reports      {runs / 'demo' / 'report.html'}")
    say(f"               {predictions / '_reports' / 'latest.html'}")
    say("The same with ImageNet weights, which are downloaded once:")
    say(f"  {_python()} jobs/train.py --shards {shards} --out {runs} --name imagenet")


def run(job: str, *arguments: str | Path) -> None:
    """Run a job as a person would, showing the command."""
    words = [f"jobs/{job}", *map(str, arguments)]
    say()
    say(f"$ {_python()} {shlex.join(words)}", style="bold")
    command = [sys.executable, str(JOBS / job), *map(str, arguments), *terminal.flags()]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise UserError("demo-failed", f"jobs/{job} ended with code {done.returncode}, see above")


def _python() -> str:
    """How to call this Python, short where that is possible."""
    path = Path(sys.executable)
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


if __name__ == "__main__":
    terminal.leave(terminal.run_job(main))
