#!/usr/bin/env bash
# Everything that is measured on a GPU, in one call: bash launch/benchmark_gpu.sh FOLDER [SID [CIFAR10]]
#   FOLDER   results go here: one JSON file for each measurement, profiles, and summary.txt with all of it as text
#   SID      a clone of https://github.com/mingyuanzhou/SiD; with it (and PyTorch) each step is also timed against that code; '' for none
#   CIFAR10  cifar10-32x32.zip in EDM's layout; with it a teacher and its SIM generator are trained for five minutes each
# The package has to be installed with its GPU version of JAX: pip install . "jax[cuda13]"
# About 25 minutes on one H100 with PyTorch, 10 without; a measurement that fails is noted in summary.txt and the rest goes on.
set -uo pipefail
out="${1:?a folder for the results}" sid="${2:-}" data="${3:-}"
mkdir -p "$out" && out="$(cd "$out" && pwd)"
[ -z "$sid" ] || sid="$(cd "$sid" && pwd)"
[ -z "$data" ] || data="$(realpath "$data")"
cd "$(dirname "$0")/.."
summary="$out/summary.txt"
export XLA_PYTHON_CLIENT_PREALLOCATE=false
note() { echo "== $*" | tee -a "$summary"; }
try() { note "$*"; "$@" 2>>"$out/errors.txt" | tee -a "$summary" || note "failed, see errors.txt: $*"; }
five_minutes() { # a run that SIGTERM ends: it saves its state and says so with exit code 143
  note "five minutes of: $*"
  timeout --preserve-status 300 "$@" 2>&1 | tr '\r' '\n' | tail -n 20 | tee -a "$summary"
  case "${PIPESTATUS[0]}" in 0 | 143) ;; *) note "failed: $*" ;; esac
}

: > "$summary"
(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true) | tee -a "$summary"
python -c 'import jax; print("jax", jax.__version__, jax.devices())' | tee -a "$summary"

# 1. The steps by themselves: float32 ("highest"), tf32 ("high"), bfloat16; CIFAR-10's DDPM++ and ImageNet 64x64's ADM.
types() { # float32 | tf32 | bfloat16
  case "$1" in
    float32) echo --config.precision=highest ;;
    tf32) echo --config.precision=high ;;
    bfloat16) echo --config.generator.dtype=bfloat16 --config.fake_score.dtype=bfloat16 --config.teacher.dtype=bfloat16 ;;
  esac
}
for dtype in float32 tf32 bfloat16; do
  for batch in 128 256 512; do
    try python -m sim_jax.benchmark --config=configs/cifar10.py:sim --config.batch_size="$batch" $(types "$dtype") \
      --steps=10 --out="$out/cifar10_${dtype}_$batch.json"
  done
done
for dtype in tf32 bfloat16; do
  for remat in none convs blocks; do
    [ "$dtype" = bfloat16 ] && more="$(types bfloat16)" || more="$(types tf32) --config.generator.dtype=float32 --config.fake_score.dtype=float32 --config.teacher.dtype=float32"
    try python -m sim_jax.benchmark --config=configs/imagenet64.py:sim --config.batch_size=32 --config.max_batch_per_device=0 $more \
      --config.generator.remat=$remat --config.fake_score.remat=$remat --config.teacher.remat=$remat --steps=5 \
      --out="$out/imagenet64_${dtype}_$remat.json"
  done
done
# 2. Where the time goes, and what the loop adds.
try python -m sim_jax.benchmark --config=configs/cifar10.py:sim --config.batch_size=256 $(types bfloat16) --loop=100 \
  --profile="$out/profile_cifar10" --out="$out/cifar10_loop.json"
# 3. Against SiD's public code: as it ships, and compiled in bfloat16.
if [ -n "$sid" ]; then
  for network in cifar10 imagenet64; do
    [ $network = cifar10 ] && batch=256 || batch=32
    for how in "--dtype=float32" "--dtype=tf32" "--dtype=bfloat16" "--dtype=bfloat16 --compile" "--dtype=bfloat16 --compile --channels_last"; do
      try python launch/compare_torch.py --sid="$sid" --network=$network --batch=$batch $how --steps=5 --out="$out/torch_${network}_$(echo "$how" | tr -dc a-z0-9).json"
    done
  done
fi
# 4. Small networks, which the host may not keep up with: one and ten iterations in a call.
for calls in 1 10; do
  try python -m sim_jax.benchmark --config=configs/digits.py --config.run.steps_per_call=$calls --loop=200 --out="$out/digits_calls_$calls.json"
done
# 5. Real runs on real images, five minutes each: a third of CIFAR-10's network, first as a teacher, then distilled. SIGTERM ends them and they
# save; pictures and figures are in their folders. Quality is not the point, that nothing is slower than the step is.
if [ -n "$data" ]; then
  shape="--config.network.model_channels=64 --config.network.num_blocks=3 --config.batch_size=512 --config.run.log_every=20"
  five_minutes python -m sim_jax.main --config=configs/cifar10.py:teacher --workdir="$out/cifar10_teacher" --config.data.path="$data" \
    $shape --config.fake_score.dtype=bfloat16 --config.run.save_every=200
  five_minutes python -m sim_jax.main --config=configs/cifar10.py:sim --workdir="$out/cifar10_sim" --config.teacher.path="$out/cifar10_teacher" \
    $shape $(types bfloat16) --config.run.sample_every=100
fi
note done
