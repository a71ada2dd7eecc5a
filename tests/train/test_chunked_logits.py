"""The logits of a row never are in memory as a whole; losses, scores and gradients are those of the whole row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tiny_models
from helpers import read_rows, slow
from srlm_cli.train import chunked_logits, packing, scoring
from srlm_cli.train.chunked_logits import add_chunked_loss, body_of
from srlm_cli.train.data import IGNORED
from srlm_cli.train.dpo import dpo
from srlm_cli.train.kto import kto
from srlm_cli.train.losses import DPOLossConfig, KTOLossConfig
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.packing import Packing
from srlm_cli.train.scoring import FIELDS, score_without_padding
from srlm_cli.train.sft import sft
from srlm_cli.train.sft_trainer import padded_loss
from tiny import base_model, labelled, pairs, tiny_model

torch.set_num_threads(1)
ROWS = [{"prompt": f"Ask {n}?", "completion": "word " * (9 + n)} for n in range(4)]
tiny_models.KINDS["cohere"] = ("CohereConfig", {**tiny_models.SIZES, "logit_scale": 0.25})
tiny_models.KINDS["granite"] = ("GraniteConfig", {**tiny_models.SIZES, "logits_scaling": 3.0})


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """The numbers in each output of a model's last layer in a pass with a gradient, from now on."""
    found = []
    linear = torch.nn.functional.linear

    def noted(input, weight, bias=None):  # noqa: A002 - as PyTorch calls it
        made = linear(input, weight, bias)
        if weight.shape[0] > 250 and torch.is_grad_enabled():
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
    monkeypatch.setattr(chunked_logits, "CHUNK", 20 * 260)
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
        monkeypatch.setattr(chunked_logits, "CHUNK", chunk)
        net.zero_grad()
        loss = padded_loss(net, batch, False)
        loss.backward()
        found.append((loss.detach(), {name: one.grad for name, one in net.named_parameters() if one.grad is not None}))
    assert torch.allclose(found[0][0], found[1][0]) and found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], rtol=1e-4, atol=1e-5), name


# --- pairs, and single replies ---------------------------------------------------------------


def one_step(command: str, config, base: Path, other: Path, out: Path, **more) -> tuple[dict, dict, dict]:
    """Return results, metrics and weights after a step of plain gradient descent, which show the gradient."""
    spec = TrainSpec(
        str(base), out, 1.0, 1.0, batch=5, max_steps=1, device="cpu", **{"dtype": "float32", "optim": "sgd", **more}
    )
    train, rows = (dpo, pairs(5)) if command == "dpo" else (kto, labelled(5))
    results = train(rows, spec, config, ref=str(other), run=RunOptions(quiet=True))
    name = "adapter_model.safetensors" if more.get("lora_r") else "model.safetensors"
    [metrics] = read_rows(out / "metrics.jsonl")
    return results, metrics, load_file(out / name)


@pytest.mark.parametrize(
    ("command", "config", "more"),
    [
        ("dpo", DPOLossConfig(nll_alpha=0.7), {}),
        ("dpo", DPOLossConfig(loss="length-normalised", beta=0.5), {"lora_r": 2}),
        ("dpo", DPOLossConfig(use_weighting=True), {"checkpointing": True}),
        ("kto", KTOLossConfig(beta=0.5), {}),
        slow("dpo", DPOLossConfig(label_smoothing=0.2), {}),
        slow("dpo", DPOLossConfig(loss="robust", label_smoothing=0.2), {}),
        slow("dpo", DPOLossConfig(loss="hinge"), {}),
        slow("dpo", DPOLossConfig(loss="ipo"), {}),
        slow("dpo", DPOLossConfig(loss="apo-zero"), {}),
        slow("dpo", DPOLossConfig(loss="apo-down"), {}),
        slow("dpo", DPOLossConfig(loss="r-dpo"), {}),
        slow("dpo", DPOLossConfig(loss="simpo"), {}),
        slow("dpo", DPOLossConfig(loss="dpo-positive", positive_lambda=5.0), {}),
        slow("dpo", DPOLossConfig(ld_alpha=0.3), {}),
        slow("dpo", DPOLossConfig(loss={"sigmoid": 0.8, "apo-zero": 0.2}, use_weighting=True), {}),
        slow("kto", KTOLossConfig(loss="apo-zero-unpaired"), {"lora_r": 2}),
    ],
    ids=str,
)
def test_a_step_is_that_of_whole_logits(
    command, config, more, tmp_path: Path, base: Path, other: Path, sizes: list[int], monkeypatch
) -> None:
    whole = one_step(command, config, base, other, tmp_path / "whole", **more)
    targets = max(sizes) // 261
    assert targets > 20
    sizes.clear()
    monkeypatch.setattr(chunked_logits, "CHUNK", 7 * 261)
    chunked = one_step(command, config, base, other, tmp_path / "chunked", **more)
    assert 0 < max(sizes) <= 1.5 * 7 * 261 and sum(sizes) >= 2 * targets * 261
    assert whole[0]["first_loss"] == pytest.approx(chunked[0]["first_loss"], rel=1e-5)
    assert whole[1].keys() == chunked[1].keys() and "grad_norm" in whole[1]
    for name in whole[1].keys() - {"seconds", "tokens_per_second"}:
        assert whole[1][name] == pytest.approx(chunked[1][name], rel=1e-4, abs=1e-5), name
    for name, weight in whole[2].items():
        assert torch.allclose(weight, chunked[2][name], atol=1e-5), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_in_chunks_is_its_own_reference_to_the_last_bit(dtype: str, base: Path, tmp_path: Path, monkeypatch):
    """The check before the first step: the reference's scores of four pairs, and then the policy's."""
    monkeypatch.setattr(chunked_logits, "CHUNK", 7 * 261)
    without_padding, found = scoring.scores, []
    monkeypatch.setattr(scoring, "scores", lambda *args: found.append(without_padding(*args)) or found[-1])
    spec = TrainSpec(str(base), tmp_path / "m", 1e-3, 1e-3, batch=5, max_steps=1, device="cpu", dtype=dtype)
    dpo(pairs(5), spec, DPOLossConfig(), run=RunOptions(quiet=True))
    _, reference, policy, _ = (one.log_probs for one in found)
    assert len(reference) == 8 and reference.any() and torch.equal(reference, policy)


