#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, on a CPU.
#
# Expected: `TrainingArguments(bf16=False)` trains in float32.
# Seen: where ACCELERATE_MIXED_PRECISION=bf16 is in the environment, the layers compute in bfloat16, and `settings.bf16` is
# still False. The Trainer gives accelerate no precision if bf16 and fp16 are False, and accelerate reads the environment.
#
# Consequence: a run whose log says float32 is one in bfloat16, and two trainings in one shell differ in silence.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy
cat > "$folder/train.py" <<'PYTHON'
import os
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

torch.manual_seed(0)
ends = {"bos_token_id": 0, "eos_token_id": 0}
model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16, **ends))
seen = []
model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda layer, given, made: seen.append(made.dtype))
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 2
quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
settings = TrainingArguments(sys.argv[1], bf16=False, max_steps=1, use_cpu=True, **quiet)
Trainer(model, settings, train_dataset=rows).train()
named = os.environ.get("ACCELERATE_MIXED_PRECISION", "not set")
print(f"ACCELERATE_MIXED_PRECISION {named}: TrainingArguments.bf16 is {settings.bf16}, a layer computes in {seen[0]}")
assert settings.bf16 is False
assert seen[0] == (torch.bfloat16 if named == "bf16" else torch.float32), "bf16=False counts now"
PYTHON
cd "$folder"
env -u ACCELERATE_MIXED_PRECISION venv/bin/python train.py out
ACCELERATE_MIXED_PRECISION=bf16 venv/bin/python train.py out
