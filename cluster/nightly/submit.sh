#!/bin/sh
# Submit a job to Ray, follow it to its end, and stop it when it takes longer than DEADLINE:
#   cluster/nightly/submit.sh leafnet-score python jobs/score.py --config jobs/score.yaml
# The first word names the submission, the rest is the job. Exit code: the job's own, such as 4 for a
# night that is published with too many failed photographs, or 124 stopped at the deadline. Ending `ray job submit` alone would
# leave the job running, so an interruption stops the job as well.
set -u
name=$1
shift
cd "$(dirname "$0")/../.." || exit 1
id="$name-$(date -u +%Y%m%dT%H%M%SZ)"

timeout --foreground --kill-after=30s "${DEADLINE:-5h}" \
  ray job submit --submission-id "$id" --runtime-env cluster/runtime_env.yaml --working-dir . -- "$@" &
submit=$!
trap 'ray job stop "$id"; exit 130' INT TERM
wait "$submit"
code=$?
if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
  echo "$id was not done after ${DEADLINE:-5h}: stopping it" >&2
  ray job stop "$id"
  exit 124
fi
# `ray job submit` ends with 1 whatever the job's own code was.
if [ "$code" -eq 1 ]; then
  own=$(python - "$id" <<'END'
import sys
from ray.job_submission import JobSubmissionClient
print(JobSubmissionClient().get_job_info(sys.argv[1]).driver_exit_code)
END
  )
  case $own in
    [1-9]*) code=$own ;;  # none where the job has not run, below 0 where a signal ended it
  esac
fi
exit "$code"
