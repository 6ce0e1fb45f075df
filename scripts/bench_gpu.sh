#!/usr/bin/env bash
# Runs the tests and measurements that need a GPU. Writes raw results as JSON and tables in Markdown.
#
#   scripts/bench_gpu.sh [FOLDER]            writes to FOLDER; by default to $OUT, or to docs/results/gpu
#   DRY_RUN=1 scripts/bench_gpu.sh [FOLDER]  runs the same commands on a CPU with a tiny backbone; by default in a
#                                            temporary folder
#
# You can set BACKBONE, ENGINE_BACKBONE, ROUNDS, NEW_TOKENS, PROMPT_TOKENS, BATCHES (numbers of tenants), MILORA and
# PYTHON (the commands), and BUDGET: the time limit of the whole script in seconds. The defaults are meant for 7 minutes
# on an H100 or H200. This is an estimate.
#
# The most important measurements come first. When the budget is used up, the others are skipped. If a measurement
# fails or is skipped, the exit status is 1. Run the script again to continue: results from the same command are kept.
# A result from another command is reported, left alone and not included in the tables.
#
# Each measurement is a separate process. With Llama-2 7B in bfloat16 (13.5 GB) all of them fit on a GPU with 80 GB, by
# the sizes of their tensors. Training needs the most.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

milora=${MILORA:-milora}
python=${PYTHON:-python}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

if [ "${DRY_RUN:-0}" != 0 ]; then
  folder=${1:-${OUT:-$(mktemp -d)}}
  where=(--device cpu --threads 1)
  backbone=${BACKBONE:-tiny} budget=${BUDGET:-3600}
  rounds=${ROUNDS:-1} new=${NEW_TOKENS:-3} prompt=${PROMPT_TOKENS:-4} batches=${BATCHES:-2}
  layers=(--layers 1) kernel=(--d-in 32 --d-out 32 --rank 4) train=(--batch 2 --tokens 8)
  methods=base,milora compiled=base,milora
  # On a CPU, transformers' continuous batching (the case `throughput`) takes most of the memory.
  engine=(decode --backbone "${ENGINE_BACKBONE:-tiny}" --device cpu --tenants 2)
else
  folder=${1:-${OUT:-$root/docs/results/gpu}}
  where=(--device cuda)
  backbone=${BACKBONE:-llama-2-7b} budget=${BUDGET:-420}
  rounds=${ROUNDS:-3} new=${NEW_TOKENS:-32} prompt=${PROMPT_TOKENS:-128} batches=${BATCHES:-16}
  layers=() kernel=() train=(--batch 8 --tokens 256)
  methods=base,lora,moelora,milora,midora compiled=base,milora
  engine=(decode throughput --backbone "${ENGINE_BACKBONE:-tinyllama-1.1b}" --device cuda --dtype bfloat16 --tenants 8)
fi

mkdir -p "$folder" || exit
failed=0
tables=()

# Runs a command unless its result exists: run RESULT COMMAND...
run() {
  local result=$folder/$1 name=${1%.*} asked=${*:2} log=$folder/${1%.*}.log left=$((budget - SECONDS))
  shift
  if [ -s "$result" ]; then
    if [ "$(head -n 1 "$log" 2>/dev/null)" = "$asked" ]; then
      echo "bench_gpu: $name exists" >&2
      return 0
    fi
    echo "bench_gpu: $result exists, but $log does not begin with '$asked': move it away, or use another folder" >&2
    failed=1
    return 1
  fi
  if [ "$left" -le 0 ]; then
    echo "bench_gpu: $name skipped: the budget of $budget seconds is used up" >&2
    failed=1
    return 1
  fi
  echo "bench_gpu: $name: $asked" >&2
  echo "$asked" >"$log"
  if timeout "$left" "$@" >"$result.part" 2>>"$log"; then
    mv "$result.part" "$result"
    echo "bench_gpu: $name finished after $SECONDS seconds" >&2
  else
    [ -s "$result.part" ] && cat "$result.part" >>"$log"
    echo "bench_gpu: $name failed: $(tail -n 1 "$log")" >&2
    rm -f "$result.part"
    failed=1
    return 1
  fi
}

# Runs `milora bench` and adds its result to the tables: measure NAME ARGUMENT...
measure() {
  # shellcheck disable=SC2086  # MILORA may be a command with arguments.
  run "$1.json" $milora bench "${@:2}" --json && tables+=("$folder/$1.json")
}

tests=(
  tests/core/kernels/test_packed_lora_triton.py
  tests/core/kernels/test_grouped_lora.py
  tests/serving/engine/test_engine_triton.py
)
model=(--backbone "$backbone" "${layers[@]}")
shape=("${model[@]}" "${where[@]}" --rounds "$rounds")
length=(--prompt-tokens "$prompt" --new-tokens "$new")

run tests.txt env --chdir "$root" $python -m pytest -q -p no:cacheprovider -k "on_a_gpu" "${tests[@]}"
run engine.json $python "$root/scripts/bench_engine.py" "${engine[@]}" --rounds "$rounds"
measure kernel kernel "${where[@]}" --rounds "$rounds" --batches "1,$batches" "${kernel[@]}"
measure decode-eager decode "${shape[@]}" "${length[@]}" --beams 1 --methods "$methods"
IFS=, read -ra sizes <<<"$batches"
for size in "${sizes[@]}"; do
  measure "tenants-eager-$size" tenants "${shape[@]}" "${length[@]}" --tenants "$size" --methods base,milora
done
measure prefill prefill "${shape[@]}" --prompt-tokens "$prompt,$((4 * prompt))" --methods "$methods"
measure traffic traffic "${model[@]}" --context "$((prompt + new))"
measure train train "${shape[@]}" "${train[@]}" --methods lora,milora
measure decode-compiled decode "${shape[@]}" "${length[@]}" --beams 1 --compile --methods "$compiled"
for size in "${sizes[@]}"; do
  measure "tenants-compiled-$size" tenants "${shape[@]}" "${length[@]}" --tenants "$size" --compile --methods "$compiled"
done

if {
  echo "# Measured on a GPU"
  if [ -s "$folder/engine.json" ]; then
    printf '\nThe embedded engine (decode: milliseconds per step; throughput: tokens per second):\n\n```json\n'
    cat "$folder/engine.json"
    printf '```\n'
  fi
  echo
  [ "${#tables[@]}" = 0 ] || $milora bench markdown "${tables[@]}"
} >"$folder/README.md.part"; then
  mv "$folder/README.md.part" "$folder/README.md"
  echo "bench_gpu: tables in $folder/README.md" >&2
else
  rm -f "$folder/README.md.part"
  failed=1
fi
exit "$failed"
