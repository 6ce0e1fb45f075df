#!/usr/bin/env bash
# All measurements that want a GPU, in one call: raw results as JSON, and tables in Markdown.
#
#   scripts/bench_gpu.sh [FOLDER]            FOLDER: $OUT, or docs/results/gpu of the repository, where none is given
#   DRY_RUN=1 scripts/bench_gpu.sh [FOLDER]  the same calls on a CPU at a tiny shape, to see that they run; by default
#                                            into a temporary folder
#
# BACKBONE, ROUNDS, NEW_TOKENS, PROMPT_TOKENS, BATCHES (rows, and as many tenants) and MILORA (the command) can be set.
# A measurement that fails is told of and the others go on; the exit status is then 1. Finished ones are not repeated,
# as far as their log says that they were asked for in the same words; others of the same name are left as they are,
# told of, and not in the tables.
#
# Each call is a process of its own. With Llama-2 7B (13.5 GB in bfloat16, an adapter of r = 32 0.16 GB, a token's keys
# and values 0.5 MB) and the settings below they need at most, in GB, by the sizes of what they hold at one time:
#   decode-eager 51     the weights again for lora-merged (13) and as B A in DoRA's cache (13), and those of three
#                       modules a block where a route is merged (9)
#   decode-compiled 41  the same without the last
#   tenants-*-64 54     64 adapters of three methods (31), keys and values of 64 rows (6.4); compiled: of two (20),
#                       and a static cache of each of three (19)
#   train 57            five methods and bi-level MiLoRA with their moments (6), DoRA's activations (36), the largest
# so that a GPU of 80 GB holds them; the others need less.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

milora=${MILORA:-milora}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

if [ "${DRY_RUN:-0}" != 0 ]; then
  folder=${1:-${OUT:-$(mktemp -d)}}
  where=(--device cpu --threads 1)
  backbone=${BACKBONE:-tiny}
  rounds=${ROUNDS:-1} new=${NEW_TOKENS:-3} prompt=${PROMPT_TOKENS:-4} batches=${BATCHES:-1,2}
  layers=(--layers 1) few=(--methods base,milora) trained=(--methods lora,milora)
  kernel=(--d-in 32 --d-out 32 --rank 4)
  train=(--batch 2 --tokens 8)
  compiled=base,milora compiled_tenants=base,milora batched=base,milora beams=1,2
else
  folder=${1:-${OUT:-$root/docs/results/gpu}}
  where=(--device cuda)
  backbone=${BACKBONE:-llama-2-7b}
  rounds=${ROUNDS:-5} new=${NEW_TOKENS:-64} prompt=${PROMPT_TOKENS:-128} batches=${BATCHES:-1,8,32,64}
  layers=() few=() trained=()
  kernel=()
  train=(--batch 8 --tokens 256)
  compiled=base,lora,lora-merged,dora-cached,moelora,milora compiled_tenants=base,lora-together,milora
  batched=base,lora,moelora,milora beams=1,3
fi

mkdir -p "$folder" || exit
failed=0
tables=()

measure() { # NAME COMMAND...
  local name=$1 asked="milora bench ${*:2}"
  local result=$folder/$name.json log=$folder/$name.log
  shift
  if [ -s "$result" ]; then
    if [ "$(head -n 1 "$log" 2>/dev/null)" = "$asked" ]; then
      echo "bench_gpu: $name is there already" >&2
      tables+=("$result")
    else
      echo "bench_gpu: $result is there already, but $log does not begin with '$asked':" \
        "move it away, or give another folder" >&2
      failed=1
    fi
    return
  fi
  echo "bench_gpu: $name: $asked" >&2
  echo "$asked" >"$log"
  if $milora bench "$@" --json >"$result.part" 2>>"$log"; then
    mv "$result.part" "$result"
    tables+=("$result")
  else
    echo "bench_gpu: $name failed: $(tail -n 1 "$log")" >&2
    rm -f "$result.part"
    failed=1
  fi
}

model=(--backbone "$backbone" "${layers[@]}")
shape=("${model[@]}" "${where[@]}" --rounds "$rounds")
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
measure traffic traffic "${model[@]}" --context "$((prompt + new))"

if {
  echo "# Measured on a GPU"
  echo
  $milora bench markdown "${tables[@]}"
} >"$folder/README.md.part"; then
  mv "$folder/README.md.part" "$folder/README.md"
  echo "bench_gpu: tables in $folder/README.md" >&2
else
  rm -f "$folder/README.md.part"
  failed=1
fi
exit "$failed"
