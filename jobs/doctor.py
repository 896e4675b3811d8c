"""Check this machine and its Ray before a job does: what is wrong, and how to mend it."""

from collections.abc import Sequence

from leafnet.core import terminal
from leafnet.core.settings import DoctorSettings, parse

EXAMPLES = """\
  python jobs/doctor.py --gpu true
  python jobs/doctor.py --storage s3://bucket/runs
  python jobs/doctor.py --ray.address auto --json
exit codes:
  0 nothing is wrong, or warnings only; 2 a fault
"""


def main(argv: Sequence[str]) -> None:
    settings = parse(
        DoctorSettings,
        argv,
        prog="jobs/doctor.py",
        description=__doc__,
        examples=EXAMPLES,
    )
    # After the settings are known to be right: Ray takes seconds to import.
    from leafnet import doctor

    doctor.run(settings)


if __name__ == "__main__":
    terminal.leave(terminal.run_job(main))
