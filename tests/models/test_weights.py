"""Weights of a model: each tensor is found under its name and in its shape, or the model is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny_models
from srlm_cli.errors import EngineError
from srlm_cli.models.load import load_model, quiet_libraries
from srlm_cli.models.weights import common_prefix, unwrapped

FILE = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    quiet_libraries()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("whole") / "m")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """Experts, which have one tensor each in a file and one together in memory."""
    tiny_models.KINDS["mixtral"] = ("MixtralConfig", {**tiny_models.SIZES, "num_local_experts": 4})
    return tiny_models.save(tmp_path_factory.mktemp("mixture") / "m", "mixtral")


def changed(model: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Return a copy of a model with other tensors in its file."""
    shutil.copytree(model, folder)
    save_file(change(load_file(model / FILE)), folder / FILE, metadata={"format": "pt"})
    return folder


def state(model: Path) -> Tensors:
    return load_model(str(model), "float32").state_dict()


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SAVERS = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "data-parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "peft": lambda name: f"base_model.model.{name}",
    "trainer-of-its-own": lambda name: f"actor.net.{name}",
    "fsdp": lambda name: "_fsdp_wrapped_module." + name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
    "checkpointed": lambda name: name.replace(
        ".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."
    ),
}


@pytest.mark.parametrize("kind", ["whole", "mixture"])
@pytest.mark.parametrize("saver", SAVERS)
def test_names_of_other_savers_are_read(kind: str, saver: str, request, tmp_path, capsys) -> None:
    model = request.getfixturevalue(kind)
    saved = changed(model, tmp_path / "m", lambda tensors: {SAVERS[saver](name): t for name, t in tensors.items()})
    net = load_model(str(saved), "float32")
    assert equal(net.state_dict(), state(model))
    count = sum(SAVERS[saver](name) != name for name in net.state_dict())
    assert f"srlm: {saved}: removed the prefixes of another tool from {count} tensor names (" in capsys.readouterr().err
    net.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / FILE).keys() == load_file(model / FILE).keys()


def test_nothing_is_said_of_names_as_they_should_be(whole, mixture, capsys) -> None:
    state(whole), state(mixture)
    assert not capsys.readouterr().err


UP = "model.layers.1.mlp.up_proj.weight"
FAULTS = {
    "missing": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != UP},
        f"1 of 21 tensors missing ({UP})",
    ),
    "unexpected": (
        lambda tensors: {**tensors, "v_head.weight": torch.zeros(2)},
        "1 unexpected tensors (v_head.weight)",
    ),
    "renamed": (
        lambda tensors: {name.replace("mlp", "ffn"): tensor for name, tensor in tensors.items()},
        "6 of 21 tensors missing (model.layers.0.mlp.down_proj.weight, model.layers.0.mlp.gate_proj.weight, "
        "model.layers.0.mlp.up_proj.weight, ...), 6 unexpected tensors (model.layers.0.ffn.down_proj.weight, ",
    ),
    "another-shape": (
        lambda tensors: {**tensors, "model.norm.weight": torch.zeros(3)},
        "1 tensors of a different shape (model.norm.weight [3], expected [64])",
    ),
    "prefixed-and-missing": (
        lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items() if name != UP},
        f"1 of 21 tensors missing ({UP})",
    ),
    "adapter-not-merged": (
        lambda tensors: {**tensors, "model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 64)},
        "the file also contains an adapter",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_is_not_whole_is_refused(fault: str, whole, tmp_path) -> None:
    change, words = FAULTS[fault]
    saved = changed(whole, tmp_path / "m", change)
    with pytest.raises(EngineError) as raised:
        load_model(str(saved), "float32")
    assert str(raised.value).startswith(f"cannot load the model {saved}: ") and words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("lost", ["experts.1.w1", "experts.1."])
def test_experts_that_are_not_there_are_refused(lost: str, mixture, tmp_path) -> None:
    saved = changed(
        mixture, tmp_path / "m", lambda tensors: {name: t for name, t in tensors.items() if lost not in name}
    )
    with pytest.raises(EngineError, match="cannot load the model .*/m: "):
        load_model(str(saved), "float32")


def test_what_a_model_makes_itself_may_lack_or_be_there(whole, tmp_path) -> None:
    """A head that is the input table again, and frequencies that older savers wrote for each layer."""
    tied = tmp_path / "tied"
    config = transformers.AutoConfig.from_pretrained(whole, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tied)
    assert "lm_head.weight" not in load_file(tied / FILE)
    assert torch.equal(state(tied)["lm_head.weight"], state(tied)["model.embed_tokens.weight"])

    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in (0, 1)}
    saved = changed(whole, tmp_path / "old", lambda tensors: {**tensors, **old})
    assert equal(state(saved), state(whole))


def test_prefixes_of_savers() -> None:
    assert unwrapped("a._orig_mod.b._fsdp_wrapped_module._orig_mod.c") == "a.b.c"
    assert unwrapped("my_orig_mod.a") == "my_orig_mod.a"
    assert common_prefix({"module.a.b", "module.c"}, {"a.b", "c"}) == "module."
    assert common_prefix({"module.a.b", "c"}, {"a.b", "c"}) == ""  # not one prefix for all
    assert common_prefix({"actor.a", "critic.a", "critic.b"}, {"a", "b"}) == "critic."  # of actor one is not found
    assert common_prefix({"xa.b"}, {"a.b"}) == "" == common_prefix({"x"}, set())
