"""Evaluate a published model: every image of a split exactly once, and how sure the figures are."""

from leafnet.core.job import Job
from leafnet.evaluation.settings import EvaluateSettings
from leafnet.preparation import evaluation, sources

EXAMPLES = """\
  python jobs/evaluate.py --model runs/potato/model --shards data/shards --out evaluation
  python jobs/evaluate.py --model runs/b/model --against runs/a/model --shards data/shards
  python jobs/evaluate.py --model runs/b/model --images next_field --tta 8 --slice_by "(farm_.)/"
"""


def run(settings: EvaluateSettings) -> None:
    if settings.images is None:
        from leafnet.evaluation import evaluate

        evaluate.run(settings)
        return
    listing = sources.look(settings.images, evaluation=True)
    # Only now that the source is known to be right: Ray takes seconds to import.
    from leafnet.evaluation import evaluate

    evaluate.check_classes(settings, listing.source, listing.classes)
    with evaluation.data_set(listing, beside=settings.out, ray=settings.ray) as shards:
        evaluate.run(settings, data_set=shards)


job = Job(EvaluateSettings, run, __doc__, EXAMPLES)

if __name__ == "__main__":
    job.main()
