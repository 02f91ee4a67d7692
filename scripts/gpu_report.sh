#!/usr/bin/env bash
# Tests and timings of one GPU in under ten minutes: tests marked gpu, `stbench bench` of SiT-S/2, B/2 and XL/2, and
# the README's run on the digits. Needs an environment with stbench and its dev extra.
#
#   scripts/gpu_report.sh [FOLDER]          default: results/throughput/DEVICE-DATE
#   scripts/gpu_report.sh --tiny [FOLDER]   the same commands on the CPU with tiny networks, to test this script
#
# Every result is written as soon as it is there: FOLDER/*.json, FOLDER/*.log, and FOLDER/README.md with the table.
# REPORT_SECONDS is the limit for the whole report, 570 by default.
set -uo pipefail
cd "$(dirname "$0")/.."
exec </dev/null

# --- What to measure ---

device=cuda
sizes=(sit-b/2 sit-xl/2 sit-s/2)
recipes=(vanilla self-transcendence sra repa)
batches=(256 128 64 32)   # the first that fits
precision=bf16
seconds=3                 # per case
settings=()
run=(--backbone sit --recipe self-transcendence)
total=${REPORT_SECONDS:-570} tests_limit=150 case_limit=75 run_limit=100
compile=(--compile)
if [ "${1:-}" = --tiny ]; then
  shift
  device=cpu sizes=(sit) recipes=(vanilla sra) batches=(8) precision=fp32 seconds=0.1 compile=()
  settings=(--set backbone.width=24 --set backbone.depth=10 --set backbone.heads=2)
  run=(--backbone sit --recipe vanilla --steps 2 --set train.batch=8 --set eval.samples=10 --set eval.steps=2
    --set 'eval.guidance=[1.0]' "${settings[@]}")
fi

# --- Where ---

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
stbench=("$python" -m stbench)
name=$("$python" scripts/throughput_table.py --device-name "$device") || exit 2
folder=${1:-results/throughput/$name-$(date +%F)}
mkdir -p "$folder"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export HF_HUB_OFFLINE=1
printf '%s\n' "${name}" >"$folder/environment.log"
{ nvidia-smi || lscpu; git rev-parse HEAD; "$python" -m pip list; } >>"$folder/environment.log" 2>&1

# --- How: `step LIMIT NAME COMMAND...` runs a command with a time limit and notes how it ended ---

: >"$folder/steps.txt"
table() { "$python" scripts/throughput_table.py "$folder"; }
step() {
  local limit=$1 log=$2 left=$((total - SECONDS)) start=$SECONDS status outcome
  shift 2
  if ((left < 15)); then
    outcome='skipped: out of time'
    status=124
  else
    ((limit < left)) || limit=$left
    timeout --signal=INT --kill-after=5 "$limit" "$@" >"$folder/$log.log" 2>&1
    status=$?
    case $status in
      0) outcome=done ;;
      124 | 137) outcome="stopped after $limit s" ;;
      *) outcome="failed: $(grep -v '^ *$' "$folder/$log.log" | tail -1)" ;;
    esac
  fi
  printf '%s\t%s\t%s\t%s\n' "$log" "$((SECONDS - start))" "$outcome" "$*" >>"$folder/steps.txt"
  printf '%4d s  %-28s %s\n' "$SECONDS" "$log" "$outcome"
  table
  return $status
}

# --- Tests ---

step "$tests_limit" tests "$python" -m pytest -m gpu --numprocesses 0 -p no:cacheprovider tests/train tests/data

# --- Timings ---

# The weights of REPA's encoder do not change the speed: random ones do where the real ones are not at hand.
encoder=()
if [ "$device" = cuda ]; then
  "$python" - "$scratch/dinov2.safetensors" <<'PYTHON' && encoder=(--set "recipe.checkpoint=$scratch/dinov2.safetensors")
import sys

import timm
from safetensors.torch import save_file

save_file(timm.create_model("vit_base_patch14_dinov2.lvd142m", num_classes=0).state_dict(), sys.argv[1])
PYTHON
fi

for size in "${sizes[@]}"; do
  if [ "$size" = "${sizes[-1]}" ]; then  # before the last size, in case the time does not suffice for both
    step "$run_limit" digits "${stbench[@]}" run "${run[@]}" --device "$device" --output "$scratch/runs"
  fi
  for recipe in "${recipes[@]}"; do
    more=("${settings[@]}")
    [ "$recipe" != repa ] || more+=("${encoder[@]}")
    # Against the published loop, where the comparison is worth its time.
    [ "$recipe" != vanilla ] && [ "$recipe" != self-transcendence ] || more+=(--against-plain)
    for batch in "${batches[@]}"; do
      case="${size//\//-}-$recipe"
      step "$case_limit" "$case" "${stbench[@]}" bench --backbone "$size" --recipe "$recipe" --batch "$batch" \
        --precision "$precision" "${compile[@]}" --seconds "$seconds" --device "$device" "${more[@]}" \
        --output "$folder/$case.json" && break
      grep -q 'out of memory' "$folder/$case.log" 2>/dev/null || break
    done
  done
done

echo "report: $folder/README.md"
