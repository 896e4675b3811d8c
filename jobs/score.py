"""Score the photographs that are new since the last time, and publish them as one night."""

from leafnet.core.job import Job
from leafnet.scoring.settings import ScoreSettings

EXAMPLES = """\
  python jobs/score.py --model runs/potato/model --images incoming --out predictions
  python jobs/score.py --config jobs/score.yaml --date 2026-11-24
  python jobs/score.py --model s3://models/champion --images "s3://field/2026-*/*.jpg" --out s3://p
exit codes:
  0 done, or nothing new; 2 a setting or file is wrong; 3 another job is using --out;
  4 more than --max-failed of the night failed (it is published anyway)
"""
job = Job(ScoreSettings, "leafnet.scoring.score", __doc__, EXAMPLES)

if __name__ == "__main__":
    job.main()
