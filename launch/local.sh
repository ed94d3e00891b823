#!/usr/bin/env bash
# One machine, all its devices: bash launch/local.sh configs/cifar10.py:cond runs/cifar10 [--config.KEY=VALUE ...]
# Interrupt it or kill it; the same line resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
config="${1:?a config, such as configs/digits.py}" workdir="${2:?a folder, such as runs/digits}"
shift 2
exec python -m sim_jax.main --config="$config" --workdir="$workdir" "$@"
