#!/usr/bin/env bash
# Everything that is measured on a GPU, in one call: bash launch/benchmark_gpu.sh FOLDER [SID]
#   FOLDER   results go here: one JSON file for each measurement, profiles, and summary.txt with all of it as text
#   SID      a clone of https://github.com/mingyuanzhou/SiD; with it (and PyTorch) each step is also timed against that code
# The package has to be installed with its GPU version of JAX: pip install . "jax[cuda13]"
# About 25 minutes on one H100 with PyTorch, 10 without; a measurement that fails is noted in summary.txt and the rest goes on.
set -uo pipefail
out="${1:?a folder for the results}" sid="${2:-}"
mkdir -p "$out" && out="$(cd "$out" && pwd)"
[ -z "$sid" ] || sid="$(cd "$sid" && pwd)"
cd "$(dirname "$0")/.."
summary="$out/summary.txt"
export XLA_PYTHON_CLIENT_PREALLOCATE=false
note() { echo "== $*" | tee -a "$summary"; }
try() { note "$*"; "$@" 2>>"$out/errors.txt" | tee -a "$summary" || note "failed, see errors.txt: $*"; }

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
# 4. A real run of ten minutes: quality is not the point, that nothing is slower than the step is.
try timeout 600 python -m sim_jax.main --config=configs/cifar10.py:tiny --workdir="$out/tiny_run"
note done
