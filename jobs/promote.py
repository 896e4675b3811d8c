"""Make a model champion of a registry if it is not worse than the champion, or go back."""

from collections.abc import Sequence

from leafnet.core import terminal
from leafnet.core.settings import parse
from leafnet.evaluation.settings import PromoteSettings

EXAMPLES = """\
  python jobs/promote.py --candidate runs/b/model --registry models --shards data/shards
  python jobs/promote.py --config promote.yaml --candidate runs/b/model --recall late_blight=0.9
  python jobs/promote.py --registry s3://bucket/models --rollback
then `jobs/score.py --model REGISTRY/champion` scores with the champion of the moment it starts
exit codes:
  0 promoted, rolled back, or a tie and the champion stays; 2 a setting or file is wrong;
  3 another job is at work on --registry; 5 the candidate is worse, and the champion stays
"""


def main(argv: Sequence[str]) -> None:
    settings = parse(
        PromoteSettings,
        argv,
        prog="jobs/promote.py",
        description=__doc__,
        examples=EXAMPLES,
    )
    # After the settings are known to be right: Ray takes seconds to import.
    from leafnet.evaluation import promote

    promote.run(settings)


if __name__ == "__main__":
    terminal.leave(terminal.run_job(main))
