"""Make a model champion of a registry if it is not worse than the champion, or go back."""

from leafnet.core.job import Job
from leafnet.evaluation.settings import PromoteSettings

EXAMPLES = """\
  python jobs/promote.py --candidate runs/b/model --registry models --shards data/shards
  python jobs/promote.py --config promote.yaml --candidate runs/b/model --recall late_blight=0.9
  python jobs/promote.py --registry s3://bucket/models --rollback
then `jobs/score.py --model REGISTRY/champion` uses the champion at its start
exit codes:
  0 promoted, rolled back, or a tie and the champion stays; 2 a setting or file is wrong;
  3 another job is using --registry; 5 the candidate is worse, and the champion stays
"""
job = Job(PromoteSettings, "leafnet.evaluation.promote", __doc__, EXAMPLES)

if __name__ == "__main__":
    job.main()
