#!/usr/bin/env bash
# Runs every finding in this folder, or those named, and exits non-zero if one no longer holds.
set -uo pipefail
cd "$(dirname "$0")" || exit
names=("$@")
[ $# -gt 0 ] || names=(*.sh)
changed=()
for name in "${names[@]}"; do
  name=${name%.sh}
  [ "$name" = run ] && continue
  echo "== $name"
  bash "$name.sh" || changed+=("$name")
done
[ ${#changed[@]} -eq 0 ] && exit
echo "no longer as stated, or could not run: ${changed[*]}" >&2
exit 1
