"""Model folders as broken downloads and other tools leave them: one line that names the folder and the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import tiny_models
from helpers import Srlm
from srlm_cli.errors import EngineError
from srlm_cli.models.files import broken_file
from srlm_cli.models.load import context_of, load_model, load_tokenizer, quiet_libraries

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234\n"


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    quiet_libraries()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("whole") / "m")


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def with_setting(name: str, value: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))

    return change


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1000)}, folder / "pytorch_model.bin")
    half(folder / "pytorch_model.bin")


def without_a_shard(folder: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def with_text(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def header_only(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


BROKEN = {
    "pointer": (with_text("model.safetensors", POINTER), "model.safetensors is a git-lfs pointer"),
    "pointer-of-tokens": (with_text("tokenizer.json", POINTER), "tokenizer.json is a git-lfs pointer"),
    "half": (lambda folder: half(folder / "model.safetensors"), "model.safetensors is incomplete: "),
    "header-only": (header_only, "model.safetensors is incomplete: 100 bytes, "),
    "empty": (with_text("model.safetensors", ""), "model.safetensors is empty"),
    "something-else": (with_text("model.safetensors", "<html>" * 9), "model.safetensors is not a safetensors file"),
    "half-a-pickle": (as_pickle, "pytorch_model.bin is incomplete"),
    "a-shard-lost": (without_a_shard, "model.safetensors.index.json lists model-00002-of-"),
    "half-a-generation-config": (
        with_text("generation_config.json", '{"eos'),
        "generation_config.json is not valid JSON: ",
    ),
    "pointer-of-a-template": (with_text("chat_template.jinja", POINTER), "chat_template.jinja is a git-lfs pointer"),
    "half-a-config": (lambda folder: half(folder / "config.json"), "config.json is not valid JSON: "),
    "pad-outside": (with_setting("pad_token_id", 32000), "config.json: Padding_idx must be within num_embeddings"),
    "no-length": (
        with_setting("max_position_embeddings", None),
        "config.json: Validation error for field 'max_position_embeddings': TypeError",
    ),
    "no-heads": (with_setting("num_attention_heads", 0), "config.json: "),
    "no-tokenizer": (
        lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
        "the folder has no tokenizer, such as tokenizer.json",
    ),
    "no-weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_named_with_its_file(kind: str, whole, tmp_path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(whole, folder)
    change, words = BROKEN[kind]
    change(folder)
    with pytest.raises(EngineError) as raised:
        load_tokenizer(str(folder))
        context_of(str(folder))
        load_model(str(folder), "float32")
    message = raised.value.message
    assert message.startswith(f"cannot load the model {folder}: ") and words in message and "\n" not in message


def test_whole_folders_look_whole(whole, tmp_path) -> None:
    assert broken_file(whole) == ""
    net = transformers.AutoModelForCausalLM.from_pretrained(whole)
    net.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    torch.save(net.state_dict(), tmp_path / "shards" / "pytorch_model.bin")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2 and broken_file(tmp_path / "shards") == ""


def test_a_command_ends_in_one_line(srlm: Srlm, whole, tmp_path) -> None:
    shutil.copytree(whole, tmp_path / "m")
    half(tmp_path / "m" / "model.safetensors")
    result = srlm("sample", "--model", "m", stdin='{"prompt": "Hello?"}\n')
    assert result.code == 1 and result.out == ""
    assert "srlm sample: error: cannot load the model m: model.safetensors is incomplete: " in result.err
    assert "SRLM_DEBUG" not in result.err and "Traceback" not in result.err


def test_a_broken_chat_template_is_no_fault_of_a_row(srlm: Srlm, whole, tmp_path) -> None:
    shutil.copytree(whole, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    result = srlm("sample", "--model", "m", "--on-error", "skip", stdin='{"prompt": "Hello?"}\n')
    assert result.code == 1 and "the chat template is broken: line 2: unexpected '}'" in result.err


def test_a_token_that_only_the_tokenizer_has_is_a_bad_row(srlm: Srlm, whole, tmp_path) -> None:
    shutil.copytree(whole, tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    tokenizer.add_tokens([f"<extra-{n}>" for n in range(400)])
    tokenizer.save_pretrained(tmp_path / "m")
    rows = '{"prompt": "Say <extra-399>"}\n{"prompt": "Hello?"}\n'
    argv = ["--model", "m", "-n", "1", "--max-new-tokens", "2"]
    result = srlm("sample", *argv, "--on-error", "skip", "--rejects", "bad.jsonl", stdin=rows)
    assert result.code == 0 and [row["prompt"] for row in result.rows] == ["Hello?"]
    assert "the token '<extra-399>' of the tokenizer" in (srlm.folder / "bad.jsonl").read_text()
