"""Train a classifier on the shards of jobs/prepare.py and publish it."""

from leafnet.core.job import Job
from leafnet.training.settings import TrainSettings

EXAMPLES = """\
  python jobs/train.py --shards data/shards --name potato
  python jobs/train.py --config jobs/train.yaml --shards data/shards --name b --head.epochs 80
  python jobs/train.py --shards data/shards --name potato --dry-run
exit codes:
  0 done, or nothing to do; 2 a setting or file is wrong; 3 another job is training --name;
  130 interrupted; the same command continues
"""
job = Job(TrainSettings, "leafnet.training.train", __doc__, EXAMPLES)

if __name__ == "__main__":
    job.main()
