#!/usr/bin/env bash
# Join the shards in their order: bash join.sh SHARD_FOLDER SHARDS OUT_FOLDER
# Stops when a shard is missing, and names it: run that one again (sbatch --array=7 slurm_array.sh).
set -euo pipefail

FROM=$1 SHARDS=$2 TO=$3
for kind in responses judged; do
    parts=()
    for ((shard = 1; shard <= SHARDS; shard++)); do
        part=$FROM/$kind-$(printf '%05d' "$shard").jsonl
        [[ -e $part ]] || { echo "shard $shard/$SHARDS is not finished: $part" >&2; exit 1; }
        parts+=("$part")
    done
    cat "${parts[@]}" > "$TO/$kind.jsonl.joining"
    mv "$TO/$kind.jsonl.joining" "$TO/$kind.jsonl"
done
srlm make-pairs --in "$TO/judged.jsonl" --out "$TO/pairs.jsonl"
