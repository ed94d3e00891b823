#!/usr/bin/env bash
# A TPU VM pod, all workers at once; runs on your machine, needs gcloud (`gcloud auth login`).
#
#     bash launch/tpu_pod.sh create                      # the pod
#     bash launch/tpu_pod.sh setup                       # this checkout, Python, JAX and the bucket on every worker
#     bash launch/tpu_pod.sh start configs/imagenet64.py imagenet64 [--config.KEY=VALUE ...]    # workdir: a folder of the bucket
#     bash launch/tpu_pod.sh logs | status | stop | delete
#     bash launch/tpu_pod.sh keep configs/imagenet64.py imagenet64 [...]     # all of it, again after every preemption, until it is done
#
# The same command runs on every worker; the processes find each other by the pod's metadata. `stop` sends SIGTERM: all save at the same
# step. The workdir has to be shared: it lies in a Cloud Storage bucket, mounted on every worker. Make one with hierarchical namespace,
# where renaming a folder is one step (a checkpoint is complete once its folder is renamed):
#
#     gcloud storage buckets create gs://YOUR-BUCKET --location=YOUR-REGION --uniform-bucket-level-access --enable-hierarchical-namespace
#
# DRY_RUN=1 prints the commands instead of running them.
set -euo pipefail
cd "$(dirname "$0")/.."

# EDIT these, or set them in the environment.
PROJECT="${PROJECT:-your-project}"
ZONE="${ZONE:-us-west4-a}"
NAME="${NAME:-sim-jax}"
TYPE="${TYPE:-v5litepod-16}"               # v4-32, v5p-32, v6e-16, ...
VERSION="${VERSION:-v2-alpha-tpuv5-lite}"  # v4: tpu-ubuntu2204-base, v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e
BUCKET="${BUCKET:-your-bucket}"            # without gs://
SPOT="${SPOT:-1}"                          # 1: cheaper, and preempted at any time
GRACE="${GRACE:-120}"                      # seconds that `stop` waits for the checkpoint

[ "$PROJECT" != your-project ] && [ "$BUCKET" != your-bucket ] || {
    echo "error: PROJECT, BUCKET: got $PROJECT, $BUCKET; allowed: yours, in the environment or in $0" >&2
    exit 2
}

do_it() {
    if [ "${DRY_RUN:-0}" = 1 ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}
tpu() { do_it gcloud compute tpus tpu-vm "$@" --project="$PROJECT" --zone="$ZONE"; }
on_all() { tpu ssh "$NAME" --worker=all --command="$1"; }

create() {
    local more=()
    if [ "$SPOT" = 1 ]; then more+=(--spot); fi
    # Reading and writing the bucket is up to the service account's roles (Storage Object User).
    tpu create "$NAME" --accelerator-type="$TYPE" --version="$VERSION" --scopes=https://www.googleapis.com/auth/cloud-platform "${more[@]}"
}

setup() {
    local archive
    archive="$(mktemp -d)/sim_jax.tar.gz"
    tar --exclude-vcs --exclude=./runs --exclude='*__pycache__*' -czf "$archive" .
    tpu scp "$archive" "$NAME:sim_jax.tar.gz" --worker=all
    rm -rf "$(dirname "$archive")"
    on_all "$(cat <<'REMOTE'
set -e
export DEBIAN_FRONTEND=noninteractive
if ! command -v python3.12 >/dev/null; then      # the images have an older Python
    sudo add-apt-repository -y ppa:deadsnakes/ppa
    sudo apt-get update -q && sudo apt-get install -q -y python3.12 python3.12-venv
fi
if ! command -v gcsfuse >/dev/null; then
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -q && sudo apt-get install -q -y gcsfuse
fi
rm -rf sim_jax && mkdir sim_jax && tar -xzf sim_jax.tar.gz -C sim_jax
[ -d venv ] || python3.12 -m venv venv
venv/bin/pip install -q -U pip "jax[tpu]"
venv/bin/pip install -q ./sim_jax
REMOTE
)"
    mount_bucket
}

mount_bucket() { on_all "mkdir -p shared && { mountpoint -q shared || gcsfuse --implicit-dirs $(printf %q "$BUCKET") shared; }"; }

start() {
    local config="${1:?a config, such as configs/imagenet64.py}" workdir="${2:?a folder of the bucket, such as imagenet64}"
    shift 2
    local arguments
    arguments="$(printf '%q ' --config="$config" "$@")"
    mount_bucket
    # The compilation cache is each worker's own. setsid: it lives on when the connection ends.
    on_all "set -e; cd sim_jax
if kill -0 \$(cat ../sim_jax.pid 2>/dev/null) 2>/dev/null; then echo 'it is running already' >&2; exit 1; fi
rm -f ../sim_jax.code
PYTHONUNBUFFERED=1 setsid nohup bash -c '../venv/bin/python -m sim_jax.main --distributed=on --workdir=../shared/$(printf %q "$workdir") \"\$@\" &
echo \$! > ../sim_jax.pid; wait \$!; echo \$? > ../sim_jax.code' sim_jax $arguments >> ../sim_jax.log 2>&1 < /dev/null &"
}

logs() { tpu ssh "$NAME" --worker=0 --command="tail -n 100 -F sim_jax.log"; }

status() {      # of every worker: "running", or the exit code
    on_all "if kill -0 \$(cat sim_jax.pid 2>/dev/null) 2>/dev/null; then echo running; else echo exit code \$(cat sim_jax.code 2>/dev/null || echo none); fi"
}

stop() {
    on_all "pid=\$(cat sim_jax.pid 2>/dev/null) || exit 0; kill -TERM \$pid 2>/dev/null || exit 0; \
for i in \$(seq $GRACE); do kill -0 \$pid 2>/dev/null || exit 0; sleep 1; done; echo 'still running' >&2; exit 1"
}

delete() { tpu delete "$NAME" --quiet; }

state() { gcloud compute tpus tpu-vm describe "$NAME" --project="$PROJECT" --zone="$ZONE" --format='value(state)' 2>/dev/null || true; }

keep() {
    while true; do
        case "$(state)" in
            READY)
                local now
                now="$(status 2>/dev/null | tail -n 1 || true)"
                case "$now" in
                    running) sleep 60 ;;
                    "exit code 0") echo "done"; return 0 ;;
                    "exit code 2") echo "error: refused; see: bash launch/tpu_pod.sh logs" >&2; return 2 ;;
                    *) echo "$(date) starting ($now)"; setup && start "$@" || sleep 60 ;;
                esac
                ;;
            "") echo "$(date) creating"; create || sleep 300 ;;
            PREEMPTED | TERMINATED | STOPPED | FAILED) echo "$(date) preempted"; delete || sleep 60 ;;
            *) sleep 30 ;;
        esac
    done
}

case "${1:-}" in
    create | setup | start | logs | status | stop | delete | keep) "$@" ;;
    *) echo "error: got '${1:-}', allowed: create, setup, start, logs, status, stop, delete, keep" >&2; exit 2 ;;
esac
