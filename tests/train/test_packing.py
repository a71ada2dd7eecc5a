"""Rows that are read side by side have the logits, losses and gradients of rows read alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
import torch
import transformers

import tiny_models
from alike import assert_same_weights, near
from helpers import slow
from srlm_cli.models.load import load_model
from srlm_cli.train import packed_attention, packing
from srlm_cli.train.chunked_logits import add_chunked_loss
from srlm_cli.train.dpo import dpo
from srlm_cli.train.losses import DPOLossConfig
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.packing import Packing, groups
from srlm_cli.train.sft import sft
from srlm_cli.train.sft_trainer import padded_loss
from tiny import completions, pairs, tiny_adapter, tiny_model

torch.set_num_threads(1)
QUIET = RunOptions(quiet=True)
# Some begin alike, one is the beginning of another, one comes twice, one has no place.
ROWS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 20, 21], [5, 6, 7, 8], [30, 31], [5, 6, 7, 20, 21], [5, 6, 40], [7] * 30]
PLACES = [[0, 2, 5], [1, 3], [2], [0], [2, 3], [], [4, 28]]


def made(kind: str, folder: Path, **more: object) -> transformers.PreTrainedModel:
    return load_model(str(tiny_models.save(folder / kind, kind)), "float32", **more)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mistral", "gemma3", "mamba", "gemma2"])
def test_logits_and_gradients_are_those_of_rows_alone(kind, tmp_path):
    net = made(kind, tmp_path)
    found = []
    for fits in (True, False):
        model = copy.deepcopy(net).eval()
        rows = Packing(model)
        assert rows.fits == (kind in tiny_models.PACKED)
        rows.fits = rows.fits and fits
        passes = []
        logits = list(rows.logits(lambda **given: passes.append(1) or model(**given), ROWS, PLACES))  # noqa: B023
        assert len(passes) == (1 if rows.fits else len(ROWS))
        torch.cat(logits).log_softmax(-1)[:, :50].sum().backward()
        found.append((logits, {name: weight.grad for name, weight in model.named_parameters()}))
    for ours, theirs, places in zip(found[0][0], found[1][0], PLACES, strict=True):
        assert ours.shape == theirs.shape == (len(places), 300)
        assert torch.allclose(ours, theirs, atol=1e-4)
    for name, gradient in found[1][1].items():
        assert gradient is None or torch.allclose(found[0][1][name], gradient, rtol=1e-3, atol=2e-3), name


def test_what_two_rows_begin_with_is_read_once(tmp_path):
    net = made("llama", tmp_path)
    read = []
    list(Packing(net).logits(lambda **given: read.append(given["input_ids"].numel()) or net(**given), ROWS, PLACES))
    assert read == [7 + 2 + 1 + 2 + 1 + 1 + 30]


def test_a_model_is_its_own_reference_to_the_last_bit(tmp_path):
    """A reference needs no gradient, but a margin of rounding before the first step would be noise in the metrics."""
    net = made("llama", tmp_path)
    rows = [[*range(5, 90), *range(end, end + 9)] for end in (100, 120, 140)]
    trained = list(Packing(net).logits(net, rows, [[84, 92]] * 3))
    with torch.no_grad():
        reference = list(Packing(net).logits(net, rows, [[84, 92]] * 3))
    assert all(torch.equal(*both) for both in zip(trained, reference, strict=True))


def test_logits_are_made_one_pass_after_the_other(tmp_path, monkeypatch):
    net = made("llama", tmp_path)
    monkeypatch.setattr(packing, "TOKENS", 10)
    passes = []
    found = Packing(net).logits(lambda **given: passes.append(1) or net(**given), ROWS, PLACES)
    next(found)
    assert len(passes) == 1
    assert len(list(found)) == len(ROWS) - 1 and len(passes) > 3


def test_rows_are_packed_where_the_passes_of_training_are_bfloat16(tmp_path, monkeypatch):
    """accelerate then wraps the forward pass, by which it must not be decided whether rows can be packed."""
    base = tiny_model(tmp_path / "base")
    spec = TrainSpec(str(base), tmp_path / "m", 1e-3, 1e-4, batch=4, device="cpu", dtype="bfloat16")
    passes = []
    together = Packing._together
    monkeypatch.setattr(Packing, "_together", lambda *args: passes.append(len(args[2])) or together(*args))
    sft(completions(4), spec, run=QUIET)
    assert passes == [4]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3"])
def test_rows_padded_on_the_left_have_the_loss_of_rows_alone(kind, tmp_path):
    """As on a GPU, where a batch is read at once; gpt2 and opt learned a vector for each position."""
    net = made(kind, tmp_path).eval()
    takes = "position_ids" in signature(net.forward).parameters
    width = max(map(len, ROWS))
    batch = {
        "input_ids": torch.tensor([[258] * (width - len(row)) + row for row in ROWS]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ROWS]),
        "labels": torch.tensor([[-100] * (width - len(row)) + [-100, *row[1:]] for row in ROWS]),
    }
    alone = 0.0
    add_chunked_loss(net)
    with torch.no_grad():
        for row in ROWS:
            scores = net(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)
            alone -= float(scores.gather(1, torch.tensor(row[1:])[:, None]).sum())
        assert float(padded_loss(net, batch, takes)) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("dropout", ["attention", "layer"])
def test_dropout_and_checkpointing_need_rows_alone(tmp_path, dropout):
    net = made("llama", tmp_path).train()
    rows = Packing(net)
    assert rows.now()
    net.gradient_checkpointing_enable()
    assert not rows.now()
    net.gradient_checkpointing_disable()
    if dropout == "attention":
        net.config.attention_dropout = 0.1
    else:
        net.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.1))
    assert not rows.now()
    assert Packing(net.eval()).now()


@pytest.mark.parametrize("kind", [slow("full"), "adapter"])
def test_checkpointing_computes_a_layer_again_for_its_gradient(kind, tmp_path, monkeypatch):
    base = tiny_model(tmp_path / "base")
    model = tiny_adapter(tmp_path / "adapter", base) if kind == "adapter" else base
    passes = []
    read = transformers.models.llama.modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaMLP, "forward",
        lambda *given: passes.append(torch.is_grad_enabled()) or read(*given),
    )  # fmt: skip
    losses = []
    for checkpointing in (True, False):
        spec = TrainSpec(str(model), tmp_path / f"m{checkpointing}", 1e-3, 1e-4, batch=1, device="cpu", dtype="float32")
        passes.clear()
        losses.append(sft(completions(2), replace(spec, checkpointing=checkpointing), run=QUIET)["train_loss"])
        assert sum(passes) == 2 * 2 * (1 + checkpointing)  # steps, layers, and each of them again
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_rows_are_read_together_up_to_so_many_tokens(monkeypatch):
    monkeypatch.setattr(packing, "TOKENS", 10)
    runs = [(some.start, some.stop) for some in groups([4, 6, 3, 12, 1, 1, 1, 1], 3)]
    assert runs == [(0, 2), (2, 3), (3, 4), (4, 7), (7, 8)]
    assert list(groups([], 3)) == []


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("sft", "float32"),
        ("dpo-adapter", "bfloat16"),
        slow("dpo", "bfloat16"),
        slow("sft-adapter", "bfloat16"),
        slow("dpo-adapter", "float32"),
        slow("sft", "bfloat16"),
        slow("dpo", "float32"),
        slow("sft-adapter", "float32"),
    ],
)
def test_a_training_packed_ends_where_one_row_by_row_does(kind, dtype, tmp_path, monkeypatch):
    base = tiny_model(tmp_path / "base")
    model = tiny_adapter(tmp_path / "adapter", base) if "adapter" in kind else base
    common = {"learning_rate": 1e-3, "final_learning_rate": 1e-4, "batch": 4, "epochs": 2, "device": "cpu"}
    packed = TrainSpec(str(model), tmp_path / "packed", **common, dtype=dtype)
    alone = replace(packed, out=tmp_path / "alone", device_batch_size=1)
    monkeypatch.setattr(packing, "TOKENS", 140)  # two to four rows
    monkeypatch.setattr(packed_attention, "SHORT", 0)  # rows alone are attended in bfloat16
    passes = []
    together = Packing._together
    monkeypatch.setattr(Packing, "_together", lambda *args: passes.append(len(args[2])) or together(*args))
    results = []
    for spec in (packed, alone):
        if spec is alone:
            monkeypatch.setattr(Packing, "now", lambda self: False)
        if kind.startswith("sft"):
            results.append(sft(completions(18), spec, run=QUIET, eval_rows=completions(22)[18:]))
        else:
            results.append(dpo(pairs(18), spec, DPOLossConfig(), run=QUIET, eval_rows=pairs(22)[18:]))
    assert max(passes) > 2
    assert results[0]["steps"] == results[1]["steps"]
    for name in ("first_loss", "last_loss", "train_loss"):
        assert results[0][name] == near(results[1][name], dtype)
    for ours, theirs in zip(results[0]["evals"], results[1]["evals"], strict=True):
        assert ours == near(theirs, dtype)
    assert_same_weights(tmp_path / "packed", tmp_path / "alone", model, dtype)


def test_short_rows_are_attended_in_float32(tmp_path, monkeypatch):
    """In a step in bfloat16, too; longer rows are not."""
    net = made("llama", tmp_path)
    rows = Packing(net)
    seen = []
    attention = packed_attention.scaled_dot_product_attention

    def attend(query: torch.Tensor, *others: torch.Tensor, **more: object) -> torch.Tensor:
        found = attention(query, *others, **more)
        seen.append((query.shape[2], found.dtype))
        return found

    monkeypatch.setattr(packed_attention, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(packed_attention, "SHORT", 29)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(rows.logits(net, [[7] * 30, [8] * 29, [9] * 3], [[1], [1], [1]]))
    assert set(seen) == {(30, torch.bfloat16), (3, torch.float32)}
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(rows.logits(net, [[8] * 29, [9] * 3], [[1], [1]]))
    assert set(seen) == {(29, torch.float32), (3, torch.float32)}
