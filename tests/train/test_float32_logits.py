"""The logits of a few tokens are in float32, also in a step in bfloat16; those of many are in the dtype of the step."""

from __future__ import annotations

import copy

import pytest
import torch
from test_embedding_gradient import SIZES
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_cli.train.float32_logits import FEW, make_few_in_float32


@pytest.mark.parametrize(("tokens", "dtype"), [(FEW, torch.float32), (FEW + 1, torch.bfloat16)])
def test_few_logits_are_in_float32(tokens, dtype):
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES))
    model = copy.deepcopy(plain)
    make_few_in_float32(model)
    states = torch.randn(1, tokens, SIZES["hidden_size"], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.lm_head(states)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), plain.lm_head(states), atol=0 if dtype == torch.float32 else 0.02)
    found.float().square().sum().backward()
    plain.lm_head(states).square().sum().backward()
    assert torch.allclose(model.lm_head.weight.grad, plain.lm_head.weight.grad, rtol=0.05, atol=0.05)


def test_a_head_in_16_bits_is_left_as_it_is():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16()
    make_few_in_float32(model)
    assert model.lm_head(torch.randn(1, 2, SIZES["hidden_size"]).bfloat16()).dtype == torch.bfloat16
