"""Train a classifier on the shards of jobs/prepare.py and publish it."""

from collections.abc import Sequence

from leafnet.core import terminal
from leafnet.core.settings import parse
from leafnet.training.settings import TrainSettings

EXAMPLES = """\
  python jobs/train.py --shards data/shards --name potato
  python jobs/train.py --config jobs/train.yaml --shards data/shards --name b --head.epochs 80
  python jobs/train.py --shards data/shards --name potato --dry-run
exit codes:
  0 done, or nothing to do; 2 a setting or file is wrong; 3 another job trains under --name;
  130 interrupted, and the same command goes on
"""


def main(argv: Sequence[str]) -> None:
    settings = parse(
        TrainSettings,
        argv,
        prog="jobs/train.py",
        description=__doc__,
        examples=EXAMPLES,
    )
    # After the settings are known to be right: Ray takes seconds to import.
    from leafnet.training import train

    train.run(settings)


if __name__ == "__main__":
    terminal.leave(terminal.run_job(main))
