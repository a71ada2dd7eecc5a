#!/usr/bin/env bash
# The checkpoint after which a judge sees no more improvement, as the paper stops its training:
#   bash choose.sh MODEL PROMPTS --model JUDGE [more options of srlm eval head-to-head]
# MODEL was trained with --keep-checkpoints. Each checkpoint, the finished model last, answers the prompts once
# and is compared with the one before, until one is no better. Prints the folder of the one before that.
set -euo pipefail

MODEL=$1 PROMPTS=$2
shift 2
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

wins() { # exit 0 where `win` of the metrics on stdin is more than `loss`
    python3 -c 'import json, sys
rate = {row["metric"]: row["value"] for row in map(json.loads, sys.stdin) if "category" not in row}
sys.exit(not (rate["win"] or 0) > (rate["loss"] or 0))'
}

best=""
for candidate in $(ls -d "$MODEL"/checkpoints/* | sort -V) "$MODEL"; do
    srlm sample --in "$PROMPTS" --model "$candidate" -n 1 --out "$WORK/new.jsonl"
    if [[ $best ]]; then
        echo "$candidate against $best" >&2
        srlm eval head-to-head --in "$WORK/new.jsonl" --against "$WORK/best.jsonl" --quiet "$@" > "$WORK/metrics.jsonl"
        wins < "$WORK/metrics.jsonl" || break
    fi
    best=$candidate
    mv "$WORK/new.jsonl" "$WORK/best.jsonl"
done
echo "$best"
