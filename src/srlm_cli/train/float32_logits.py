"""Logits of a few tokens in float32, also where the products of a step are in bfloat16.

Autocast copies the output layer to bfloat16 in each pass, and its gradient to float32. For SmolLM2-135M these are two
copies of 28 million numbers, which take longer than the logits of a hundred tokens in float32.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.nn import Linear

FEW = 128  # tokens of a pass


def make_few_in_float32(model: Any) -> None:
    """Let the output layer of a model on a CPU make the logits of up to `FEW` tokens in its own dtype, float32."""
    head = model.get_output_embeddings()
    if type(head) is Linear and head.weight.dtype == torch.float32:
        head.forward = MethodType(_forward, head)


def _forward(self: Linear, states: torch.Tensor) -> torch.Tensor:
    if states.shape[:-1].numel() > FEW:
        return torch.nn.functional.linear(states, self.weight, self.bias)
    with torch.autocast("cpu", enabled=False):
        return torch.nn.functional.linear(states.float(), self.weight, self.bias)
