"""What gets an adapter: linear layers without routers, or the layers and experts that a user names; optimizers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft.utils import save_and_load
from safetensors.torch import load_file

import tiny_models
from srlm_cli.errors import OptionError
from srlm_cli.models.adapters import load_adapter
from srlm_cli.models.load import load_model
from srlm_cli.records import Record
from srlm_cli.train.dpo import dpo
from srlm_cli.train.lora import add_adapter
from srlm_cli.train.losses import DPOLossConfig
from srlm_cli.train.optimizers import NAMES, check
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.sft import sft
from tiny import completions, pairs, tiny_model

torch.set_num_threads(1)
EXPERTS = {**tiny_models.SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("dense") / "m")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    tiny_models.KINDS["mixtral"] = ("MixtralConfig", EXPERTS)
    return tiny_models.save(tmp_path_factory.mktemp("mixture") / "m", "mixtral")


def spec_of(model: Path, out: Path, **more) -> TrainSpec:
    return TrainSpec(
        model=str(model), out=out, learning_rate=1e-2, final_learning_rate=1e-2, batch=2, max_length=96, device="cpu",
        dtype="float32", **more,
    )  # fmt: skip


def learn(model: Path, out: Path, **more) -> Record:
    return dpo(pairs(2), spec_of(model, out, **more), DPOLossConfig(), run=RunOptions(quiet=True))


def trained(folder: Path) -> set[str]:
    return {
        name.split(".lora_")[0].rpartition("layers.")[2] for name in load_file(folder / "adapter_model.safetensors")
    }


def test_named_layers_alone_get_an_adapter(dense: Path, tmp_path: Path) -> None:
    learn(dense, tmp_path / "m", lora_r=2, lora_target=("q_proj", "mlp.down_proj"))
    assert trained(tmp_path / "m") == {f"{n}.{name}" for n in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")}


def test_saving_an_adapter_asks_no_hub_about_the_base(dense: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda *asked: pytest.fail(f"asked for {asked}"))
    new = add_adapter(
        load_model(str(dense), "float32", "cpu"), spec_of(Path("smollm2-135m-instruct"), tmp_path, lora_r=2)
    )
    new.save_pretrained(tmp_path / "new")
    loaded = load_adapter(load_model(str(dense), "float32", "cpu"), str(tmp_path / "new"), str(dense), trainable=True)
    loaded.save_pretrained(tmp_path / "again")
    for folder in ("new", "again"):
        assert all(".lora_" in name for name in load_file(tmp_path / folder / "adapter_model.safetensors"))


@pytest.mark.slow
def test_routers_and_experts_have_no_adapter_by_default(mixture: Path, tmp_path: Path) -> None:
    learn(mixture, tmp_path / "m", lora_r=2)
    layers = [f"self_attn.{one}_proj" for one in "qkvo"]
    assert trained(tmp_path / "m") == {f"{n}.{name}" for n in (0, 1) for name in layers}


@pytest.mark.slow
def test_the_linear_layers_of_gpt2_have_an_adapter(tmp_path: Path) -> None:
    learn(tiny_models.save(tmp_path / "gpt2", "gpt2"), tmp_path / "m", lora_r=2)
    names = load_file(tmp_path / "m" / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].partition(".h.0.")[2] for name in names} - {""} == {
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj",
    }  # fmt: skip


def test_fused_experts_are_trained_with_their_adapter(mixture: Path, tmp_path: Path) -> None:
    """The first loss is ln 2, and the saved adapter moves the experts and no router when it is merged."""
    result = learn(mixture, tmp_path / "m", lora_r=2, lora_target_parameters=("experts.down_proj",))
    assert result["first_loss"] == pytest.approx(0.6931, abs=1e-4)
    before, after = (load_model(str(one), "float32").state_dict() for one in (mixture, tmp_path / "m"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("experts.down_proj" in name for name in moved) and any("q_proj" in name for name in moved)
    assert not any("gate.weight" in name or "gate_up_proj" in name for name in moved)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"lora_r": 2, "lora_target": ("q_proj", "query")}, "--lora-target query: .*q_proj"),
        ({"lora_r": 2, "lora_target_parameters": ("experts.up",)}, "--lora-target-parameters experts.up.*expert"),
        ({"lora_target": ("q_proj",)}, "need --lora-r"),
        ({"optim": "adam"}, "--optim adam: no such optimizer"),
    ],
)
def test_a_name_that_matches_nothing_is_refused(dense: Path, tmp_path: Path, more: Record, why: str) -> None:
    with pytest.raises(OptionError) as error:
        learn(dense, tmp_path / "m", **more)
    assert re.search(why, f"{error.value}; {error.value.hint}")


def test_the_names_of_experts_are_told_where_one_is_wrong(mixture: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as error:
        learn(mixture, tmp_path / "m", lora_r=2, lora_target_parameters=("experts.up",))
    assert "mlp.experts.down_proj, mlp.experts.gate_up_proj" in error.value.hint
    with pytest.raises(OptionError, match="cannot have --dropout"):
        learn(mixture, tmp_path / "n", lora_r=2, dropout=0.1, lora_target_parameters=("experts.down_proj",))


@pytest.mark.parametrize("optim", ["adafactor", pytest.param("sgd", marks=pytest.mark.slow)])
def test_a_model_learns_with_another_optimizer(dense: Path, tmp_path: Path, optim: str) -> None:
    weights = []
    for name in (optim, "adamw_torch_fused"):
        sft(completions(2), spec_of(dense, tmp_path / name, optim=name), run=RunOptions(quiet=True))
        weights.append(load_file(tmp_path / name / "model.safetensors")["model.norm.weight"])
    start = load_model(str(dense), "float32").model.norm.weight
    assert not torch.equal(weights[0], start) and not torch.equal(*weights)


def test_an_optimizer_of_a_package_that_is_missing_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("srlm_cli.train.optimizers.find_spec", lambda name: None)
    refused = []
    for name in NAMES:
        try:
            check(name)
        except OptionError:
            refused.append(name)
    assert {"adamw_8bit", "paged_adamw_32bit", "lion_32bit", "ademamix"} <= set(refused)
    assert not {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"} & set(refused)
