#!/usr/bin/env bash
#SBATCH --job-name=srlm
#SBATCH --array=1-16            # 1 to SHARDS, below; %4 behind it keeps to 4 nodes at a time
#SBATCH --nodes=1
#SBATCH --gres=gpu:8
#SBATCH --time=08:00:00
#SBATCH --requeue               # a lost node: the same shard again, from its last finished row
#SBATCH --output=%x-%A_%a.log
# One shard a task: sample and judge it on this node.
#   sbatch --export=ALL,MODEL=runs/big/M1/model,PROMPTS=runs/big/M1/prompts.jsonl,OUT=runs/big/M1/shards slurm_array.sh
#   bash join.sh runs/big/M1/shards 16 runs/big/M1
set -euo pipefail

SHARD=$SLURM_ARRAY_TASK_ID
SHARDS=${SHARDS:-16}            # not SLURM_ARRAY_TASK_MAX: a lost shard is run again alone, as --array=7
OUT=${OUT:?a folder on a file system that all nodes see}
PROMPTS=${PROMPTS:?a prompts file}
ENGINE=${ENGINE:---engine openai --base-url http://localhost:8000/v1 --concurrency 512 --model policy}
NAME=$(printf '%05d' "$SHARD")
mkdir -p "$OUT"

if [[ $ENGINE == *localhost* ]]; then
    bash "${SERVE:-$(dirname "$0")/serve.sh}" &
    server=$!
    trap 'kill $server' EXIT
    until curl --silent --fail http://localhost:8000/health; do
        kill -0 $server    # it has died: so do we
        sleep 5
    done
fi

# A file is there if and only if it is complete. Judging reads the shard of this task, so it needs no --shard.
# shellcheck disable=SC2086  # ENGINE is several words
[[ -e $OUT/responses-$NAME.jsonl ]] ||
    srlm sample $ENGINE --in "$PROMPTS" --shard "$SHARD/$SHARDS" --out "$OUT/responses-$NAME.jsonl"
# shellcheck disable=SC2086
[[ -e $OUT/judged-$NAME.jsonl ]] ||
    srlm judge $ENGINE --in "$OUT/responses-$NAME.jsonl" --out "$OUT/judged-$NAME.jsonl"
