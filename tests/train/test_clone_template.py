"""A base model gets a chat template, and goes through the loop as any other model does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import chat_templates
import tiny
from helpers import Srlm, read_json, read_rows, write_rows
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec
from srlm_cli.engines.chat_template import ChatTemplate
from srlm_cli.errors import EngineError, OptionError
from srlm_cli.models.load import base_tokenizer, load_model, load_tokenizer
from srlm_cli.train.clone_template import CHATML, clone_template, special_tokens, trl_names
from srlm_cli.train.dpo import dpo
from srlm_cli.train.losses import DPOLossConfig
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.sft import sft

torch.set_num_threads(1)
QUIET = RunOptions(quiet=True)
OLD_END, NEW = 256, {"<|im_end|>": 257, "<|im_start|>": 258}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.base_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return tiny.base_model(tmp_path_factory.mktemp("untied") / "m", tie_word_embeddings=False)


def spec_of(model: Path, out: Path, **more) -> TrainSpec:
    settings = {"learning_rate": 1e-2, "final_learning_rate": 1e-2, "batch": 2, "max_length": 96} | more
    return TrainSpec(model=str(model), out=out, device="cpu", dtype="float32", **settings)


def learn(model: Path, out: Path, template: str | None = "chatml", run: RunOptions = QUIET, **more) -> Path:
    sft(tiny.completions(4), spec_of(model, out, chat_template=template, **more), run=run)
    return out


def embeddings(model: Path) -> tuple[torch.Tensor, torch.Tensor]:
    net = load_model(str(model), "float32")
    return net.get_input_embeddings().weight.detach(), net.get_output_embeddings().weight.detach()


# --- the template ----------------------------------------------------------------------------


def test_every_template_of_trl_gives_its_special_tokens_and_its_end_of_turn(base: Path) -> None:
    assert trl_names() == chat_templates.NAMES
    for name in trl_names():
        tokenizer = base_tokenizer(str(base))
        clone_template(tokenizer, name)
        assert tokenizer.eos_token == tokenizer.pad_token == chat_templates.end_of(name), name
        dialogue = [{"role": "user", "content": "Is 7 prime?"}, {"role": "assistant", "content": "Yes."}]
        text = ChatTemplate(tokenizer).render(dialogue, add_generation_prompt=False)
        known = {str(token) for token in chat_templates.tokenizer(name).added_tokens_decoder.values()}
        written = {token for token in known - {*chat_templates.PLAIN} if token in text}
        assert written <= set(special_tokens(tokenizer, name)), name


def test_chatml_begins_with_bos_only_where_the_tokenizer_does(base: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = base_tokenizer(str(base))
    tokenizer.bos_token = "<|endoftext|>"
    hello = [{"role": "user", "content": "Hi"}]
    clone_template(tokenizer, "chatml")
    assert tokenizer.apply_chat_template(hello, tokenize=False) == "<|im_start|>user\nHi<|im_end|>\n"
    tokenizer._tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", OLD_END)])
    clone_template(tokenizer, "chatml")
    assert tokenizer.apply_chat_template(hello, tokenize=False).startswith("<|endoftext|><|im_start|>user\n")


def test_a_byte_order_mark_is_not_part_of_a_template(base: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("\ufeff" + CHATML, encoding="utf-8")
    clone_template(tokenizer := base_tokenizer(str(base)), str(tmp_path / "own.jinja"))
    assert tokenizer.get_chat_template() == CHATML


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("no-such", "no such template.*chatml, cohere, .*qwen3"),
        ("notes.txt", "does not write a message and its reply"),
        ("broken.jinja", "broken.jinja: the chat template is broken: line 1: .*endfor.*[^)]$"),
        ("./nowhere/m", "no such model"),
    ],
)
def test_what_is_no_template_is_refused(base: Path, tmp_path: Path, monkeypatch, source: str, why: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("Buy bread.")
    Path("broken.jinja").write_text("{% for m in messages %}{{ m.content }}")
    with pytest.raises(OptionError) as error:
        clone_template(base_tokenizer(str(base)), source)
    assert re.search(why, f"{error.value}")


def test_the_template_of_a_model_brings_its_tokens(base: Path, tmp_path: Path) -> None:
    source = tiny.tiny_model(tmp_path / "instruct")
    tokenizer = base_tokenizer(str(base))
    clone_template(tokenizer, str(source))
    assert tokenizer.chat_template == tiny.TEMPLATE and tokenizer.eos_token == "<|end|>"
    added = set(tokenizer.get_added_vocab()) - {"<|endoftext|>"}
    assert added == {"<|end|>", "<|user|>", "<|assistant|>", "<|system|>"}  # not <|pad|>, which it does not write


# --- the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["base", "untied"])
def test_new_tokens_are_trained_and_the_end_of_turn_is_saved(kind: str, request, tmp_path: Path) -> None:
    model = request.getfixturevalue(kind)
    start = learn(model, tmp_path / "start", learning_rate=0.0)
    for before, after in zip(embeddings(model), embeddings(start), strict=True):
        assert torch.equal(after[:257], before) and torch.allclose(after[257:], before.mean(0).expand(2, -1))
    out = learn(model, tmp_path / "m")
    for before, after in zip(embeddings(start), embeddings(out), strict=True):
        assert not torch.isclose(before[257:], after[257:]).all(1).any()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>" and tokenizer.chat_template
    assert AutoModelForCausalLM.from_pretrained(out).config.eos_token_id == NEW["<|im_end|>"]
    assert GenerationConfig.from_pretrained(out).eos_token_id == [NEW["<|im_end|>"], OLD_END]
    assert read_json(out / "provenance.json")["settings"]["chat_template"] == "chatml"


def test_tokens_with_an_embedding_of_zeros_begin_as_the_mean(base: Path, tmp_path: Path) -> None:
    """Padding of the vocabulary, and tokens that a base model keeps in reserve, as Llama 3 does."""
    model = shutil.copytree(base, tmp_path / "base")
    net = AutoModelForCausalLM.from_pretrained(model)
    net.resize_token_embeddings(264, mean_resizing=False)
    with torch.no_grad():
        net.get_input_embeddings().weight[258:] = 0
    net.save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved|>", "<|im_start|>"]})
    tokenizer.save_pretrained(model)
    before, after = (embeddings(one)[0] for one in (model, learn(model, tmp_path / "m", learning_rate=0.0)))
    assert after.shape == (264, 32) and torch.equal(after[:258], before[:258])
    mean = before[:258].mean(0)
    assert torch.allclose(after[258], mean) and torch.allclose(after[259], mean) and not after[260:].any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base", "untied"])
def test_an_adapter_trains_the_new_tokens(kind: str, request, tmp_path: Path) -> None:
    """The saved adapter, the merged one, and one that is trained on by dpo have the embeddings that were trained."""
    model = request.getfixturevalue(kind)
    adapter = learn(model, tmp_path / "a", lora_r=2)
    merged = learn(model, tmp_path / "b", lora_r=2, merge=True)
    for before, one, other in zip(embeddings(model), embeddings(adapter), embeddings(merged), strict=True):
        assert torch.equal(one[:257], before) and torch.allclose(one, other)
        assert not torch.isclose(one[257:], before.mean(0)).all(1).any()
    with pytest.raises(OptionError, match="vLLM cannot load .*--merge"):
        open_engine(EngineSpec(engine="vllm", model=str(adapter)))
    engine = open_engine(EngineSpec(model=str(adapter), device="cpu", dtype="float32"))
    assert engine.stops.ids == {OLD_END, NEW["<|im_end|>"]}
    result = dpo(tiny.pairs(4), spec_of(adapter, tmp_path / "c"), DPOLossConfig(), run=QUIET)
    assert result["first_loss"] == pytest.approx(0.6931, abs=1e-4)
    after = embeddings(tmp_path / "c")
    assert all(not torch.equal(one, two) for one, two in zip(embeddings(adapter), after, strict=True))
    assert all(torch.equal(one[:257], two[:257]) for one, two in zip(embeddings(model), after, strict=True))


def test_an_adapter_that_leaves_tokens_of_the_output_random_is_refused(untied: Path, tmp_path: Path) -> None:
    adapter = learn(untied, tmp_path / "a", lora_r=2)
    settings = read_json(adapter / "adapter_config.json")
    del settings["trainable_token_indices"]["lm_head"]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: one for name, one in tensors.items() if "lm_head" not in name}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(EngineError, match="adds 2 tokens, but does not contain lm_head"):
        load_model(str(adapter), "float32")


def test_an_adapter_gets_no_template(base: Path, tmp_path: Path) -> None:
    adapter = tiny.tiny_adapter(tmp_path / "a", base)
    with pytest.raises(OptionError, match="needs a full model"):
        learn(adapter, tmp_path / "m")


# --- the run ---------------------------------------------------------------------------------


def test_a_run_with_another_template_is_not_resumed(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(tiny.TEMPLATE)
    spec = spec_of(base, tmp_path / "m", chat_template=str(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srlm_cli.train.session.save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sft(tiny.completions(2), spec, run=RunOptions(quiet=True, save_steps=1))
    file.write_text("{# changed #}" + tiny.TEMPLATE)
    with pytest.raises(OptionError, match="template_hash"):
        sft(tiny.completions(2), spec, run=QUIET)
    file.write_text(tiny.TEMPLATE)
    assert sft(tiny.completions(2), spec, run=QUIET)["steps"] == 1


def test_a_template_that_is_there_is_replaced(tmp_path: Path, capfd) -> None:
    model = tiny.tiny_model(tmp_path / "instruct")
    learn(model, tmp_path / "m", run=RunOptions())
    assert f"chat template chatml, in place of that of {model}: 2 tokens added, <|im_end|> ends a turn" in (
        capfd.readouterr().err
    )
    assert "<|im_start|>" in load_tokenizer(str(tmp_path / "m")).chat_template


@pytest.mark.slow
def test_a_base_model_goes_through_the_loop(srlm: Srlm) -> None:
    """Later commands get no option: M1 stops at its end of turn, is judged, paired, and trained by dpo."""
    base = tiny.base_model(srlm.folder / "M0", initializer_range=0.2)
    rows = [{"prompt": f"Ask {n}?", "completion": f"Score: {n % 4}"} for n in range(8)]
    write_rows(srlm.folder / "ift.jsonl", rows)
    write_rows(srlm.folder / "prompts.jsonl", [{"prompt": "Ask 1?"}, {"prompt": "Ask 2?"}])
    refused = srlm("sft", "--in", "ift.jsonl", "--model", str(base), "--out", "M1", env=tiny.ALONE)
    assert refused.code == 1 and refused.err.count("\n") == 1 and "--chat-template chatml" in refused.err
    trained = srlm(
        "sft", "--in", "ift.jsonl", "--model", str(base), "--out", "M1", "--chat-template", "chatml", "--epochs", "20",
        "--learning-rate", "2e-2", "--train-batch-size", "4", "--dtype", "float32", "--device", "cpu", env=tiny.ALONE,
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert trained.rows[0]["last_loss"] < trained.rows[0]["first_loss"] / 3
    assert "chat template chatml: 2 tokens added, <|im_end|> ends a turn" in trained.err
    common = ("--model", "M1", "--device", "cpu", "--dtype", "float32")
    hot = ("--temperature", "1.5", "--num-responses", "16", "--max-new-tokens", "24")
    assert srlm("sample", "--in", "prompts.jsonl", "--out", "r.jsonl", *common, *hot).code == 0
    replies = read_rows(srlm.folder / "r.jsonl")
    assert [row["finish_reason"] for row in replies].count("stop") >= 4
    assert not any("<|" in row["response"] for row in replies)
    judging = ("--score", "expected", "--template", "score_only")
    assert srlm("judge", "--in", "r.jsonl", "--out", "j.jsonl", *common, *judging).code == 0
    assert srlm("make-pairs", "--in", "j.jsonl", "--out", "p.jsonl").code == 0
    done = srlm("dpo", "--in", "p.jsonl", *common, "--out", "M2", "--train-batch-size", "2", env=tiny.ALONE)
    assert done.code == 0, done.err
    assert srlm("sample", "--in", "prompts.jsonl", *common[2:], "--model", "M2", "--max-new-tokens", "8").code == 0
