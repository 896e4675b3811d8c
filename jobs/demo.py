"""Prepare, train, evaluate and score, from beginning to end, on drawn photographs.

Nothing is downloaded.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from pydantic import Field

from leafnet.core import terminal
from leafnet.core.errors import UserError
from leafnet.core.job import Job
from leafnet.core.settings import Settings
from leafnet.core.terminal import say
from leafnet.data import synthetic

EXAMPLES = """\
  python jobs/demo.py
  python jobs/demo.py --out /tmp/leaves
  make demo PYTHON=python3.12
"""
JOBS = Path(__file__).parent
DRAWN = (
    "The photographs are drawn and the weights of the ResNet50 are random. The head is really "
    "trained, but the figures hold for these drawings only."
)
PER_CLASS, NEW_PER_CLASS = 150, 12


class DemoSettings(Settings):
    """Settings of jobs/demo.py."""

    out: Path = Field(Path("demo"), description="folder for everything that the demo makes")


def run(settings: DemoSettings) -> None:
    out = settings.out
    photographs, incoming = out / "drawn_photographs", out / "drawn_night"
    shards, runs, predictions = out / "shards", out / "runs", out / "predictions"
    model = runs / "demo" / "model"

    say(DRAWN)
    total = len(synthetic.CLASS_NAMES) * (PER_CLASS + NEW_PER_CLASS)
    with terminal.progress("draw", total) as advance:
        synthetic.write_photographs(photographs, per_class=PER_CLASS, advance=advance)
        synthetic.write_photographs(incoming, per_class=NEW_PER_CLASS, seed=1, advance=advance)
    synthetic.write_odd(incoming / "odd")
    start("prepare.py", "--source", photographs, "--out", shards, "--split", "70/15/15")
    config = ("--config", JOBS / "demo.yaml", "--note", DRAWN)
    start("train.py", *config, "--shards", shards, "--out", runs, "--name", "demo")
    start("evaluate.py", "--model", model, "--shards", shards, "--split", "test")
    start("score.py", "--model", model, "--images", incoming, "--out", predictions, "--note", DRAWN)

    say(f"""
{DRAWN}
The night has a few odd pictures in odd/: no leaf, a covered lens, a broken file.
  photographs  {photographs} for training, {incoming} for scoring
  shards       {shards}
  model        {model}
  results      {runs / "demo"}: metrics.json history.csv curves.png confusion.png
  predictions  {predictions}: Parquet, with a row for each photograph
  reports      {runs / "demo" / "report.html"}
               {predictions / "_reports" / "latest.html"}
The same with ImageNet weights, which are downloaded once:
  {python()} jobs/train.py --shards {shards} --out {runs} --name imagenet""")


def start(job: str, *arguments: str | Path) -> None:
    """Run a job as a person would, showing the command."""
    words = [str(argument) for argument in arguments]
    say(f"\n$ {python()} {shlex.join([f'jobs/{job}', *words])}", style="bold")
    command = [sys.executable, str(JOBS / job), *words, *terminal.flags()]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise UserError("demo-failed", f"jobs/{job} ended with code {done.returncode}, see above")


def python() -> str:
    """Return the command for this Python, relative to the working directory if that is shorter."""
    return min(sys.executable, os.path.relpath(sys.executable), key=len)


job = Job(DemoSettings, run, __doc__, EXAMPLES)

if __name__ == "__main__":
    job.main()
