"""Where a tokenizer does not tell the token that ends a turn, the settings of the model do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import tiny_models
from srlm_cli.errors import EngineError
from srlm_cli.models.load import load_tokenizer
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.sft import sft
from tiny import completions, sequence, tiny_adapter

START, END, PAD = 256, 257, 258


@pytest.fixture
def model(tmp_path) -> Path:
    """A model whose tokenizer names no end of turn and no padding; `generation_config.json` names the end."""
    folder = tiny_models.save(tmp_path / "m")
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({name: told[name] for name in told if name not in ("eos_token", "pad_token")}))
    assert AutoTokenizer.from_pretrained(folder).eos_token is None
    return folder


def set_ends(model: Path, ends: object, configured: object) -> None:
    for name, value in (("generation_config.json", ends), ("config.json", configured)):
        file = model / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": value}))


@pytest.mark.parametrize(
    ("ends", "configured"),
    [(END, PAD), ([PAD, END], PAD), ([300000, END], None), (None, END)],
    ids=["one", "that-of-the-template", "that-of-the-tokenizer", "of-the-configuration"],
)
def test_the_end_is_the_configured_one(model, ends, configured) -> None:
    set_ends(model, ends, configured)
    tokenizer = load_tokenizer(str(model))
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == END
    tokenizer.chat_template = tokenizer.chat_template.replace("<end>", "")
    ids, start, *_ = sequence(tokenizer, "Hello?", "Hi.")
    assert ids[-1] == END and ids.count(END) == 1 and start < len(ids)


def test_an_adapter_has_the_end_of_its_base(model, tmp_path) -> None:
    adapter = tiny_adapter(tmp_path / "a", model)
    assert load_tokenizer(str(adapter)).eos_token_id == END


def test_a_model_without_any_end_is_not_trained(model, tmp_path) -> None:
    set_ends(model, None, None)
    assert load_tokenizer(str(model)).eos_token is None
    spec = TrainSpec(model=str(model), out=tmp_path / "out", learning_rate=1e-3, final_learning_rate=1e-3, device="cpu")
    with pytest.raises(EngineError, match="has no end-of-turn token"):
        sft(completions(2), spec, run=RunOptions(quiet=True))
    assert not (tmp_path / "out.part").exists()
