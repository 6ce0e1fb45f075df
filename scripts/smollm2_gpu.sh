#!/usr/bin/env bash
# Makes the runs of reproduction/smollm2 on one GPU, with several processes side by side.
#
#   scripts/smollm2_gpu.sh BACKBONE DATA [FOLDER]   writes to FOLDER; by default to docs/results/smollm2-gpu
#
# BACKBONE is the folder that `make smollm2` makes, DATA that of the benchmarks' files. You can set SETTINGS (files of
# reproduction/smollm2, in this order), PROCESSES, DEVICE, PYTHON, and BUDGET: the time limit of the whole script in
# seconds. Run the script again with the same FOLDER to continue: finished runs are not repeated, but a run that the time
# limit stopped starts again.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

backbone=${1:?the folder of the model} data=${2:?the folder of the data} folder=${3:-docs/results/smollm2-gpu}
settings=${SETTINGS:-t0 gsm8k gpu} processes=${PROCESSES:-8} budget=${BUDGET:-420}
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p "$folder" || exit

# Runs a settings file: smollm2 NAME ARGUMENT...
smollm2() {
  "${PYTHON:-python}" -m reproduction.smollm2 "reproduction/smollm2/$1.yaml" --backbone "$backbone" --data "$data" \
    --records "$folder/$1.jsonl" --device "${DEVICE:-cuda}" --revision "$revision" "${@:2}"
}

# One of the processes: repeats the settings files until no run is left, because some runs wait for others.
work() {
  local name left=1
  while [ "$left" -gt 0 ]; do
    left=0
    for name in $settings; do
      smollm2 "$name" || return
      left=$((left + $(smollm2 "$name" --list | grep -c '^missing\|^waiting')))
    done
  done
}

revision=${REVISION:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
export -f smollm2 work
export backbone data folder settings revision
for number in $(seq "$processes"); do
  timeout "$budget" bash -c work >"$folder/process-$number.log" 2>&1 &
done
wait
for name in $settings; do
  echo "$name: $(smollm2 "$name" --list | cut -d' ' -f1 | sort | uniq -c | xargs)"
done
"${PYTHON:-python}" -m reproduction.smollm2.report "$folder"
