"""examples/paper: its settings are valid, are the paper's, and Make knows what to do with them."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

from helpers import Srlm, clean_env

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "examples" / "paper" / "srlm.toml"

# arXiv 2401.10020, sections 2 and 3.1.
STATED = {
    "sft": {"learning-rate": 5.5e-6, "final-learning-rate": 1.1e-6, "train-batch-size": 16, "dropout": 0.1},
    "dpo": {
        "learning-rate": 1e-6, "final-learning-rate": 1e-7, "train-batch-size": 16, "dropout": 0.1, "beta": 0.1,
        "loss": "sigmoid", "ref": "previous",
    },
    "gen-prompts": {"from-seeds": 6, "from-generated": 2, "temperature": 0.6, "top-p": 0.9, "max-rouge-l": 0.7},
    "sample": {"n": 4, "temperature": 0.7, "top-p": 0.9},
    "judge": {"samples": 3, "temperature": 0.7, "top-p": 0.9, "template": "additive", "score": "text"},
}  # fmt: skip


def test_every_command_takes_the_settings_and_has_the_figures_of_the_paper(srlm: Srlm) -> None:
    result = srlm("settings", "--config", str(PAPER))
    assert result.code == 0, result.err
    resolved = {row["command"]: row for row in result.rows}
    for command, figures in STATED.items():
        assert {name: resolved[command][name] for name in figures} == figures


def test_the_batch_is_shared_by_its_processes() -> None:
    settings = tomllib.loads(PAPER.read_text())
    for command in ("sft", "dpo"):
        own = settings[command]
        assert own["train-batch-size"] % (own["num-processes"] * own["device-batch-size"]) == 0
        assert own["save-steps"] == 200


def test_make_prints_the_loop_of_the_paper(tmp_path: Path) -> None:
    data = {"IFT": "ift.jsonl", "RANKED": "ranked.jsonl", "RANKED_EVAL": "ranked_eval.jsonl"}
    for file in data.values():
        (tmp_path / file).write_text("")
    words = [f"SRLM={sys.executable} -m srlm_cli", f"CONFIG={PAPER}", "M0=llama", "EFT_MODEL=sft/model", "NAME=paper"]
    argv = ["make", "-f", str(ROOT / "src/srlm_cli/recipes/Makefile"), "-n", "iterate", "ITER=3", *words]
    done = subprocess.run(argv, cwd=tmp_path, env=clean_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if " -m srlm_cli " in line]
    [eft] = [line for line in lines if " make-eft " in line]
    assert "--model sft/model" in eft
    [first] = [line for line in lines if " sft " in line]
    assert "--in ift.jsonl --in runs/paper/eft.jsonl" in first and "--model llama" in first
    trained = [line for line in lines if " dpo " in line]
    assert [("M2/model" in line, "M3/model" in line.split("--out")[1]) for line in trained] == [
        (True, False),
        (True, True),
    ]
    assert all(str(PAPER) in line for line in lines)
    assert json.dumps(sorted(file.name for file in tmp_path.iterdir())) == json.dumps(sorted(data.values()))
