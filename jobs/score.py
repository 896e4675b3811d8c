"""Score the photographs that are new since the last time, and publish them as one night."""

from collections.abc import Sequence

from leafnet.core import terminal
from leafnet.core.settings import parse
from leafnet.scoring.settings import ScoreSettings

EXAMPLES = """\
  python jobs/score.py --model runs/potato/model --images incoming --out predictions
  python jobs/score.py --config jobs/score.yaml --date 2026-11-24
  python jobs/score.py --model s3://models/champion --images "s3://field/2026-*/*.jpg" --out s3://p
exit codes:
  0 done, or nothing new; 2 a setting or file is wrong; 3 another job is at work on --out;
  4 more than --max-failed of the night failed (it is published all the same)
"""


def main(argv: Sequence[str]) -> None:
    settings = parse(
        ScoreSettings,
        argv,
        prog="jobs/score.py",
        description=__doc__,
        examples=EXAMPLES,
    )
    # After the settings are known to be right: Ray takes seconds to import.
    from leafnet.scoring import score

    score.run(settings)


if __name__ == "__main__":
    terminal.leave(terminal.run_job(main))
