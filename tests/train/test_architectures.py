"""SFT and DPO on mixtures of experts, state space models and hybrids, with and without an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from helpers import slow
from srlm_cli.forward.packed import PackedModel
from srlm_cli.models.load import load_model
from srlm_cli.records import Record
from srlm_cli.train.dpo import dpo
from srlm_cli.train.losses import DPOLossConfig
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.sft import sft
from tiny import completions, pairs

torch.set_num_threads(1)
SIZES = {**tiny_models.SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
DENSE = {**SIZES, "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 32}
KINDS = {
    "granite-4-dense": (
        "GraniteMoeHybridConfig",
        {**DENSE, **MAMBA, "layer_types": ["attention", "attention"], "position_embedding_type": "rope"},
    ),
    "granite-4-hybrid": ("GraniteMoeHybridConfig", {**DENSE, **MAMBA, "layer_types": ["mamba", "attention"]}),
    "granite-moe": ("GraniteMoeConfig", SIZES),
    "phi-moe": ("PhimoeConfig", SIZES),
    "mixtral": ("MixtralConfig", SIZES),
    "falcon-h1": ("FalconH1Config", {**SIZES, **MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8, "head_dim": 8}),
    "mamba": tiny_models.KINDS["mamba"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return models by kind, each made once."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.KINDS.update(KINDS)
    return lambda kind: folder / kind if (folder / kind).exists() else tiny_models.save(folder / kind, kind)


def train(method: str, model: Path, out: Path, **more) -> Record:
    spec = TrainSpec(
        model=str(model), out=out, learning_rate=1e-2, final_learning_rate=1e-2, batch=2, max_length=96,
        device="cpu", dtype="float32", **more,
    )  # fmt: skip
    run = RunOptions(quiet=True)
    return sft(completions(2), spec, run=run) if method == "sft" else dpo(pairs(2), spec, DPOLossConfig(), run=run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "more"),
    [slow("sft", {}), slow("dpo", {}), ("dpo", {"lora_r": 2})],
    ids=["sft", "dpo", "dpo-adapter"],
)
def test_they_learn(kind: str, method: str, more: Record, made, tmp_path) -> None:
    result = train(method, made(kind), tmp_path / "m", **more)
    assert result["steps"] == 1 and result["first_loss"] > 0
    if method == "dpo":
        assert result["first_loss"] == pytest.approx(0.6931, abs=1e-4)  # without the loss of a router
    before, after = (load_model(str(folder), "float32").state_dict() for folder in (made(kind), tmp_path / "m"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and any("proj" in name for name in moved)


def test_the_settings_of_a_router_are_left_as_they_were(made, tmp_path) -> None:
    train("sft", made("mixtral"), tmp_path / "m")
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (made("mixtral"), tmp_path / "m"))
    for name in ("output_router_logits", "router_aux_loss_coef"):
        assert one[name] == other[name]


@pytest.mark.parametrize(("kind", "left"), [("phi-moe", "router"), ("falcon-h1", "mamba.out_proj")])
def test_an_adapter_leaves_alone_what_it_cannot_change(kind: str, left: str, made, tmp_path) -> None:
    train("sft", made(kind), tmp_path / "m", lora_r=2)
    names = load_file(tmp_path / "m" / "adapter_model.safetensors")
    assert names and not any(left in name for name in names) and any("o_proj" in name for name in names)


@pytest.mark.parametrize(("window", "packed"), [(24, False), (512, True), (None, True)])
def test_rows_are_not_packed_where_only_a_mask_knows_the_window(window: int | None, packed: bool, tmp_path) -> None:
    """A window shorter than the context, which PhiMoE gives to its mask and not to its layers."""
    tiny_models.KINDS["windowed"] = ("PhimoeConfig", {**SIZES, "sliding_window": window})
    net = load_model(str(tiny_models.save(tmp_path / "m", "windowed")), "float32").eval()
    with torch.inference_mode():
        assert PackedModel(net, "cpu").fits() == packed
