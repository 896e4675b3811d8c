"""Write the report of a training run or of a night again, from what is stored."""

from leafnet.core import storage
from leafnet.core.errors import UserError
from leafnet.core.job import Job
from leafnet.core.settings import ReportSettings
from leafnet.core.terminal import say
from leafnet.scoring import ledger
from leafnet.scoring import report as night_report
from leafnet.training import report as run_report

EXAMPLES = """\
  python jobs/report.py --run runs/potato
  python jobs/report.py --predictions predictions
  python jobs/report.py --predictions s3://field/predictions --date 2026-11-24
"""


def run(settings: ReportSettings) -> None:
    if (settings.run is None) == (settings.predictions is None):
        raise UserError("which-report", "give either --run or --predictions, and not both")
    if settings.run is not None:
        say(f"report    {run_report.write(settings.run)}")
    if settings.predictions is not None:
        out = storage.absolute(settings.predictions)
        nights = [file.date for file in ledger.published(out)]
        if not nights:
            raise UserError("no-predictions", f"{out} has no predictions; write them with score.py")
        say(f"report    {night_report.write(out, settings.date or max(nights))}")


job = Job(ReportSettings, run, __doc__, EXAMPLES)

if __name__ == "__main__":
    job.main()
