"""What `--dry-run` says of a training: its memory is that of a real one, and its passes have the training's dtype."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from helpers import PROGRAM, clean_env, slow, write_rows
from srlm_cli.train import dry_run
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.sft import sft
from tiny import ALONE, completions, labelled, pairs, tiny_model

ROWS = {"sft": completions(12), "dpo": pairs(12), "kto": labelled(12)}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model whose weights, gradients and moments are as much as all else in the process: 16 x 39 million bytes."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
    return tiny_model(tmp_path_factory.mktemp("large") / "m", **shape)


def peak(folder: Path, *argv: str) -> tuple[int, dict]:
    """Return the peak memory of a command in bytes, and what it prints."""
    with open(folder / "stdout", "w+b") as out:
        process = subprocess.Popen([*PROGRAM, *argv], cwd=folder, stdout=out, env=clean_env(ALONE))
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        assert process.returncode == 0
        return used.ru_maxrss * 1024, json.load(out)


@pytest.mark.parametrize(
    ("command", "more"),
    [
        slow("dpo", ()),
        slow("sft", ()),
        slow("sft", ("--max-steps", "1")),
        slow("kto", ()),
        slow("dpo", ("--dtype", "bfloat16")),
        slow("sft", ("--lora-r", "8")),
        slow("sft", ("--optim", "adafactor")),
    ],
)
def test_the_memory_is_that_of_a_training_within_a_tenth(
    command: str, more: tuple, large: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS[command])
    argv = [command, "--in", "rows.jsonl", "--model", str(large), "--out", "m", "--train-batch-size", "4", "--quiet"]
    argv += [*(() if "--dtype" in more else ("--dtype", "float32")), *more]
    _, told = peak(tmp_path, *argv, "--dry-run")
    real, _ = peak(tmp_path, *argv)
    assert told["memory_bytes"] == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_passes_have_the_dtype_of_the_training(dtype: str, base: Path, tmp_path: Path, monkeypatch) -> None:
    forward, seen = LlamaMLP.forward, []

    def watched(self, states):
        found = forward(self, states)
        if found.requires_grad:
            seen.append(found.dtype)
        return found

    monkeypatch.setattr(LlamaMLP, "forward", watched)
    spec = TrainSpec(str(base), tmp_path / "m", 1e-3, 1e-4, batch=4, device="cpu", dtype=dtype)
    sft(completions(8), spec, run=RunOptions(quiet=True, dry_run=True))
    assert {*seen} == {getattr(torch, dtype)}


def test_the_passes_are_the_largest_of_the_training(base: Path, tmp_path: Path) -> None:
    """A row with few tokens and many targets takes its memory for logits: it is not among the longest."""
    made = [{"input_ids": [5] * 400, "labels": [-100] * 399 + [5]} for _ in range(7)]
    made += [{"input_ids": [6] * 390, "labels": [6] * 390}, {"input_ids": [7] * 100, "labels": [-100] * 99 + [7]}]
    spec = TrainSpec(str(base), tmp_path / "m", 1e-3, 1e-4, batch=4, device="cpu")
    passes = dry_run.passes_of(made, lambda row: len(row["input_ids"]), spec)
    assert [len(row["input_ids"]) for row in passes.longest] == [400, 400] and not passes.alone
    assert any(row["input_ids"][0] == 6 for row in passes.targets)
    one = dry_run.passes_of(made, lambda row: len(row["input_ids"]), replace(spec, batch=2))
    assert one.alone and len(one.rows) <= 6
    pair = {"prompt_ids": [1] * 10, "chosen_ids": [2] * 3, "rejected_ids": [3] * 5}
    assert dry_run.size_of(pair) == (28, 8)
    assert dry_run.size_of({"prompt_ids": [1] * 10, "completion_ids": [2] * 3, "label": True}) == (13, 3)
