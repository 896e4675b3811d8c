"""Turn a folder of photographs into shards: checked, de-duplicated, split and shuffled."""

from leafnet.core.job import Job
from leafnet.preparation import sources
from leafnet.preparation.settings import PrepareSettings

EXAMPLES = """\
  python jobs/prepare.py --source photos --out data/shards
  python jobs/prepare.py --source s3://bucket/photos --out s3://bucket/shards --split 70/15/15
  python jobs/prepare.py --source photos --out data/shards --group "plant_([0-9]+)"
exit codes:
  0 done, or nothing to do; 2 a setting or file is wrong; 3 another job is using --out;
  130 interrupted
"""


def run(settings: PrepareSettings) -> None:
    listing = sources.look(settings.source, evaluation=settings.split == "0/0/100")
    # Only now that the source is known to be right: Ray takes seconds to import.
    from leafnet.preparation import prepare

    prepare.run(settings, listing)


job = Job(PrepareSettings, run, __doc__, EXAMPLES)

if __name__ == "__main__":
    job.main()
