"""TR-DPO: a reference that moves to the policy during training, as TRL moves it, also across an interruption."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_by_hand import by_logits, first_losses, trl_trainer
from helpers import Srlm, as_lines, read_rows
from srlm_cli import distributed
from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.train.dpo import dpo
from srlm_cli.train.losses import DPOLossConfig
from srlm_cli.train.options import RefSync, RunOptions, TrainSpec
from tiny import pairs, tiny_adapter, tiny_model

torch.set_num_threads(1)
QUIET = RunOptions(quiet=True)


def spec_of(model: Path, out: Path, **more: object) -> TrainSpec:
    """Return six steps of plain gradient descent, each on all rows."""
    common = {"learning_rate": 0.1, "final_learning_rate": 0.1, "batch": 5, "epochs": 6, "optim": "sgd"}
    return TrainSpec(str(model), out, **{**common, "dtype": "float32", "device": "cpu", **more})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name].detach()).abs().max()) for name in one)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl")]


def test_steps_are_those_of_trl(base: Path, other: Path, tmp_path: Path) -> None:
    """TRL's own DPOTrainer keeps a reference of its own and moves it after steps 2, 4 and 6."""
    trainer = trl_trainer(
        base, other, tmp_path / "trl", beta=0.5, learning_rate=0.1, max_steps=6, sync_ref_model=True,
        ref_model_sync_steps=2, ref_model_mixup_alpha=0.3,
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    about = DPOLossConfig(beta=0.5)
    result = dpo(pairs(5), spec_of(base, tmp_path / "m"), about, ref=str(other), sync=RefSync(2, 0.3), run=QUIET)
    assert losses(tmp_path / "m") == pytest.approx([entry["loss"] for entry in logged], rel=1e-4)
    margins = [row["margin"] for row in read_rows(tmp_path / "m" / "metrics.jsonl")]
    assert margins == pytest.approx([entry["rewards/margins"] for entry in logged], rel=1e-3, abs=1e-5)
    assert apart(weights(tmp_path / "m"), dict(trainer.model.named_parameters())) <= 1e-5
    assert {"sync_steps": 2, "mixup": 0.3, "syncs": 3}.items() <= result["reference"].items()
    dpo(pairs(5), spec_of(base, tmp_path / "still"), about, ref=str(other), run=QUIET)
    still = losses(tmp_path / "still")
    assert still[:2] == losses(tmp_path / "m")[:2] and abs(still[2] - losses(tmp_path / "m")[2]) > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reference_that_becomes_the_policy_has_no_log_ratios(dtype: str, tmp_path: Path) -> None:
    """In bfloat16, too: both are the same function of the same weights, and the start is proven in float32."""
    base = tiny_model(tmp_path / "base", hidden_size=128, num_hidden_layers=4, initializer_range=0.1)
    spec = spec_of(base, tmp_path / "m", device_batch_size=1, learning_rate=1e-2, dtype=dtype)
    result = dpo(pairs(5), spec, DPOLossConfig(beta=1.0), sync=RefSync(1, 1.0), run=QUIET)
    assert result["start"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(tmp_path / "m") == pytest.approx([math.log(2)] * 6, abs=1e-5)
    assert apart(weights(base), weights(tmp_path / "m")) > 1e-3


class Killed(BaseException):
    pass


def killed(base: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **more: object) -> TrainSpec:
    """Return a training that died in step 6, after the checkpoint of step 4 and the moves after steps 3 and 6."""
    from transformers import Trainer

    step, done = Trainer.training_step, []

    def mortal(self, *args, **named):
        done.append(1)
        if len(done) == 6:
            raise Killed
        return step(self, *args, **named)

    spec = spec_of(base, out, epochs=8, **more)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", mortal)
        with pytest.raises(Killed):
            dpo(pairs(5), spec, DPOLossConfig(), sync=RefSync(3, 0.6), run=EVERY_4)
    return spec


EVERY_4 = RunOptions(quiet=True, save_steps=4)


@pytest.mark.slow
def test_a_killed_training_goes_on_with_its_reference(base: Path, tmp_path: Path, monkeypatch) -> None:
    spec = killed(base, tmp_path / "m", monkeypatch)
    whole = replace(spec, out=tmp_path / "whole")
    dpo(pairs(5), whole, DPOLossConfig(), sync=RefSync(3, 0.6), run=EVERY_4)
    for changed in (None, RefSync(2, 0.6), RefSync(3, 0.5)):
        with pytest.raises(OptionError, match="other settings: reference"):
            dpo(pairs(5), spec, DPOLossConfig(), sync=changed, run=EVERY_4)
    result = dpo(pairs(5), spec, DPOLossConfig(), sync=RefSync(3, 0.6), run=EVERY_4)
    assert result["resumed_from"] == 4 and result["reference"]["syncs"] == 2
    assert apart(weights(tmp_path / "whole"), weights(tmp_path / "m")) <= 1e-6
    assert losses(tmp_path / "m") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)


def test_a_checkpoint_without_its_reference_is_refused(base: Path, tmp_path: Path, monkeypatch) -> None:
    spec = killed(base, tmp_path / "m", monkeypatch)
    reference = tmp_path / "m.part" / "checkpoint-4" / "reference"
    shutil.rmtree(reference)
    with pytest.raises(SrlmError, match="cannot resume from .*checkpoint-4/reference: it is missing.*--restart"):
        dpo(pairs(5), spec, DPOLossConfig(), sync=RefSync(3, 0.6), run=EVERY_4)


def test_held_out_rows_are_measured_against_the_reference_of_the_start(base: Path, tmp_path: Path) -> None:
    """Else the losses of two checkpoints would have nothing in common, and the lowest would mean nothing."""
    held = pairs(9)[5:]
    spec, run = spec_of(base, tmp_path / "m"), RunOptions(quiet=True, save_steps=2, keep_checkpoints=True)
    result = dpo(pairs(5), spec, DPOLossConfig(), sync=RefSync(1, 1.0), eval_rows=held, run=run)
    for found in result["evals"]:
        folder = tmp_path / "m" / "checkpoints" / str(found["step"])
        wanted = first_losses(DPOLossConfig(), by_logits(folder, held), by_logits(base, held))
        assert found["loss"] == pytest.approx(sum(wanted) / 4, rel=1e-4)
        assert not (folder / "reference").exists()
    assert len(result["evals"]) == 3


def test_what_cannot_be_mixed_is_refused(base: Path, tmp_path: Path, monkeypatch) -> None:
    def refused(words: str, model: Path = base, about: DPOLossConfig = DPOLossConfig(), **more: object) -> None:
        ref = more.pop("ref", "previous")
        with pytest.raises(OptionError, match=f"--ref-sync-steps.*{words}"):
            dpo(pairs(5), spec_of(model, tmp_path / "m", **more), about, ref=ref, sync=RefSync(1, 0.5), run=QUIET)

    refused("full weights, not an adapter", lora_r=2)
    refused("full weights, not an adapter", tiny_adapter(tmp_path / "a", base))
    refused("a loss with a reference", about=DPOLossConfig(loss="simpo"))
    wide = tiny_model(tmp_path / "wide", hidden_size=64)
    refused("other shapes of weights", ref=str(wide))
    refused("other shapes of weights", ref=str(tiny_adapter(tmp_path / "wide_adapter", wide)))
    assert not (tmp_path / "m.part").exists()
    monkeypatch.setattr(distributed, "sharded", lambda: True)
    refused("whole weights")


def test_other_shapes_are_refused_before_a_weight_is_read(base: Path, tmp_path: Path, monkeypatch) -> None:
    deep = tiny_model(tmp_path / "deep", num_hidden_layers=3)
    monkeypatch.setattr("srlm_cli.models.weights.load_whole", None)
    for model, ref in ((base, deep), (deep, base)):
        spec = spec_of(model, tmp_path / "m")
        with pytest.raises(OptionError, match=f"cannot mix {model} into {ref}: other shapes.*--ref previous"):
            dpo(pairs(5), spec, DPOLossConfig(), ref=str(ref), sync=RefSync(1, 0.5), run=QUIET)


def test_an_adapter_that_has_resized_its_base_is_mixed(base: Path, tmp_path: Path) -> None:
    """Its own embeddings count, not those of the configuration of its base."""
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    net.resize_token_embeddings(264, mean_resizing=False)
    padded, adapter, out = (tmp_path / name for name in ("padded", "adapter", "m"))
    net.save_pretrained(padded)
    adapted = get_peft_model(net, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(adapter, save_embedding_layers=True)
    for folder in (padded, adapter):
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    dpo(pairs(5), spec_of(padded, out, epochs=1), DPOLossConfig(), ref=str(adapter), sync=RefSync(1, 0.5), run=QUIET)
    assert (out / "provenance.json").exists()


def test_a_reference_that_never_moves_is_reported(srlm: Srlm, base: Path) -> None:
    argv = ["dpo", "--model", str(base), "--max-steps", "1", "--ref-sync-steps", "2", "--out", "m"]
    result = srlm(*argv, stdin=as_lines(pairs(3)))
    assert result.code == 0 and "the reference never moved: 1 steps, and --ref-sync-steps is 2" in result.err
    assert result.rows[0]["reference"]["mixup"] == 0.6 and result.rows[0]["reference"]["syncs"] == 0


def test_a_share_without_moves_is_refused(srlm: Srlm, base: Path) -> None:
    result = srlm("dpo", "--model", str(base), "--out", "m", "--ref-mixup", "0.3", stdin=as_lines(pairs(3)))
    assert result.code == 2 and "--ref-mixup needs --ref-sync-steps" in result.err
    assert not (srlm.folder / "m").exists()
