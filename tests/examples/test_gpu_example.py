"""examples/gpu: its settings run the loop of examples/facts to M2, with a tiny thinking model and the engine hf."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import chat_templates
from helpers import FORKED, ROOT, Srlm, clean_env, read_json, read_rows, write_rows

FACTS, SETTINGS = ROOT / "examples" / "facts", ROOT / "examples" / "gpu" / "srlm.toml"
BRIEF = {
    "SRLM_ENGINE": "hf",
    "SRLM_SAMPLE_MAX_THINKING_TOKENS": "6",
    "SRLM_SAMPLE_MAX_NEW_TOKENS": "16",
    "SRLM_JUDGE_MIN_SCORE_MASS": "0",  # a tiny model writes anything
    "SRLM_MAKE_PAIRS_MIN_GAP": "0",
    "SRLM_MAKE_PAIRS_MIN_CHOSEN_SCORE": "0",
    "SRLM_MAKE_PAIRS_CUT_OFF": "keep",
    "SRLM_SFT_MAX_STEPS": "2",  # the first step of a warm-up has a learning rate of 0
    "SRLM_DPO_MAX_STEPS": "2",
}


def thinking_qwen3(folder: Path) -> Path:
    """Write a tiny random Qwen3 whose chat template opens a thought in the generation prompt."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = chat_templates.tokenizer("qwen3_6")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, **sizes, **ends
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run to M2 and its replies to held-out questions; `m0` beside it is the tiny model."""
    folder = tmp_path_factory.mktemp("gpu")
    m0, out = thinking_qwen3(folder / "m0"), folder / "out"
    made = [f"SRLM={' '.join(FORKED)}", f"PYTHON={sys.executable}", f"M0={m0}", f"OUT={out}"]
    settings = ["CONFIG=../gpu/srlm.toml", "LIMIT=4", "LAST=2"]
    command = ["make", "-C", FACTS, *made, *settings, out / "own" / "M2" / "eval-rules.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_env(BRIEF), check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.mark.slow
def test_limit_is_the_number_of_records_of_each_input(run: Path) -> None:
    for step, per_prompt in (("M1/responses", 12), ("M2/eval-rule-responses", 4)):
        rows = read_rows(run / "own" / f"{step}.jsonl")
        assert len({row["prompt_id"] for row in rows}) == 4 and len(rows) == 4 * per_prompt, step


@pytest.mark.slow
def test_thoughts_are_apart_and_in_the_pairs(run: Path) -> None:
    rows = [row for row in read_rows(run / "own" / "M1" / "responses.jsonl") if row["thought"] and row["response"]]
    assert len(rows) > 24 and not any(row["response"].startswith(("<think>", row["thought"])) for row in rows)
    replies = {row["id"]: row for row in rows}
    pairs = read_rows(run / "own" / "M1" / "pairs.jsonl")
    both = [pair for pair in pairs if {pair["chosen_id"], pair["rejected_id"]} <= set(replies)]
    assert both
    for pair in both:
        for side in ("chosen", "rejected"):
            [message], reply = pair[side], replies[pair[f"{side}_id"]]
            assert (message["content"], message["reasoning_content"]) == (reply["response"], reply["thought"])


@pytest.mark.slow
def test_m2_is_the_adapter_of_m1_trained_on(run: Path) -> None:
    m1, m2 = (run / "own" / name / "model" for name in ("M1", "M2"))
    for model in (m1, m2):
        assert read_json(model / "adapter_config.json")["r"] == tomllib.loads(SETTINGS.read_text())["sft"]["lora-r"]
    assert read_json(m2 / "provenance.json")["from"]["model"] == str(m1)
    weights = [(model / "adapter_model.safetensors").read_bytes() for model in (m1, m2)]
    assert weights[0] != weights[1]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "rank"), [("sft", "32"), ("sft", "0"), ("dpo", "32")])
def test_a_dry_run_says_time_and_memory(run: Path, srlm: Srlm, command: str, rank: str) -> None:
    """As an adapter, and with all weights."""
    sft = command == "sft"
    files = [run / "data" / "ift.jsonl", run / "eft.jsonl"] if sft else [run / "own" / "M1" / "pairs.jsonl"]
    model = run.parent / "m0" if sft else run / "own" / "M1" / "model"
    given = [word for file in files for word in ("--in", str(file))]
    settings = ["--config", str(SETTINGS), "--model", str(model), "--out", "m", "--dry-run"]
    done = srlm(command, *given, *settings, env={"SRLM_SFT_LORA_R": rank})
    assert done.code == 0, done.err
    [told] = done.rows
    assert told["memory_bytes"] > 0 and told["seconds"] > 0 and told["steps"] > 0
    assert "memory about" in done.err and "time about" in done.err


def test_without_vllm_one_line_names_it(srlm: Srlm, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm"):
        pytest.skip("vllm is installed")
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Why?"}])
    done = srlm("sample", "--config", str(SETTINGS), "--in", str(rows), "--model", "smollm2-135m-instruct")
    assert done.code == 1 and done.out == ""
    assert done.err.startswith("srlm sample: error: vllm is not installed") and done.err.count("\n") == 1


def test_each_setting_is_known_also_without_those_of_the_task(srlm: Srlm, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text("".join(line for line in SETTINGS.open() if not line.endswith("# facts\n")))
    for path in (SETTINGS, own):
        done = srlm("settings", "--config", str(path))
        assert done.code == 0, done.err
        found = {row["command"]: row for row in map(json.loads, done.out.splitlines())}
        for section, keys in tomllib.loads(path.read_text()).items():
            for command in found if section == "defaults" else [section]:
                same = {key: value for key, value in keys.items() if key in found[command]}
                assert section == "defaults" or same == {key: found[command][key] for key in same}
        assert {row["engine"] for row in found.values() if "engine" in row} == {"vllm"}
    assert "facts" not in own.read_text().split("[defaults]")[1]
    assert found["judge"]["template"] == "additive" and found["judge"]["max-thinking-tokens"] == 512
