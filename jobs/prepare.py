"""Turn a folder of photographs into shards: checked, de-duplicated, split and shuffled."""

from collections.abc import Sequence

from leafnet.core import terminal
from leafnet.core.settings import parse
from leafnet.preparation import sources
from leafnet.preparation.settings import PrepareSettings

EXAMPLES = """\
  python jobs/prepare.py --source photos --out data/shards
  python jobs/prepare.py --source s3://bucket/photos --out s3://bucket/shards --split 70/15/15
  python jobs/prepare.py --source photos --out data/shards --group "plant_([0-9]+)"
exit codes:
  0 done, or nothing to do; 2 a setting or file is wrong; 3 another job is at work on --out;
  130 interrupted
"""


def main(argv: Sequence[str]) -> None:
    settings = parse(
        PrepareSettings,
        argv,
        prog="jobs/prepare.py",
        description=__doc__,
        examples=EXAMPLES,
    )
    listing = sources.look(settings.source)
    # After the settings and the source are known to be right: Ray takes seconds to import.
    from leafnet.preparation import prepare

    prepare.run(settings, listing)


if __name__ == "__main__":
    terminal.leave(terminal.run_job(main))
