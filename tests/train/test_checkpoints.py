"""A checkpoint is whole or is refused; adapters continue with all they have; equal trainings write equal files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_models
from srlm_cli.errors import EngineError, SrlmError
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.models.load import load_model, restore
from srlm_cli.records import Record
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.session import check_complete
from srlm_cli.train.sft import sft
from tiny import completions, tiny_model

torch.set_num_threads(1)
TIMED = {"provenance.json", "metrics.jsonl"}  # which tell how long a training took


class Killed(BaseException):
    """Ends a training as kill -9 does: nothing between the step and the test catches it."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """Experts, which have one tensor each in a file and one together in memory."""
    tiny_models.KINDS["mixtral"] = ("MixtralConfig", {**tiny_models.SIZES, "num_local_experts": 4})
    return tiny_models.save(tmp_path_factory.mktemp("mixture") / "m", "mixtral")


def train(model: Path, out: Path, **more) -> Record:
    settings = {"learning_rate": 1e-2, "final_learning_rate": 1e-2, "batch": 2, "dtype": "float32", "device": "cpu"}
    run = RunOptions(quiet=True, save_steps=1)
    return sft(completions(6), TrainSpec(model=str(model), out=out, **{**settings, **more}), run=run, provenance={})


def killed_after_a_step(monkeypatch: pytest.MonkeyPatch, model: Path, out: Path, **more) -> Path:
    """Return the checkpoint of step 1 of a training that was killed in step 2."""
    from transformers import Trainer

    step, done = Trainer.training_step, []

    def mortal(self, *args, **named):
        done.append(1)
        if self.state.global_step == 1:
            raise Killed
        return step(self, *args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", mortal)
        with pytest.raises(Killed):
            train(model, out, **more)
    return out.with_name(out.name + ".part") / "checkpoint-1"


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in TIMED}


def test_a_mixture_of_experts_continues_to_the_same_weights(mixture, tmp_path, monkeypatch) -> None:
    train(mixture, tmp_path / "whole")
    killed_after_a_step(monkeypatch, mixture, tmp_path / "m")
    assert train(mixture, tmp_path / "m")["resumed_from"] == 1
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", tmp_path / "m"))
    assert one.keys() == other.keys() and any("experts.1." in name for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("more", "file", "lost"),
    [({}, "model.safetensors", "model.norm.weight"), ({"lora_r": 2}, "adapter_model.safetensors", "lora_A")],
    ids=["whole", "adapter"],
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(more, file, lost, base, tmp_path, monkeypatch) -> None:
    checkpoint = killed_after_a_step(monkeypatch, base, tmp_path / "m", **more)
    tensors = load_file(checkpoint / file)
    name = next(name for name in tensors if lost in name)
    save_file({other: tensors[other] for other in tensors if other != name}, checkpoint / file, {"format": "pt"})
    with pytest.raises(EngineError, match=f"checkpoint-1: 1 of [0-9]+ tensors missing \\({name}\\)"):
        train(base, tmp_path / "m", **more)


def test_a_checkpoint_with_a_broken_file_is_refused(base, tmp_path, monkeypatch) -> None:
    checkpoint = killed_after_a_step(monkeypatch, base, tmp_path / "m", lora_r=2)
    net = load_model(str(checkpoint), "float32", merge=False)
    check_complete(checkpoint)
    for name in ("scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json", "optimizer.pt"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(
            SrlmError, match=f"cannot resume from .*checkpoint-1: {name} is (incomplete|not valid JSON)"
        ):
            check_complete(checkpoint)
        (checkpoint / name).unlink()
        with pytest.raises(SrlmError, match=f"{name} is missing|no {name}"):
            check_complete(checkpoint) if name != "adapter_model.safetensors" else restore(net, checkpoint)
        (checkpoint / name).write_bytes(content)
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(SrlmError, match="optimizer.pt is missing.*--restart"):
        train(base, tmp_path / "m", lora_r=2)


# --- adapters --------------------------------------------------------------------------------


def test_equal_trainings_write_equal_files(base, tmp_path) -> None:
    for name in ("one", "other"):
        train(base, tmp_path / name, lora_r=2, max_steps=1)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")
    targets = json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) > 6 and targets == sorted(targets)  # of a set, peft writes the order of hashes
    assert fingerprint(str(tmp_path / "one")) == fingerprint(str(tmp_path / "other"))


def test_a_fingerprint_is_of_the_model_alone(base, tmp_path) -> None:
    folder = tmp_path / "m"
    train(base, folder, lora_r=2, max_steps=1)
    before = fingerprint(str(folder))
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "target_modules": settings["target_modules"][::-1]}))
    (folder / "provenance.json").write_text("{}")
    assert fingerprint(str(folder)) == before
    file.write_text(json.dumps({**settings, "target_modules": settings["target_modules"][1:]}))
    assert fingerprint(str(folder)) != before


def test_an_adapter_is_refused_on_a_base_that_has_changed(base, tmp_path) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    train(own, tmp_path / "a", lora_r=2, max_steps=1)
    (own / "generation_config.json").write_text('{"eos_token_id": 1}')
    load_model(str(tmp_path / "a"), "float32")
    tensors = load_file(own / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineError, match=f"the weights of its base {own} have changed since it was trained"):
        load_model(str(tmp_path / "a"), "float32")


def test_tokens_that_an_adapter_brought_are_kept(base, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>"])
    net = AutoModelForCausalLM.from_pretrained(base)
    net.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    net = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    net.peft_config["default"].base_model_name_or_path = str(base)
    net.save_pretrained(tmp_path / "first")
    tokenizer.save_pretrained(tmp_path / "first")
    train(tmp_path / "first", tmp_path / "second", max_steps=1)
    table = "base_model.model.model.embed_tokens.weight"
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert one.keys() == other.keys() and torch.equal(one[table], other[table])
    assert len(load_model(str(tmp_path / "second"), "float32").get_input_embeddings().weight) == len(tokenizer)
