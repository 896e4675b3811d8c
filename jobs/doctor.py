"""Check this machine and its Ray before a job does: what is wrong, and how to fix it."""

from leafnet.core.job import Job
from leafnet.core.settings import DoctorSettings

EXAMPLES = """\
  python jobs/doctor.py --gpu true
  python jobs/doctor.py --storage s3://bucket/runs
  python jobs/doctor.py --ray.address auto --json
exit codes:
  0 no fault, or warnings only; 2 something is wrong
"""
job = Job(DoctorSettings, "leafnet.doctor", __doc__, EXAMPLES)

if __name__ == "__main__":
    job.main()