class Widest(TorchDispatchMode):
    """The most rows of a tensor whose last dimension is the vocabulary, in any operation, of backward passes, too."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor) and one.ndim > 1 and one.shape[-1] == self.vocabulary:
                self.rows.append(one.numel() // self.vocabulary)
        return found


def small_llama(vocabulary: int, rows: int, tokens: int, targets: int) -> tuple[LlamaForCausalLM, dict]:
    """Return a model that scores without padding, and rows that end with targets."""
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**{**tiny_models.SIZES, "hidden_size": 64, "vocab_size": vocabulary}))
    score_without_padding(Packing(net), weighted=True)
    ids = torch.arange(rows * tokens).view(rows, tokens) + 3
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][:, : tokens - targets] = IGNORED
    return net, {**batch, "fused_lm_head": True}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_tensor_has_more_logits_than_a_chunk(dtype: str, monkeypatch) -> None:
    """In the passes without a gradient, with one, and backward; both give the same bits."""
    vocabulary, targets = 900, 77
    net, batch = small_llama(vocabulary, 2, 80, targets)
    found, rows = [], []
    for chunk in (2 * targets, 100):
        monkeypatch.setattr(chunked_logits, "CHUNK", chunk * vocabulary)
        net.zero_grad()
        with Widest(vocabulary) as widest, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            with torch.no_grad():
                reference = net(**batch)
            policy = net(**batch)
            policy.log_probs.sum().backward()
        for name in (*FIELDS, "log_sum_sq_probs"):
            assert torch.equal(reference[name], policy[name]), name
        rows.append(max(widest.rows))
        found.append((policy, {name: one.grad for name, one in net.named_parameters()}))
    assert rows == [2 * targets, targets]  # two equal chunks
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.05, "atol": 0.05}
    for name in FIELDS[:3]:
        assert torch.allclose(found[0][0][name], found[1][0][name], **near), name
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], **near), name


@pytest.mark.parametrize("chunk", [2**25, 20 * 300], ids=["whole", "chunks"])
def test_a_long_pair_keeps_one_of_its_passes_for_the_gradient(chunk: int, monkeypatch) -> None:
    """The other is computed again after it. What is in memory for the gradient is counted when both are done."""
    net, batch = small_llama(300, 2, 80, 60)
    weights = {weight.data_ptr() for weight in net.parameters()}
    passes, read = [], net.model.forward
    monkeypatch.setattr(
        net.model, "forward", lambda **given: passes.append(given["input_ids"].numel()) or read(**given)
    )
    monkeypatch.setattr(chunked_logits, "CHUNK", chunk)
    monkeypatch.setattr(packing, "TOKENS", 100)  # one row in a pass
    found = []
    for most in (1000, 100):
        monkeypatch.setattr(scoring, "TOKENS", most)
        kept: dict[int, int] = {}

        def keep(one: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            if one.data_ptr() not in weights:
                kept[one.data_ptr()] = one.nbytes
            return one

        net.zero_grad()
        passes.clear()
        with torch.no_grad():
            reference = net(**batch)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
            policy = net(**batch)
        assert passes == [80] * 4 and torch.equal(reference.log_probs, policy.log_probs)
        policy.log_probs.sum().backward()
        again = 1 if most == 100 else 0
        assert len(passes) == 4 + again
        found.append((sum(kept.values()), {name: one.grad for name, one in net.named_parameters()}))
    assert found[1][0] < 0.6 * found[0][0]
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name
