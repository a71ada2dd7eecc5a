"""The logits of a row never are in memory as a whole, and the loss and the gradients are those of the whole row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny_models
from srlm_cli.train import chunked_loss
from srlm_cli.train.chunked_loss import add_chunked_loss, body_of
from srlm_cli.train.data import IGNORED
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.sft import sft
from srlm_cli.train.sft_trainer import padded_loss
from tiny import base_model, tiny_model

torch.set_num_threads(1)
ROWS = [{"prompt": f"Ask {n}?", "completion": "word " * (9 + n)} for n in range(4)]
tiny_models.KINDS["cohere"] = ("CohereConfig", {**tiny_models.SIZES, "logit_scale": 0.25})
tiny_models.KINDS["granite"] = ("GraniteConfig", {**tiny_models.SIZES, "logits_scaling": 3.0})


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """The numbers in each output of a model's last layer, from now on."""
    found = []
    linear = torch.nn.functional.linear

    def noted(input, weight, bias=None):  # noqa: A002 - as PyTorch calls it
        made = linear(input, weight, bias)
        if weight.shape[0] > 250:
            found.append(made.numel())
        return made

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    return found


def trained(model: Path, out: Path, **more) -> dict[str, torch.Tensor]:
    spec = TrainSpec(
        model=str(model), out=out, learning_rate=1e-2, final_learning_rate=1e-2, batch=4, max_length=96, device="cpu",
        dtype="float32", **more,
    )  # fmt: skip
    sft(ROWS, spec, run=RunOptions(quiet=True))
    name = "adapter_model.safetensors" if more.get("lora_r") else "model.safetensors"
    return load_file(out / name)


@pytest.mark.parametrize(
    "more", [{}, {"checkpointing": True}, {"lora_r": 2, "chat_template": "chatml"}], ids=["packed", "alone", "adapter"]
)
def test_a_training_makes_the_logits_in_pieces(tmp_path: Path, sizes: list[int], monkeypatch, more) -> None:
    made = base_model if more.get("lora_r") else tiny_model
    model = made(tmp_path / "base")
    whole = trained(model, tmp_path / "whole", **more)
    targets = max(sizes) // 260
    assert targets > 45
    sizes.clear()
    monkeypatch.setattr(chunked_loss, "CHUNK", 20 * 260)
    pieces = trained(model, tmp_path / "pieces", **more)
    assert 0 < max(sizes) <= 20 * 262 and sum(sizes) >= 2 * targets * 257
    assert whole.keys() == pieces.keys()
    for name, weight in whole.items():
        assert torch.allclose(weight, pieces[name], atol=1e-5), name


@pytest.mark.parametrize(
    "kind",
    ["llama", "gemma2", "cohere", "granite", "opt", "gpt2", "mamba", pytest.param("bloom", marks=pytest.mark.slow)],
)
def test_a_batch_with_padding_has_the_gradients_of_whole_logits(kind: str, tmp_path: Path, monkeypatch) -> None:
    """As on a GPU: Gemma 2 caps its logits after the output layer, Cohere and Granite scale them."""
    net = AutoModelForCausalLM.from_pretrained(tiny_models.save(tmp_path / kind, kind), dtype=torch.float32).eval()
    assert body_of(net) is not None
    batch = {
        "input_ids": torch.tensor([[258] * 3 + [*range(40, 57)], [*range(60, 80)]]),
        "attention_mask": torch.tensor([[0] * 3 + [1] * 17, [1] * 20]),
        "labels": torch.tensor([[IGNORED] * 8 + [*range(45, 57)], [IGNORED] * 5 + [*range(65, 80)]]),
    }
    add_chunked_loss(net)
    found = []
    for chunk in (2**25, 7 * 300):
        monkeypatch.setattr(chunked_loss, "CHUNK", chunk)
        net.zero_grad()
        loss = padded_loss(net, batch, False)
        loss.backward()
        found.append((loss.detach(), {name: one.grad for name, one in net.named_parameters() if one.grad is not None}))
    assert torch.allclose(found[0][0], found[1][0]) and found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], rtol=1e-4, atol=1e-5), name
