#!/usr/bin/env bash
# All measurements that want a GPU, in one call: raw results as JSON, and tables in Markdown.
#
#   scripts/bench_gpu.sh [FOLDER]          FOLDER: $OUT, or docs/results/gpu, where none is given
#   DRY_RUN=1 scripts/bench_gpu.sh FOLDER  the same calls on a CPU at a tiny shape, to see that they run
#
# BACKBONE, ROUNDS, NEW_TOKENS, PROMPT_TOKENS, BATCHES (rows, and as many tenants) and MILORA (the command) can be set.
# A measurement that fails is told of and the others go on; the exit status is then 1. Finished ones are not repeated.
set -uo pipefail
cd "$(dirname "$0")/.."

folder=${1:-${OUT:-docs/results/gpu}}
milora=${MILORA:-milora}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

if [ "${DRY_RUN:-0}" != 0 ]; then
  where=(--device cpu --threads 1)
  backbone=${BACKBONE:-tiny}
  rounds=${ROUNDS:-1} new=${NEW_TOKENS:-3} prompt=${PROMPT_TOKENS:-4} batches=${BATCHES:-1,2}
  layers=(--layers 1) few=(--methods base,milora) trained=(--methods lora,milora)
  kernel=(--d-in 32 --d-out 32 --rank 4)
  train=(--batch 2 --tokens 8)
  compiled=base,milora compiled_tenants=base,milora batched=base,milora beams=1,2
else
  where=(--device cuda)
  backbone=${BACKBONE:-llama-2-7b}
  rounds=${ROUNDS:-5} new=${NEW_TOKENS:-64} prompt=${PROMPT_TOKENS:-128} batches=${BATCHES:-1,8,32,64}
  layers=() few=() trained=()
  kernel=()
  train=(--batch 8 --tokens 256)
  compiled=base,lora,lora-merged,dora-cached,moelora,milora compiled_tenants=base,lora-together,milora
  batched=base,lora,moelora,milora beams=1,3
fi

mkdir -p "$folder"
failed=0

measure() { # NAME COMMAND...
  local name=$1
  shift
  if [ -s "$folder/$name.json" ]; then
    echo "bench_gpu: $name is there already" >&2
    return
  fi
  echo "bench_gpu: $name: milora bench $*" >&2
  if $milora bench "$@" --json >"$folder/$name.json.part" 2>"$folder/$name.log"; then
    mv "$folder/$name.json.part" "$folder/$name.json"
  else
    echo "bench_gpu: $name failed: $(tail -n 1 "$folder/$name.log")" >&2
    rm -f "$folder/$name.json.part"
    failed=1
  fi
}

shape=(--backbone "$backbone" "${layers[@]}" "${where[@]}" --rounds "$rounds")
length=(--prompt-tokens "$prompt" --new-tokens "$new")

measure kernel kernel "${where[@]}" --rounds "$rounds" --batches "$batches" "${kernel[@]}"
measure decode-eager decode "${shape[@]}" "${length[@]}" --beams "$beams" "${few[@]}"
measure decode-compiled decode "${shape[@]}" "${length[@]}" --beams "$beams" --compile --methods "$compiled"
IFS=, read -ra sizes <<<"$batches"
for size in "${sizes[@]}"; do
  measure "decode-eager-batch-$size" decode "${shape[@]}" "${length[@]}" --beams 1 --batch "$size" \
    --methods "$batched"
  measure "tenants-eager-$size" tenants "${shape[@]}" "${length[@]}" --tenants "$size" "${few[@]}"
  measure "tenants-compiled-$size" tenants "${shape[@]}" "${length[@]}" --tenants "$size" --compile \
    --methods "$compiled_tenants"
done
measure prefill prefill "${shape[@]}" --prompt-tokens "$prompt,$((4 * prompt))" "${few[@]}"
measure train train "${shape[@]}" "${train[@]}" "${trained[@]}"
measure train-checkpointing train "${shape[@]}" "${train[@]}" "${trained[@]}" --gradient-checkpointing
$milora bench traffic --backbone "$backbone" "${layers[@]}" --context "$((prompt + new))" --json >"$folder/traffic.json" ||
  failed=1

tables=()
for name in kernel decode-eager decode-compiled prefill train train-checkpointing traffic; do
  [ -s "$folder/$name.json" ] && tables+=("$folder/$name.json")
done
for size in "${sizes[@]}"; do
  for name in "decode-eager-batch-$size" "tenants-eager-$size" "tenants-compiled-$size"; do
    [ -s "$folder/$name.json" ] && tables+=("$folder/$name.json")
  done
done
{
  echo "# Measured on a GPU"
  echo
  $milora bench markdown "${tables[@]}"
} >"$folder/README.md" || failed=1
echo "bench_gpu: tables in $folder/README.md" >&2
exit "$failed"
