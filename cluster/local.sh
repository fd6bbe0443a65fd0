#!/usr/bin/env bash
# A Ray cluster on this machine, with token authentication.
#
#   cluster/local.sh start [options of `ray start`]     e.g. --num-cpus 4; does nothing if it already runs
#   cluster/local.sh status                             exit code 0 if it runs
#   cluster/local.sh stop                               stops this cluster and no other
#   eval "$(cluster/local.sh env)"                      points ray and steerlab in this shell at it
#
# The cluster keeps its own session folder, so that programs that only say `ray.init()` do not join it by accident.
# STEERLAB_CLUSTER_DIR chooses where its process id, address and log are kept (default ~/.cache/steerlab/cluster);
# PYTHON chooses the interpreter whose Ray is started (default: python of this shell).
set -euo pipefail

state="${STEERLAB_CLUSTER_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/steerlab/cluster}"
session="${STEERLAB_RAY_TMP:-${TMPDIR:-/tmp}/steerlab-ray-$(id -u)}"
python="${PYTHON:-python}"
log="$state/ray.log"

die() {
    echo "cluster/local.sh: $*" >&2
    exit 1
}

# Is the process that we started still the one with this id? Ids are used again.
running() {
    [[ -f "$state/pid" && -f "$state/started" ]] || return 1
    local pid
    pid="$(<"$state/pid")"
    kill -0 "$pid" 2>/dev/null && [[ "$(started_at "$pid")" == "$(<"$state/started")" ]]
}

# Is any process of this group alive? One that has ended but was not waited for does not count.
group_lives() {
    ps -e -o pgid=,stat= | awk -v group="$1" '$1 == group && $2 !~ /^Z/ { found = 1 } END { exit !found }'
}

started_at() {
    ps -o lstart= -p "$1"
}

# The first free port from $1 on.
free_port() {
    "$python" - "$1" <<'PYTHON'
import socket, sys
for port in range(int(sys.argv[1]), int(sys.argv[1]) + 1000):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            continue
    print(port)
    break
PYTHON
}

environment() {
    echo "export RAY_AUTH_MODE=token"
    echo "export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0" # 127.0.0.1 is this machine, not its address for others
    echo "export RAY_API_SERVER_ADDRESS=$(<"$state/dashboard")"
    echo "export RAY_ADDRESS=$(<"$state/address")"
}

answers() {
    "$python" - "$(<"$state/dashboard")" <<'PYTHON'
import sys, urllib.error, urllib.request
try:
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1] + "/api/version", timeout=2)
except urllib.error.HTTPError:
    pass  # asks for the token: it is there
except OSError:
    sys.exit(1)
PYTHON
}

describe() {
    echo "Ray cluster: $(<"$state/address")   dashboard and job API: $(<"$state/dashboard")   log: $log"
    echo "To use it from a shell:"
    environment | sed 's/^/    /'
    echo "or:  eval \"\$($0 env)\""
}

start() {
    if running; then
        echo "already running"
        describe
        return
    fi
    "$python" -c "import ray" 2>/dev/null || die "'$python' has no ray: install it, activate an environment, or set PYTHON"
    # Ray opens its own folder to all: the one that holds it is this user's alone.
    for folder in "$state" "$session"; do
        mkdir -p "$folder"
        [[ -O "$folder" && ! -L "$folder" ]] || die "$folder belongs to another user: set STEERLAB_CLUSTER_DIR or STEERLAB_RAY_TMP"
        chmod 700 "$folder"
    done
    export RAY_AUTH_MODE=token
    # Ray takes 127.0.0.1 for the machine's own address and binds to all, unless it is told that there is this machine alone.
    export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
    # Prints the token, which belongs on no screen and in no log.
    (umask 077 && "$python" -m ray.scripts.scripts get-auth-token --generate) >/dev/null 2>&1 ||
        die "no authentication token could be made in ~/.ray"
    local port dashboard client
    port="$(free_port 6379)"
    dashboard="$(free_port 8265)"
    client="$(free_port 20001)" # outside the range that workers of another cluster may use
    echo "127.0.0.1:$port" >"$state/address"
    echo "http://127.0.0.1:$dashboard" >"$state/dashboard"
    # --block ties the cluster to one process: stopping that process stops this cluster alone, unlike `ray stop`.
    # Entry points of jobs say `python`: let them find this one.
    PATH="$(dirname "$(command -v "$python")"):$PATH"
    # Processes stay a while after their task, so that the next one pays for no imports; Ray's own default is a second.
    export RAY_idle_worker_killing_time_threshold_ms="${RAY_idle_worker_killing_time_threshold_ms:-60000}"
    # A session of its own keeps it alive when this shell ends, and makes one process group of all that it starts.
    # The shell lets background commands ignore SIGINT; entry points would inherit that and not hear `ray job stop`.
    "$python" -c 'import os, signal, sys
os.setsid()
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])' \
        -m ray.scripts.scripts start --head --block --disable-usage-stats \
        --node-ip-address 127.0.0.1 --port "$port" --temp-dir "$session/ray" --ray-client-server-port "$client" \
        --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" --dashboard-agent-listen-port 0 \
        --min-worker-port 0 --max-worker-port 0 "$@" \
        >"$log" 2>&1 </dev/null &
    local pid=$!
    echo "$pid" >"$state/pid"
    started_at "$pid" >"$state/started"
    for _ in $(seq 120); do
        running || { tail -n 20 "$log" >&2; die "Ray did not start; its log is $log"; }
        if answers; then
            describe
            return
        fi
        sleep 0.5
    done
    stop
    die "Ray did not answer within a minute; its log is $log"
}

stop() {
    if ! running; then
        echo "not running"
        rm -f "$state/pid" "$state/started"
        return
    fi
    local pid
    pid="$(<"$state/pid")"
    kill -TERM "$pid"
    for _ in $(seq 20); do
        group_lives "$pid" || break
        sleep 0.5
    done
    kill -KILL -- "-$pid" 2>/dev/null || true
    rm -f "$state/pid" "$state/started" "$state/address" "$state/dashboard"
    echo "stopped"
}

case "${1:-}" in
    start) shift; start "$@" ;;
    stop) stop ;;
    status) if running; then describe; else echo "not running"; exit 1; fi ;;
    env) running || die "not running: cluster/local.sh start"; environment ;;
    *) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
