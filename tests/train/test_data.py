"""What is checked before a training, and the dry run that shows it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from helpers import Srlm, as_lines, write_rows
from srlm_cli.errors import DataError
from srlm_cli.train.data import DataReport, dpo_rows, sft_rows
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.render import Renderer
from srlm_cli.train.setup import device_batch_size
from srlm_cli.train.sft import sft
from srlm_cli.train.step_trainer import StepSampler
from stub_server import MODEL, Stub
from tiny import ALONE, completions, pairs, sequence, tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture(scope="module")
def tokenizer(base: Path):
    return AutoTokenizer.from_pretrained(base)


def test_a_pair_is_the_dialogue_that_the_template_makes(tokenizer) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    row = {"prompt": [*turns, {"role": "user", "content": "Why?"}], "chosen": "So.", "rejected": "No idea"}
    [made], report = dpo_rows([row], Renderer(tokenizer), 200)
    opened = "<|user|>\nHi<|end|>\n<|assistant|>\nYes<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n"
    assert tokenizer.decode(made["prompt_ids"]) == opened
    assert tokenizer.decode(made["chosen_ids"]) == "So.<|end|>"
    assert tokenizer.decode(made["rejected_ids"]) == "No idea<|end|>"
    assert tokenizer.eos_token_id in made["chosen_ids"] and made["label_smoothing"] == 0.0
    assert (report.rows, report.longest) == (1, len(made["prompt_ids"] + made["rejected_ids"]))
    assert report.target_tokens == len(made["chosen_ids"] + made["rejected_ids"])


def test_duplicates_are_dropped_and_counted(tokenizer) -> None:
    rows = [*pairs(3), *pairs(2), {**pairs(1)[0], "chosen": "Another"}]
    made, report = dpo_rows(rows, Renderer(tokenizer), 200)
    assert (len(made), report.duplicates) == (4, 2) and "2 duplicates dropped" in report.line("pairs")
    assert len(dpo_rows(rows, Renderer(tokenizer), 200, keep_duplicates=True)[0]) == 6
    made, report = sft_rows([*completions(3), *completions(3)], Renderer(tokenizer), 200)
    assert (len(made), report.duplicates, report.rows) == (3, 3, 3)
    assert len(sft_rows([*completions(3), *completions(3)], Renderer(tokenizer), 200, keep_duplicates=True)[0]) == 6


def test_a_long_pair_is_cut_and_one_without_a_reply_left_out(tokenizer) -> None:
    rows = [{"prompt": "a", "chosen": "x" * 50, "rejected": "y"}, {"prompt": "b" * 99, "chosen": "x", "rejected": "y"}]
    made, report = dpo_rows(rows, Renderer(tokenizer), 40)
    assert (report.rows, report.truncated, report.left_out) == (1, 1, 1)
    assert len(made[0]["prompt_ids"] + made[0]["chosen_ids"]) == 40
    assert tokenizer.eos_token_id not in made[0]["chosen_ids"]
    assert report.rows + report.left_out + report.duplicates == len(rows)


def test_a_second_bos_is_refused(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.bos_token = "<|system|>"
    assert sequence(tokenizer, "a", "b")[0].count(tokenizer.bos_token_id) == 0
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert sequence(tokenizer, "a", "b")[0].count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(DataError, match="begins with two <|system|>"):
        sequence(tokenizer, "a", "b")


def test_each_step_has_its_rows_whatever_stands_together() -> None:
    """A permutation anew each epoch; within a step the longest first."""
    lengths = [(7 * n) % 23 for n in range(22)]
    sampler = StepSampler(lengths, 4, seed=1)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(22)) and order == list(sampler)
        for at in range(0, 22, 4):
            step = [lengths[row] for row in order[at : at + 4]]
            assert step == sorted(step, reverse=True)
        epochs.append(order)
    assert epochs[0] != epochs[1] != list(StepSampler(lengths, 4, seed=2))


def test_a_step_is_the_same_one_row_or_all_at_a_time(base: Path, tmp_path: Path) -> None:
    spec = TrainSpec(str(base), tmp_path / "one", 1e-3, 1e-3, batch=4, max_steps=3, device_batch_size=1)
    one = sft(completions(18), spec, run=RunOptions(quiet=True))
    all_ = sft(completions(18), replace(spec, out=tmp_path / "all", device_batch_size=4), run=RunOptions(quiet=True))
    assert one["first_loss"] == pytest.approx(all_["first_loss"], rel=1e-5)
    assert one["last_loss"] == pytest.approx(all_["last_loss"], rel=1e-5)


def test_metrics_have_speed_lengths_and_log_probabilities(srlm: Srlm, base: Path) -> None:
    result = srlm(
        "dpo", "--model", str(base), "--out", "m", "--train-batch-size", "4", stdin=as_lines(pairs(8)), env=ALONE
    )
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (srlm.folder / "m" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["grad_norm"] > 0
        assert row["margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"], abs=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(base)
    made, _ = dpo_rows(pairs(8), Renderer(tokenizer), 512)
    for side in ("chosen", "rejected"):
        mean = sum(len(row[f"{side}_ids"]) for row in made) / 8
        assert sum(row[f"length_{side}"] for row in rows) / 2 == pytest.approx(mean)


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_dry_run_shows_a_row_with_its_mask_and_writes_nothing(srlm: Srlm, base: Path, command: str) -> None:
    rows = completions(18) if command == "sft" else pairs(18)
    before = sorted(base.iterdir())
    argv = [command, "--model", str(base), "--out", "m", "--dry-run", "--train-batch-size", "4", "--epochs", "3"]
    result = srlm(*argv, stdin=as_lines([*rows, rows[0]]), env=ALONE)
    assert result.code == 0, result.err
    assert list(srlm.folder.iterdir()) == [] and sorted(base.iterdir()) == before
    target = "> Answer 0 <|end|>" if command == "sft" else "> Good 0 <|end|>"
    lines = result.err.splitlines()
    assert lines[lines.index("| <|user|>") :][:4] == ["| <|user|>", "| Ask 0?<|end|>", "| <|assistant|>", target]
    assert "1 duplicates dropped" in result.err and "15 steps of 4 rows, up to 1024 tokens at a time" in result.err
    assert "memory about" in result.err and "time about" in result.err and "\x1b" not in result.err
    [row] = result.rows
    assert row["steps"] == 15 and row["data"]["duplicates"] == 1 and row["dry_run"]
    # weights, gradients and AdamW's moments are 16 bytes a weight; the process alone is more than that
    assert row["memory_bytes"] > 16 * (base / "model.safetensors").stat().st_size / 4
    assert row["seconds"] > 0 and "model" not in row


def test_a_dry_run_counts_the_steps_that_a_training_takes(base: Path, tmp_path: Path) -> None:
    spec = TrainSpec(str(base), tmp_path / "m", 1e-3, 1e-4, batch=4, epochs=3, device="cpu")
    rows = completions(18)
    shown = sft(rows, spec, run=RunOptions(quiet=True, dry_run=True))
    assert shown["steps"] == sft(rows, spec, run=RunOptions(quiet=True))["steps"] == 15


def test_rows_are_no_longer_than_the_model_can_read(tmp_path: Path, capsys) -> None:
    model = tiny_model(tmp_path / "short", max_position_embeddings=40)
    spec = TrainSpec(str(model), tmp_path / "m", 1e-3, 1e-4, batch=2, device="cpu")
    rows = [{**row, "completion": "word " * 30} for row in completions(2)]
    assert sft(rows, spec, run=RunOptions())["data"]["longest"] == 40
    assert f"--max-length is 40, the context length of {model}" in capsys.readouterr().err


@pytest.mark.parametrize("held", ["", as_lines([{"prompt": "long " * 30, "completion": "x"}])], ids=["empty", "long"])
def test_held_out_rows_that_cannot_be_used_are_told(srlm: Srlm, base: Path, held: str) -> None:
    (srlm.folder / "held.jsonl").write_text(held)
    argv = ["sft", "--model", str(base), "--out", "m", "--eval-file", "held.jsonl", "--max-length", "64"]
    result = srlm(*argv, stdin=as_lines(completions(4)), env=ALONE)
    assert result.code == 3 and "--eval-file has no row within --max-length 64" in result.err


@pytest.mark.parametrize(("batch", "at_a_time"), [(16, 4), (6, 3), (5, 1), (10, 2), (2, 2), (1, 1)])
def test_any_batch_can_be_trained_on_a_gpu_by_default(batch: int, at_a_time: int, monkeypatch) -> None:
    monkeypatch.setattr("srlm_cli.train.setup.pick_device", lambda device: "cuda")
    assert device_batch_size(TrainSpec("m", Path("out"), 1e-3, 1e-4, batch=batch)) == at_a_time


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_half_a_character_is_trained_on_as_its_replacement(srlm: Srlm, base: Path, command: str) -> None:
    row = {"prompt": "Ask \ud83d?", "completion": "So \udc00."}
    if command == "dpo":
        row = {"prompt": "Ask \ud83d?", "chosen": "So \udc00.", "rejected": "No."}
    text = "".join(json.dumps(one) + "\n" for one in (row, {**row, "prompt": "Ask?"}))
    (srlm.folder / "held.jsonl").write_text(text)
    argv = [command, "--model", str(base), "--out", "m", "--dry-run"]
    result = srlm(*argv, stdin=text, env=ALONE)
    assert result.code == 0, result.err
    assert f"srlm {command}: warning: 2 rows with half a character" in result.err
    assert "| Ask \ufffd?<|end|>" in result.err and "> So \ufffd.<|end|>" in result.err
    held = srlm(*argv, "--held-out", "held.jsonl", stdin=json.dumps({**row, "prompt": "Ask \ufffd?"}), env=ALONE)
    assert held.code == 3 and "evaluation file held.jsonl" in held.err


def test_half_a_character_of_a_server_comes_through_all_stages(srlm: Srlm, base: Path) -> None:
    """It is replaced where the answer is read, counted once, and nothing after it meets it."""
    with Stub(write=lambda prompt, seed: f"half \ud83d of {seed}") as stub:
        server = ["--engine", "openai", "--base-url", stub.url, "--model", MODEL, "--quiet"]
        made = srlm("sample", *server, "--out", "responses.jsonl", stdin=as_lines([{"prompt": "Ask?"}] * 2))
        told = "answers of the server with half a character (a lone surrogate), replaced by U+FFFD"
        assert made.err == f"srlm sample: warning: 2 {told}\n"
        assert json.loads((srlm.folder / "responses.jsonl.meta.json").read_text())["warnings"] == {told: 2}
    for argv in (["judge", "--engine", "echo", "--in", "responses.jsonl", "--out", "judged.jsonl"],
                 ["make-pairs", "--in", "judged.jsonl", "--out", "pairs.jsonl"],
                 ["dpo", "--in", "pairs.jsonl", "--model", str(base), "--out", "m", "--dry-run"]):  # fmt: skip
        result = srlm(*argv, env=ALONE)
        assert result.code == 0 and "half a character" not in result.err, result.err
    assert "> half \ufffd of " in result.err


def test_held_out_prompts_are_refused(srlm: Srlm, base: Path) -> None:
    (srlm.folder / "eval.jsonl").write_text('{"prompt": "ask  1?"}\n')
    argv = ["dpo", "--model", str(base), "--out", "m", "--held-out", "eval.jsonl"]
    result = srlm(*argv, stdin=as_lines(pairs(3)))
    assert result.code == 3 and "<stdin>:2: its prompt is in the evaluation file eval.jsonl" in result.err


def test_an_input_has_a_weight(srlm: Srlm, base: Path) -> None:
    write_rows(srlm.folder / "ift.jsonl", completions(40))
    write_rows(srlm.folder / "eft.jsonl", [{**row, "prompt": "judge " + row["prompt"]} for row in completions(40)])
    files = ["--in", "ift.jsonl", "--in", "eft.jsonl"]
    argv = ["sft", "--model", str(base), "--out", "m", "--dry-run", *files]
    result = srlm(*argv, "--mix-weight", "2", "--mix-weight", "0.5", env=ALONE)
    assert result.code == 0, result.err
    halves = result.rows[0]["data"]["rows"] - 80
    assert 10 <= halves <= 30  # 20 expected, drawn row by row: 3 standard deviations are 9.5
    again = srlm(*argv, "--mix-weight", "2", "--mix-weight", "0.5", env=ALONE)
    assert again.rows[0]["data"] == result.rows[0]["data"]
    wrong = srlm(*argv, "--mix-weight", "2")
    assert wrong.code == 2 and "1 --mix-weight for 2 --in" in wrong.err


def test_a_report_with_notes_is_json() -> None:
    report = DataReport(rows=3)
    report.notes["with the reply as it is"] = 2
    assert json.loads(json.dumps(report.as_dict()))["notes"] == {"with the reply as it is": 2}


def test_an_input_of_weight_0_is_counted(srlm: Srlm, base: Path) -> None:
    argv = ["sft", "--model", str(base), "--out", "m", "--mix-weight", "0"]
    result = srlm(*argv, stdin=as_lines(completions(4)), env=ALONE)
    assert result.code == 3 and "none of 4 rows can be trained on: 4 left out by --mix-weight" in result.err


def test_positive_only_trains_on_full_scores(srlm: Srlm, base: Path) -> None:
    rows = [
        {"prompt": f"Ask {n}", "response": f"Reply {n}", "score": score} for n, score in enumerate([5, 4.67, None, 5.0])
    ]
    result = srlm("sft", "--positive-only", "--model", str(base), "--out", "m", stdin=as_lines(rows), env=ALONE)
    assert result.code == 0 and "2 of 4 responses have the full score of 5" in result.err, result.err
    assert result.rows[0]["data"]["rows"] == 2
