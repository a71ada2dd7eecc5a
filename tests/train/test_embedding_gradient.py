"""The gradient of an input embedding that is added by row is the one of PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_cli.train.embedding_gradient import add_by_row
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.sft import sft
from tiny import completions, tiny_model

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 3,
}  # fmt: skip
ROWS = [torch.tensor([[1, 2, 2, 3, 4]]), torch.tensor([[4, 3, 9]])]


def gradients(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    for ids in ROWS:
        model(input_ids=ids, labels=ids).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_is_that_of_a_whole_table(tied):
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    by_row = copy.deepcopy(plain)
    add_by_row(by_row)
    wanted, found = gradients(plain), gradients(by_row)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-7), name
    table = found["model.embed_tokens.weight"]
    assert table[2].any()
    assert tied or not table[3].any()  # the padding token


def test_a_second_step_begins_with_a_gradient_of_zero():
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES))
    by_row = copy.deepcopy(plain)
    add_by_row(by_row)
    for model in (plain, by_row):
        gradients(model)
        model.zero_grad()
    wanted, found = gradients(plain), gradients(by_row)
    assert torch.allclose(found["model.embed_tokens.weight"], wanted["model.embed_tokens.weight"], atol=1e-7)


def test_a_frozen_table_stays_without_a_gradient():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    add_by_row(model)
    model.get_input_embeddings().weight.requires_grad_(False)
    assert gradients(model)["model.embed_tokens.weight"] is None


def test_a_training_makes_no_gradient_of_a_whole_table(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "srlm_cli.train.step_trainer.add_by_row", lambda model: calls.append(model) or add_by_row(model)
    )
    rates = {"learning_rate": 1e-3, "final_learning_rate": 1e-4}
    spec = TrainSpec(model=str(tiny_model(tmp_path / "base")), out=tmp_path / "m", batch=2, device="cpu", **rates)
    with torch.profiler.profile() as profile:
        sft(completions(4), spec, run=RunOptions(quiet=True))
    seen = {event.key for event in profile.key_averages()}
    assert calls and "LookedBackward" in seen and "EmbeddingBackward0" not in seen
