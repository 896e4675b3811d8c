"""Evaluate a published model: every image of a split exactly once, and how sure the figures are."""

from collections.abc import Sequence

from leafnet.core import terminal
from leafnet.core.settings import parse
from leafnet.evaluation.settings import EvaluateSettings

EXAMPLES = """\
  python jobs/evaluate.py --model runs/potato/model --shards data/shards --out evaluation
  python jobs/evaluate.py --model runs/b/model --against runs/a/model --shards data/shards
  python jobs/evaluate.py --model runs/b/model --shards data/shards --tta 8 --slice_by "(farm_.)/"
"""


def main(argv: Sequence[str]) -> None:
    settings = parse(
        EvaluateSettings,
        argv,
        prog="jobs/evaluate.py",
        description=__doc__,
        examples=EXAMPLES,
    )
    # After the settings are known to be right: Ray takes seconds to import.
    from leafnet.evaluation import evaluate

    evaluate.run(settings)


if __name__ == "__main__":
    terminal.leave(terminal.run_job(main))
