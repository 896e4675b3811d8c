"""Write the photographs most worth a label for people to label, and take the answers back."""

from leafnet.core.job import Job
from leafnet.labelling.settings import ReviewSettings

EXAMPLES = """\
  python jobs/review.py --predictions predictions --count 50 --out review-1
  python jobs/review.py --answers export.json --base data/shards --out data/shards-2
  python jobs/review.py --answers review-1/index.csv --base data/shards --out data/shards-2
"""
job = Job(ReviewSettings, "leafnet.labelling.review", __doc__, EXAMPLES)

if __name__ == "__main__":
    job.main()
