"""On a GPU: greedy replies as transformers writes them, training steps as on a CPU, resume, and vLLM.

`DEVICE=cpu` runs them on a CPU, as a rehearsal; without a GPU they are skipped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from alike import assert_same_weights, near
from srlm_cli import cli
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling
from srlm_cli.models.load import load_tokenizer
from srlm_cli.records import Record
from srlm_cli.train.dpo import dpo
from srlm_cli.train.losses import DPOLossConfig
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.sft import sft
from tiny import completions, pairs, tiny_model

DEVICE = os.environ.get("DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU; DEVICE=cpu rehearses on a CPU"
    ),
]
QUESTIONS = ["Why is the sky blue?", "Name three rivers.", "How do I boil an egg?", "Hi"]
LENGTH = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "m", head_dim=32)  # vLLM on a CPU has no smaller heads


def test_greedy_replies_are_those_of_transformers(model: Path) -> None:
    engine = open_engine(EngineSpec("hf", str(model), device=DEVICE, dtype="float32", batch_size=4))
    greedy = Sampling(temperature=0.0, max_new_tokens=LENGTH)
    asked = [Request([{"role": "user", "content": text}], greedy, (0,)) for text in QUESTIONS]
    replies = [completion.texts[0] for completion in engine.generate(asked)]
    tokenizer = load_tokenizer(str(model))
    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(DEVICE).eval()
    for request, reply in zip(asked, replies, strict=True):
        prompt = tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(DEVICE)
        made = net.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        assert reply == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def run_sft(rows: int, spec: TrainSpec, run: RunOptions) -> Record:
    return sft(completions(rows), spec, run=run)


def run_dpo(rows: int, spec: TrainSpec, run: RunOptions) -> Record:
    return dpo(pairs(rows), spec, DPOLossConfig(), run=run)


TRAININGS = pytest.mark.parametrize("train", [run_sft, run_dpo], ids=["sft", "dpo"])


def spec_of(model: Path, out: Path, device: str) -> TrainSpec:
    return TrainSpec(str(model), out, 1e-3, 1e-4, batch=4, device=device, dtype="float32", device_batch_size=2)


@TRAININGS
def test_steps_are_those_of_a_cpu_in_float32(train: Callable[..., Record], model: Path, tmp_path: Path) -> None:
    quiet = RunOptions(quiet=True)
    on_cpu = train(8, spec_of(model, tmp_path / "on-cpu", "cpu"), quiet)
    on_device = train(8, spec_of(model, tmp_path / "on-device", DEVICE), quiet)
    assert on_device["steps"] == on_cpu["steps"] == 2
    for name in ("first_loss", "last_loss"):
        assert on_device[name] == near(on_cpu[name])
    assert_same_weights(tmp_path / "on-device", tmp_path / "on-cpu", model)


class Killed(BaseException):
    """Ends a training as a kill does: nothing between the step and the test catches it."""


@TRAININGS
def test_a_training_that_was_killed_resumes(
    train: Callable[..., Record], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = RunOptions(quiet=True, save_steps=1)
    whole = train(12, spec_of(model, tmp_path / "whole", DEVICE), saving)
    step, done = transformers.Trainer.training_step, []

    def mortal(self: transformers.Trainer, *args: object, **named: object) -> torch.Tensor:
        done.append(1)
        if len(done) > 4:  # micro-batches: in the third of three steps
            raise Killed
        return step(self, *args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(transformers.Trainer, "training_step", mortal)
        with pytest.raises(Killed):
            train(12, spec_of(model, tmp_path / "killed", DEVICE), saving)
    assert (tmp_path / "killed.part").is_dir() and not (tmp_path / "killed").exists()
    resumed = train(12, spec_of(model, tmp_path / "killed", DEVICE), saving)
    assert resumed["resumed_from"] == 2 and resumed["steps"] == whole["steps"] == 3
    assert_same_weights(tmp_path / "killed", tmp_path / "whole", model)


@pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")
def test_vllm_writes_a_row_for_each_response(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    argv = ["sample", "--in", str(tmp_path / "prompts.jsonl"), "--model", str(model), "--engine", "vllm", "-n", "2"]
    assert cli.run([*argv, "--max-new-tokens", "8", "--out", str(tmp_path / "responses.jsonl"), "--quiet"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [text for text in QUESTIONS for _ in range(2)]
