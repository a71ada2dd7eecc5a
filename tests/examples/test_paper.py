"""examples/paper: its settings are valid, are the paper's, and Make knows what to do with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from helpers import ROOT, Srlm, clean_env, write_rows

PAPER = ROOT / "examples" / "paper" / "srlm.toml"

# `srlm` itself, but for `sample --model FOLDER`, which answers with as many letters as FOLDER/length says, and
# for a judge named `letters`, to whom more of them are better.
FAKE = """#!{python}
import json, sys
from pathlib import Path
from srlm_cli.cli import main
given = sys.argv[1:]
option = dict(zip(given, given[1:]))
rows = [json.loads(line) for line in open(option["--in"])]
if given[0] == "sample":
    length = int((Path(option["--model"]) / "length").read_text())
    made = [{{"prompt": row["prompt"], "response": "a" * length, "model": option["--model"]}} for row in rows]
    Path(option["--out"]).write_text("".join(json.dumps(row) + chr(10) for row in made))
elif option["--model"] == "letters":
    before = json.loads(open(option["--against"]).readline())
    more = len(rows[0]["response"]) > len(before["response"])
    for metric, value in (("win", float(more)), ("tie", 0.0), ("loss", float(not more))):
        print(json.dumps({{"task": "head_to_head", "metric": metric, "value": value}}))
else:
    main()
"""

# arXiv 2401.10020, sections 2 and 3.1.
STATED = {
    "sft": {"learning-rate": 5.5e-6, "final-learning-rate": 1.1e-6, "train-batch-size": 16, "dropout": 0.1},
    "dpo": {
        "learning-rate": 1e-6, "final-learning-rate": 1e-7, "train-batch-size": 16, "dropout": 0.1, "beta": 0.1,
        "loss": ["sigmoid"], "ref": "previous",
    },
    "gen-prompts": {"from-seeds": 6, "from-generated": 2, "temperature": 0.6, "top-p": 0.9, "max-rouge-l": 0.7},
    "sample": {"num-responses": 4, "temperature": 0.7, "top-p": 0.9},
    "judge": {"num-judgements": 3, "temperature": 0.7, "top-p": 0.9, "template": "additive", "score": "text"},
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


@pytest.mark.slow
@pytest.mark.parametrize(("judge", "chosen"), [("letters", 1), ("longest", 0)])
def test_the_judge_chooses_among_checkpoints(srlm: Srlm, judge: str, chosen: int) -> None:
    """Replies of 4, 9 and 2 letters, of steps 2 and 10 and of the last one; to `longest` all matches are ties."""
    folder = srlm.folder / "m"
    for name, length in (("checkpoints/2", 4), ("checkpoints/10", 9), (".", 2)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "length").write_text(str(length))
    (srlm.folder / "srlm").write_text(FAKE.format(python=sys.executable))
    (srlm.folder / "srlm").chmod(0o755)
    write_rows(srlm.folder / "prompts.jsonl", [{"prompt": f"Ask {n}?"} for n in range(4)])
    words = ["bash", str(PAPER.with_name("choose.sh")), "m", "prompts.jsonl", "--engine", "echo", "--model", judge]
    done = srlm.run(words, env={"PATH": f"{srlm.folder}:{os.environ['PATH']}"})
    assert done.code == 0, done.err
    assert done.out.split() == [["m/checkpoints/2", "m/checkpoints/10"][chosen]]
    assert done.err.count("against") == chosen + 1
