"""Write the photographs most worth a label for people to label, and take the answers back."""

from collections.abc import Sequence

from leafnet.core import terminal
from leafnet.core.settings import parse
from leafnet.labelling.settings import ReviewSettings

EXAMPLES = """\
  python jobs/review.py --predictions predictions --count 50 --out review-1
  python jobs/review.py --answers export.json --base data/shards --out data/shards-2
  python jobs/review.py --answers review-1/index.csv --base data/shards --out data/shards-2
"""


def main(argv: Sequence[str]) -> None:
    settings = parse(
        ReviewSettings,
        argv,
        prog="jobs/review.py",
        description=__doc__,
        examples=EXAMPLES,
    )
    # After the settings are known to be right: Ray takes seconds to import.
    from leafnet.labelling import review

    review.run(settings)


if __name__ == "__main__":
    terminal.leave(terminal.run_job(main))
