#!/usr/bin/env bash
# gguf 0.19.0, numpy 2.4.6, ml_dtypes 0.5.4.
#
# Expected: about 1 in 65,536 weights dequantized from a GGUF file lies exactly midway between two bfloat16 numbers, as for any
# float32 numbers. Seen: 8% for Q4_0, 11% for Q4_1, 2% for Q8_0 (normal weights of standard deviation 0.05; 8% of those of
# SmolLM2-135M-Instruct as Q4_1). Scales are float16 (11 bits) and integers have 4 bits, so few bits are left beyond the 8 of
# bfloat16, and these are often a one followed by zeros.
#
# Consequence: a training that keeps float32 weights and multiplies in bfloat16 (autocast) sees one part of these weights
# move by a whole bfloat16 step (2^-8 of the weight) at the smallest update. The loss of its passes falls far more in the first
# steps than the loss of the float32 weights that it saves.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.6 ml_dtypes==0.5.4
"$folder/venv/bin/python" - <<'PYTHON'
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import quants

weights = (np.random.default_rng(0).standard_normal((512, 1024)) * 0.05).astype(np.float32)
print("quantization  weights midway  bfloat16 copies moved by a step of 1e-7")
found = {}
for kind in (None, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1):
    read = weights if kind is None else quants.dequantize(quants.quantize(weights, kind), kind).reshape(weights.shape)
    read = np.ascontiguousarray(read, dtype=np.float32)
    midway = float(((read.view(np.uint32) & 0xFFFF) == 0x8000).mean())
    moved = float((read.astype(ml_dtypes.bfloat16) != (read + np.float32(1e-7)).astype(ml_dtypes.bfloat16)).mean())
    name = "none" if kind is None else kind.name
    found[name] = midway, moved
    print(f"{name:12}  {midway:14.2%}  {moved:8.2%}")
assert found["none"][0] < 0.001 and found["none"][1] < 0.005, "plain float32 weights"
assert found["Q4_0"][0] > 0.04 and found["Q4_1"][0] > 0.04, "weights of 4 bits are no longer midway"
assert found["Q4_0"][1] > 0.02 and found["Q4_1"][1] > 0.02, "a small step no longer moves them"
PYTHON
