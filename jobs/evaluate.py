"""Evaluate a published model: every image of a split exactly once, and how sure the figures are."""

from leafnet.core.job import Job
from leafnet.evaluation.settings import EvaluateSettings

EXAMPLES = """\
  python jobs/evaluate.py --model runs/potato/model --shards data/shards --out evaluation
  python jobs/evaluate.py --model runs/b/model --against runs/a/model --shards data/shards
  python jobs/evaluate.py --model runs/b/model --shards data/shards --tta 8 --slice_by "(farm_.)/"
"""
job = Job(EvaluateSettings, "leafnet.evaluation.evaluate", __doc__, EXAMPLES)

if __name__ == "__main__":
    job.main()
