#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0, on a CPU.
#
# Expected: `with accelerator.autocast(AutocastKwargs(enabled=False))` is accelerate's way to leave mixed precision in a
# block, so a model that is called in the block computes in float32.
# Seen: a model that was prepared computes in bfloat16 there, too. `prepare` puts an autocast of its own into the model's
# forward pass, and that one is entered last. Its output is cast back to float32, so the dtype does not show it. The same
# model, not prepared, computes in float32 in the block.
#
# Consequence: a comparison in float32 of two models, such as policy and reference before a first step, is one in bfloat16
# where the models are prepared. `model._original_forward` is the forward pass without the autocast.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs

print("accelerate", accelerate.__version__, "torch", torch.__version__)
torch.manual_seed(0)
plain = torch.nn.Linear(64, 8, bias=False)
inputs = torch.randn(4, 64)
wanted = plain(inputs)
accelerator = Accelerator(cpu=True, mixed_precision="bf16")
prepared = accelerator.prepare_model(torch.nn.Linear(64, 8, bias=False))
prepared.load_state_dict(plain.state_dict())
with torch.no_grad(), accelerator.autocast(AutocastKwargs(enabled=False)):
    alone, within = plain(inputs), prepared(inputs)
    original = prepared._original_forward(inputs)
away = (within - wanted).abs().max().item()
print(f"prepared, in the block: {within.dtype}, {away:.1e} from float32; not prepared: {(alone - wanted).abs().max().item():.1e}")
assert torch.equal(alone, wanted) and torch.equal(original, wanted)
assert within.dtype == torch.float32 and away > 1e-4, "a prepared model follows the block now"
PYTHON
