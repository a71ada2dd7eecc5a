"""QLoRA: an adapter on weights of 4 bits, where bitsandbytes is installed; it runs on CPUs too."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import Srlm, read_json, read_rows, write_rows
from srlm_cli.errors import OptionError
from srlm_cli.models import load
from srlm_cli.models.load import load_model, load_tokenizer
from srlm_cli.models.locate import is_adapter
from srlm_cli.train.dpo import dpo
from srlm_cli.train.losses import DPOLossConfig
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.sft import sft
from tiny import completions, pairs, tiny_model

torch.set_num_threads(1)
bitsandbytes = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "m", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def rounded(base: Path, tmp_path_factory) -> Path:
    """The base with the weights that 4 bits leave of it, by bitsandbytes' own functions, as a plain model."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = load_model(str(base), "float32")
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            packed = quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=True)
            layer.weight.data = dequantize_4bit(*packed)
    folder = tmp_path_factory.mktemp("rounded") / "m"
    model.save_pretrained(folder)
    load_tokenizer(str(base)).save_pretrained(folder)
    return folder


def train(kind: str, model: Path, out: Path, in_4bit: bool) -> Path:
    spec = TrainSpec(
        model=str(model), out=out, learning_rate=1e-2, final_learning_rate=1e-3, batch=4, epochs=2, device="cpu",
        lora_r=0 if is_adapter(str(model)) else 2, load_in_4bit=in_4bit,
    )  # fmt: skip
    if kind == "sft":
        sft(completions(11), spec, run=RunOptions(quiet=True))
    else:
        dpo(pairs(11), spec, DPOLossConfig(), run=RunOptions(quiet=True))
    return out


def assert_alike(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert max(float((a[name] - b[name]).abs().max()) for name in {*a, *b}) <= 1e-4
    for mine, theirs in zip(read_rows(one / "metrics.jsonl"), read_rows(other / "metrics.jsonl"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


@pytest.mark.slow
@bitsandbytes
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_it_learns_what_an_adapter_on_the_rounded_weights_learns(kind, base, rounded, tmp_path: Path) -> None:
    train(kind, base, tmp_path / "packed", in_4bit=True)
    train(kind, rounded, tmp_path / "plain", in_4bit=False)
    assert_alike(tmp_path / "packed", tmp_path / "plain")
    if kind == "dpo":
        start = read_json(tmp_path / "packed" / "provenance.json")["start"]
        assert start["loss"] == pytest.approx(0.693147, abs=1e-5) and abs(start["log_ratio_chosen"]) < 1e-4


@pytest.mark.slow
@bitsandbytes
def test_an_adapter_goes_on_with_itself_as_the_reference(base: Path, tmp_path: Path) -> None:
    train("sft", base, tmp_path / "first", in_4bit=True)
    train("dpo", tmp_path / "first", tmp_path / "second", in_4bit=True)
    about = read_json(tmp_path / "second" / "provenance.json")
    assert about["start"]["loss"] == pytest.approx(0.693147, abs=1e-5) and about["margin"] > 0
    assert is_adapter(str(tmp_path / "second"))


@pytest.mark.parametrize("more", [[], ["--lora-r", "2", "--merge"]])
def test_weights_of_4_bits_are_for_adapters(srlm: Srlm, base: Path, more: list[str]) -> None:
    write_rows(srlm.folder / "rows.jsonl", completions(4))
    result = srlm("sft", "--in", "rows.jsonl", "--model", str(base), "--out", "m", "--load_in_4bit", *more, "-q")
    assert result.code == 2 and "trains an adapter on weights that stay as they are" in result.err
    assert len(result.err.splitlines()) == 1 and not (srlm.folder / "m").exists()


def test_without_bitsandbytes_the_package_is_named(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"needs bitsandbytes .*pip install bitsandbytes"):
        train("sft", base, tmp_path / "m", in_4bit=True)
