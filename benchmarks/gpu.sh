#!/usr/bin/env bash
# All that needs a GPU, in one go of at most ten minutes: the tests marked gpu, and the throughput benchmark.
#
#   benchmarks/gpu.sh [--dry] [OUTPUT]      default: $OUT, else benchmarks/throughput/results
#
# --dry runs every part on a CPU with small models and few steps, and lists the GPU tests instead of running
# them. It shows within minutes that no option is wrong; what it measures is of no use.
#
# It needs no network and no installation: phreg is taken from this checkout, the machine's own python3 has the
# libraries, and wheels of those it lacks may lie in .whl/. Parts run one after the other, each with a time
# limit; when one fails the others still run, and the exit status is 1. OUTPUT gets a log for each part and a
# JSON file for each measurement, eight files.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry=
if [ "${1:-}" = --dry ]; then
    dry=1
    shift
fi
output=${1:-${OUT:-$root/benchmarks/throughput/results}}
mkdir -p "$output"
output=$(cd "$output" && pwd)
cd "$root"

export PYTHONPATH=$root PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
if [ -d .whl ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .whl/*.whl
    PYTHONPATH=$root:$site
fi

# The last of an option counts, so these take the place of those below.
dry_throughput=() dry_memory=() dry_tests=()
if [ -n "$dry" ]; then
    dry_throughput=(--device cpu --model vit_tiny_patch16_224 --size 64 --batch-size 1 --views 2 --steps 2 --workers 0
        --no-details --no-compile)
    dry_memory=(--device cpu --models test_vit --size 160 --batch-size 2)
    dry_tests=(--collect-only)
fi

failed=()

part() { # part NAME SECONDS COMMAND...: runs a command under a time limit, its output in NAME.log
    local name=$1 limit=$2 started=$SECONDS status=0
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$output/$name.log" 2>&1 || status=$?
    echo "== $name: status $status after $((SECONDS - started)) s of $limit"
    tail -n 15 "$output/$name.log"
    if [ "$status" -ne 0 ]; then failed+=("$name"); fi
}

throughput() { # throughput NAME SECONDS OPTIONS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" python3 benchmarks/throughput/run.py --device cuda --precision bf16 --size 518 \
        --batch-size 8 --views 10 --workers "$workers" --output "$output/$name.json" "$@" \
        ${dry_throughput[@]+"${dry_throughput[@]}"}
}

# Readers hand batches over through /dev/shm: the published ones have 258 MB, each reader keeps two, and one
# more is in use. A full /dev/shm kills readers.
shm=$(df --output=avail --block-size=1M /dev/shm | tail -n 1)
workers=$(($(nproc) - 1))
if [ "$workers" -gt 8 ]; then workers=8; fi
if [ "$workers" -gt $(((shm - 300) / 600)) ]; then workers=$(((shm - 300) / 600)); fi
if [ "$workers" -lt 0 ]; then workers=0; fi
echo "$((shm)) MiB of /dev/shm, $(nproc) cores: $workers readers"

if [ -z "$dry" ]; then nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true; fi

part gpu-tests 120 python3 -m pytest -o addopts=--import-mode=importlib -m gpu -p no:cacheprovider tests/test_gpu.py \
    ${dry_tests[@]+"${dry_tests[@]}"}
throughput vit-b-518 200 --model dinov2-base
throughput vit-b-518-compile 130 --model dinov2-base --compile --no-details --steps 32
part memory-vit-l 60 python3 benchmarks/memory/run.py --models ViT-L/14 --device cuda --measure \
    --variants shared checkpointed "checkpointed, frozen bf16" --output "$output/memory-vit-l.json" \
    ${dry_memory[@]+"${dry_memory[@]}"}
throughput vit-l-518 90 --model dinov2-large --no-published --steps 32

if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
