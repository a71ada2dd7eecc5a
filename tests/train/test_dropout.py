"""Without `--dropout` a model in training computes what it computes in evaluation, wherever it keeps its shares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from srlm_cli.train import setup
from srlm_cli.train.dropout import drops_out
from srlm_cli.train.options import TrainSpec
from srlm_cli.train.packing import Packing

SIZES = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS = {
    "llama": {"attention_dropout": 0.1, "intermediate_size": 64},
    "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "starcoder2": {"residual_dropout": 0.1, "embedding_dropout": 0.1, "intermediate_size": 64},
    "gpt_bigcode": {},
    "bloom": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "falcon": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_drops_what_it_was_told_to(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **KINDS[kind])).save_pretrained(tmp_path)
    spec = TrainSpec(str(tmp_path), tmp_path / "m", 1e-3, 1e-3, device="cpu")
    ids = torch.arange(3, 40)[None]
    for share in (0.0, 0.3):
        model = setup.load_policy(replace(spec, dropout=share), None).train()
        with torch.no_grad():
            first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
        assert torch.equal(first, second) == (share == 0)
        assert drops_out(model) == (share > 0)
        assert not (share and Packing(model).now())
