#!/usr/bin/env bash
# A launch on several machines, rehearsed on one CPU: two processes with two devices each, parameters cut over a data x fsdp mesh.
#
#     bash launch/rehearse.sh [FOLDER] [--config.KEY=VALUE ...]        # FOLDER: default a temporary one, removed at the end
#
# One of the two is sent SIGTERM: both have to save the same step and stop. One process with two devices continues and is stopped as
# well; two processes finish. The result has to be that of one process with four devices that nobody stopped.
# About half a minute on two quiet cores once its programs are in the compilation cache. PYTHON says which python.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
work=""
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    work="$1"
    shift
    mkdir -p "$work"
else
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
fi
run="$work/run" straight="$work/straight"
if [ -e "$run" ] || [ -e "$straight" ]; then
    echo "error: FOLDER: $work holds an earlier rehearsal; choose another" >&2
    exit 2
fi
export JAX_PLATFORMS=cpu NPROC="${NPROC:-16}"      # more threads than devices, or their collectives can deadlock
overrides=("--config.sharding.mesh=data:-1,fsdp:2" "--config.sharding.rules=(('.*','fsdp:fsdp'),)" "$@")

fail() {
    echo "FAILED: $*" >&2
    tail -n 15 "$work"/*.log >&2
    exit 1
}

# start NAME DEVICES WORKDIR FLAGS...: a process in the background, its output in NAME.log; sets $started
start() {
    local name="$1" devices="$2" workdir="$3"
    shift 3
    JAX_NUM_CPU_DEVICES="$devices" "$python" -m sim_jax.main --config=launch/rehearsal.py --workdir="$workdir" "${overrides[@]}" "$@" \
        >"$work/$name.log" 2>&1 &
    started=$!
}

# expect NAME PID CODE: waits for the process, which has to end with that code
expect() {
    local code=0
    wait "$2" || code=$?
    [ "$code" -eq "$3" ] || fail "$1 ended with exit code $code, not $3"
}

last_step() {       # the newest step in metrics.jsonl
    tail -n 1 "$run/metrics.jsonl" 2>/dev/null | sed -n 's/.*"step": \([0-9]*\).*/\1/p'
}

# reach STEP PID: until metrics.jsonl is that far
reach() {
    until [ "$(last_step || true)" != "" ] && [ "$(last_step)" -ge "$1" ]; do
        kill -0 "$2" 2>/dev/null || fail "a process ended before step $1"
        sleep 0.05
    done
}

saved_step() {      # the newest complete checkpoint
    ls "$run/checkpoints" | grep -E '^[0-9]+$' | sort -n | tail -n 1
}

# two NAME: both processes; sets $first and $second
two() {
    local port
    port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
    start "$1.0" 2 "$run" --coordinator="127.0.0.1:$port" --num_processes=2 --process_id=0
    first=$started
    JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 start "$1.1" 2 "$run"    # the other way to say it
    second=$started
}

start straight 4 "$straight"
expect "the uninterrupted run" "$started" 0
echo "one process, four devices, nobody stopped: done"

two first
reach 4 "$first"
kill -TERM "$second"
expect "process 0 of 2" "$first" 143
expect "process 1 of 2" "$second" 143
one="$(saved_step)"
grep -q "saved step $one of" "$work/first.0.log" || fail "process 0 did not say that it saved step $one"
echo "two processes, two devices each: SIGTERM to one of them, both stopped, step $one saved"

start alone 2 "$run"
reach $((one + 4)) "$started"
kill -TERM "$started"
expect "one process" "$started" 143
grep -q "resuming at step $one of" "$work/alone.log" || fail "one process did not resume at step $one"
two="$(saved_step)"
[ "$two" -gt "$one" ] || fail "one process saved no later step than $one"
echo "one process, two devices: resumed at step $one, stopped, step $two saved"

two last
expect "process 0 of 2" "$first" 0
expect "process 1 of 2" "$second" 0
grep -q "resuming at step $two of" "$work/last.0.log" || fail "two processes did not resume at step $two"
[ -s "$run/report.html" ] || fail "there is no report"
for log in "$work"/*.1.log; do
    if grep -q "done in\|saved step" "$log"; then fail "a process other than the first talks"; fi
done
echo "two processes again: resumed at step $two, finished, report written once"

"$python" - "$run" "$straight" <<'PY' || fail "the interrupted run ended elsewhere than the uninterrupted one"
import sys
from sim_jax import inspection

difference, name = inspection.largest_difference(*sys.argv[1:])
print(f"largest difference to the uninterrupted run: {difference:.1e} of an array's norm, in {name}")
sys.exit(difference > 1e-4)
PY
echo "rehearsal passed"
