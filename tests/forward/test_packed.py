"""Packed passes are used where they differ from the model's own by rounding only, however far that goes."""

from __future__ import annotations

import pytest
import torch

from srlm_cli.forward.packed import PackedModel

ROWS = [[5, 9, 200, 17, 33, 8], [5, 9, 200, 40, 41, 8], [90, 91, 92, 93, 94, 95]]


def logits(spread: float) -> tuple[PackedModel, torch.Tensor]:
    """A model with random weights of this spread in bfloat16, and its logits for the rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=300, num_hidden_layers=8, initializer_range=spread, **sizes)
    net = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with torch.inference_mode():
        return PackedModel(net, "cpu"), net(input_ids=torch.tensor(ROWS)).logits[:, -1].float()


@pytest.mark.parametrize(("spread", "alike"), [(0.02, False), (0.4, True)])
@torch.inference_mode()
def test_the_limit_is_as_far_as_rounding_moves_a_model(spread: float, alike: bool) -> None:
    packed, theirs = logits(spread)
    assert packed._alike(1.15 * theirs, theirs, ROWS) is alike  # 0.15 away; rounding of embeddings moves 0.01 and 0.5


@pytest.mark.parametrize("spread", [0.02, 0.4])
@torch.inference_mode()
def test_other_logits_are_not_taken_for_rounding(spread: float) -> None:
    packed, theirs = logits(spread)
    assert packed.fits()
    assert not packed._alike(theirs.roll(1, 0), theirs, ROWS)
