"""Adapters of peft: every tensor finds its place, with the tokens they bring and on the base they were made on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from srlm_cli.errors import EngineError, OptionError
from srlm_cli.models.load import load_model, quiet_libraries
from tiny import tiny_model

FILE = "adapter_model.safetensors"
IDS = torch.arange(1, 20)[None]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    quiet_libraries()


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tied") / "m")


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("untied") / "m", tie_word_embeddings=False)


def adapter(folder: Path, base: Path, tokens: int = 0, rows: int | None = None, **settings) -> torch.Tensor:
    """Write an adapter of random weights, with tokens of its own; return its logits behind `IDS`."""
    net = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokens:
        tokenizer.add_tokens([f"<new{at}>" for at in range(tokens)])
    if rows or tokens:
        net.resize_token_embeddings(rows or len(tokenizer), mean_resizing=False)
    kind = settings.pop("kind", peft.LoraConfig)
    net = peft.get_peft_model(
        net, kind(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **settings})
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.2)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    change_settings(folder, base_model_name_or_path=str(base))
    return net.eval()(IDS).logits.detach()


def change_settings(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def logits(model: Path, *, merge: bool = True) -> torch.Tensor:
    return load_model(str(model), "float32", merge=merge).eval()(IDS).logits.detach()


def refusal(model: Path) -> str:
    with pytest.raises((EngineError, OptionError)) as raised:
        load_model(str(model), "float32")
    assert "\n" not in str(raised.value) and str(model) in str(raised.value)
    return str(raised.value)


# --- names -----------------------------------------------------------------------------------

SAVERS = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled-inside": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "data-parallel": lambda name: f"module.{name}",
    "fsdp": lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "of-the-base": lambda name: name.removeprefix("base_model.model."),
    "with-its-name": lambda name: name.replace(".weight", ".default.weight"),
    "with-all": lambda name: "module._orig_mod." + name.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("saver", SAVERS)
def test_names_of_other_savers_are_read(saver: str, tied, tmp_path, capsys) -> None:
    wanted = adapter(tmp_path / "a", tied)
    tensors = load_file(tmp_path / "a" / FILE)
    save_file({SAVERS[saver](name): tensor for name, tensor in tensors.items()}, tmp_path / "a" / FILE)
    assert torch.equal(logits(tmp_path / "a", merge=False), wanted)
    assert (
        f"srlm: {tmp_path / 'a'}: removed the prefixes of another tool from 8 tensor names (" in capsys.readouterr().err
    )


KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "ranks": {"rank_pattern": {"q_proj": 5}},
    "parameters": {"target_parameters": ["mlp.down_proj.weight"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "ia3": {"kind": peft.IA3Config, "feedforward_modules": []},
    "vera": {"kind": peft.VeraConfig},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_loaded_as_peft_does(kind: str, untied, tmp_path, capsys) -> None:
    wanted = adapter(tmp_path / "a", untied, **KINDS[kind])
    assert torch.equal(logits(tmp_path / "a", merge=False), wanted)
    torch.testing.assert_close(logits(tmp_path / "a"), wanted, atol=1e-4, rtol=1e-4)
    assert "another tool" not in capsys.readouterr().err


Q0, Q1 = (f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight" for layer in (0, 1))


def test_tensors_that_do_not_fit_are_refused(untied, tmp_path) -> None:
    adapter(tmp_path / "a", untied, modules_to_save=["lm_head"])
    tensors = load_file(tmp_path / "a" / FILE)

    def with_file(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, tmp_path / "a" / FILE)
        return refusal(tmp_path / "a")

    head = "base_model.model.lm_head.weight"
    assert f"1 of 9 tensors missing ({Q0})" in with_file({n: t for n, t in tensors.items() if n != Q0})
    assert f"1 of 9 tensors missing ({head})" in with_file({n: t for n, t in tensors.items() if n != head})
    more = Q1.replace("q_proj", "k_proj")
    assert "1 unexpected tensors (" in with_file({**tensors, more: torch.zeros(8, 32)})
    lost = with_file({n.replace("layers.1", "layers.7"): t for n, t in tensors.items()})
    assert "4 of 9 tensors missing (" in lost and "4 unexpected tensors (" in lost
    assert "its base" not in lost and str(untied) in lost
    save_file(tensors, tmp_path / "a" / FILE)
    change_settings(tmp_path / "a", r=3)
    assert f"8 tensors of a different shape ({Q0} [8, 32], expected [3, 32], " in refusal(tmp_path / "a")


def test_another_base_is_refused(tied, tmp_path) -> None:
    adapter(tmp_path / "a", tied)
    other = tiny_model(tmp_path / "other", hidden_size=48, num_attention_heads=2)
    change_settings(tmp_path / "a", base_model_name_or_path=str(other))
    assert "tensors of a different shape" in refusal(tmp_path / "a")


# --- tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("rows", [None, 250])
def test_tokens_that_an_adapter_brings_have_their_rows(base: str, rows: int | None, request, tmp_path) -> None:
    """More rows than the base has, or fewer: trainers cut padding off, too."""
    source = request.getfixturevalue(base)
    wanted = adapter(tmp_path / "a", source, tokens=0 if rows else 3, rows=rows)
    assert torch.equal(logits(tmp_path / "a", merge=False), wanted)
    merged = load_model(str(tmp_path / "a"), "float32")
    torch.testing.assert_close(merged(IDS).logits, wanted, atol=1e-4, rtol=1e-4)
    assert merged.config.vocab_size == len(merged.get_output_embeddings().weight) == wanted.shape[-1]


def test_tables_that_are_trained_whole_bring_tokens(untied, tmp_path) -> None:
    wanted = adapter(tmp_path / "a", untied, tokens=3, modules_to_save=["embed_tokens", "lm_head"])
    assert torch.equal(logits(tmp_path / "a", merge=False), wanted)


def test_new_tokens_without_rows_are_refused(untied, tmp_path) -> None:
    adapter(tmp_path / "a", untied, tokens=3)
    tensors = load_file(tmp_path / "a" / FILE)
    save_file({name: tensor for name, tensor in tensors.items() if "lora_" in name}, tmp_path / "a" / FILE)
    assert "no embeddings for 3 tokens of its tokenizer (<new0>, <new1>, <new2>)" in refusal(tmp_path / "a")
    save_file({name: tensor for name, tensor in tensors.items() if "lm_head" not in name}, tmp_path / "a" / FILE)
    assert "it adds 3 tokens, but does not contain lm_head" in refusal(tmp_path / "a")


def test_a_token_without_a_row_that_the_base_has_too_is_no_fault(tied, tmp_path) -> None:
    """As Gemma 3 has one for its pictures."""
    base = tmp_path / "base"
    shutil.copytree(tied, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<picture>"])
    tokenizer.save_pretrained(base)
    wanted = adapter(tmp_path / "a", base)
    assert torch.equal(logits(tmp_path / "a", merge=False), wanted)


# --- settings --------------------------------------------------------------------------------


def test_adapters_without_a_base_are_refused(tied, tmp_path) -> None:
    adapter(tmp_path / "a", tied)
    change_settings(tmp_path / "a", base_model_name_or_path=None)
    assert "adapter_config.json names no base model" in refusal(tmp_path / "a")
    change_settings(tmp_path / "a", base_model_name_or_path="./nowhere")
    assert "the base of the adapter" in refusal(tmp_path / "a")
    change_settings(tmp_path / "a", base_model_name_or_path=str(tmp_path / "a"))
    assert "its base is itself" in refusal(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("[]")
    assert "adapter_config.json is not a JSON object" in refusal(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text('{"r": ')
    assert "adapter_config.json is not valid JSON: " in refusal(tmp_path / "a")


def test_adapters_that_are_no_part_of_the_weights_are_refused(tied, tmp_path) -> None:
    net = AutoModelForCausalLM.from_pretrained(tied)
    about = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(net, about).save_pretrained(tmp_path / "prompt")
    assert "adapters of type PROMPT_TUNING are not supported" in refusal(tmp_path / "prompt")
    adapter(tmp_path / "a", tied)
    change_settings(tmp_path / "a", task_type="SEQ_CLS")
    assert "its task is SEQ_CLS, not CAUSAL_LM" in refusal(tmp_path / "a")
    change_settings(tmp_path / "a", task_type="CAUSAL_LM", alora_invocation_tokens=[1, 2])
    assert "invocation tokens (aLoRA) are not supported" in refusal(tmp_path / "a")
    change_settings(tmp_path / "a", peft_type="OF_TOMORROW")
    assert "OF_TOMORROW" in refusal(tmp_path / "a")


def test_half_a_file_is_named(tied, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tied, base)
    adapter(tmp_path / "a", base)
    for broken, words in (
        (tmp_path / "a" / FILE, f"{tmp_path / 'a'}: {FILE} is incomplete: "),
        (base / "model.safetensors", f"{base} (the base of {tmp_path / 'a'}): model.safetensors is incomplete: "),
    ):
        broken.write_bytes(broken.read_bytes()[:-100])
        assert f"cannot load the model {words}" in refusal(tmp_path / "a")
