#!/usr/bin/env bash
# From a fresh clone to a table of results on one CPU machine: an environment, a Ray cluster, the jobs of quickstart.py
# sent through `ray job submit`. A second run skips what is there: the installation and every stage already in ROOT.
#
#   jobs/quickstart.sh [options of jobs/quickstart.py]
#
# STEERLAB_ROOT is where results go (default ~/steerlab); an absolute path or a URI.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=cluster/environment.sh
source cluster/environment.sh

root="${STEERLAB_ROOT:-$HOME/steerlab}"
case "$root" in
    /* | *://*) ;;
    *) echo "STEERLAB_ROOT '$root' is relative; give an absolute path or a URI" >&2; exit 2 ;;
esac

began=$SECONDS
lap=$SECONDS
timings=()
finished() {
    timings+=("$1 $((SECONDS - lap))")
    echo "== $1: $((SECONDS - lap)) s"
    lap=$SECONDS
}

started_here=no
# shellcheck disable=SC2329
leave() {
    local code=$?
    trap - EXIT
    # A cluster that ran before is somebody's: it stays.
    [[ $started_here == no ]] || cluster/local.sh stop >/dev/null || true
    exit "$code"
}
trap leave EXIT

use_environment
finished environment

if ! cluster/local.sh status >/dev/null 2>&1; then
    started_here=yes
    cluster/local.sh start >/dev/null
fi
eval "$(cluster/local.sh env)"
finished cluster

echo "== jobs, on $RAY_API_SERVER_ADDRESS, results in $root"
# The job's own lines are what matters here; those of the client about itself are left out.
chatter='[0-9][[:space:]]+(INFO|SUCC|WARNING)[[:space:]]+(cli|sdk|dashboard_sdk|packaging|working_dir|job_manager|worker)[.]py:[0-9]+ -- |PYTHON worker processes have been started'
set +e
PYTHONUNBUFFERED=1 ray job submit --log-style record --log-color false --working-dir . \
    --runtime-env cluster/runtime_env.yaml -- python jobs/quickstart.py --root "$root" "$@" 2>&1 |
    grep --line-buffered -vE "$chatter"
code=${PIPESTATUS[0]}
set -e
finished jobs

echo "== quickstart: $((SECONDS - began)) s (${timings[*]})"
echo "results: $root"
exit "$code"
