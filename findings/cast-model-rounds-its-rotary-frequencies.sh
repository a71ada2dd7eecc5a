#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 (CPU).
#
# Expected: a Llama that is loaded in bfloat16 and one that is loaded in float32 and cast by `.to(torch.bfloat16)` are the same model. Their
# state dicts are equal to the last bit.
# Seen: the cast one has rotary frequencies (`rotary_emb.inv_freq`) in bfloat16, since `.to` casts buffers as well. The loaded one keeps them in
# float32. They are no part of the state dict. The frequencies are off by up to 2^-9, and the angle grows with the position: at
# position 1,000 a cosine differs by more than 0.1, at 3,999 by more than 0.5.
#
# Consequence: a reference made with `.to` or `.bfloat16()` is another model at long positions, and no comparison of weights shows it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("saved")
loaded = LlamaForCausalLM.from_pretrained("saved", dtype=torch.bfloat16)
cast = LlamaForCausalLM.from_pretrained("saved", dtype=torch.float32).to(torch.bfloat16)
same = all(torch.equal(one, other) for one, other in zip(loaded.state_dict().values(), cast.state_dict().values(), strict=True))
places = torch.arange(4000)[None]
numbers = torch.zeros(1, 4000, 64)
one, other = (model.model.rotary_emb(numbers, places)[0][0] for model in (loaded, cast))
apart = {place: round(float((one[place] - other[place]).abs().max()), 3) for place in (10, 1000, 3999)}
kinds = [str(model.model.rotary_emb.inv_freq.dtype) for model in (loaded, cast)]
print(f"transformers {version('transformers')}, torch {version('torch')}")
print(f"state dicts equal: {same}; frequencies in {kinds[0]} (loaded) and {kinds[1]} (cast); cosines apart by position: {apart}")
sys.exit(not (same and kinds == ["torch.float32", "torch.bfloat16"] and apart[1000] > 0.1 and apart[3999] > 0.5))
PYTHON
