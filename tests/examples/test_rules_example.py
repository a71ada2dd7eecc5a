"""examples/rules: its data are what they say, and both arms run to M3 with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import FORKED, ROOT, clean_env, read_rows
from srlm_cli.rules import check_reply, rules_of_row
from tiny import tiny_model

EXAMPLE = ROOT / "examples" / "rules"
BRIEF = {
    "SRLM_SAMPLE_LIMIT": "4",
    "SRLM_SAMPLE_MAX_NEW_TOKENS": "8",
    "SRLM_JUDGE_LIMIT": "8",
    "SRLM_JUDGE_MIN_SCORE_MASS": "0",  # a tiny model writes anything
    "SRLM_MAKE_EFT_LIMIT": "4",
    "SRLM_SFT_MAX_STEPS": "1",
    "SRLM_SFT_MAX_LENGTH": "2048",  # the letters of a tiny model are tokens
    "SRLM_DPO_MAX_LENGTH": "2048",
    "SRLM_DPO_MAX_STEPS": "1",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rules")
    build = [sys.executable, EXAMPLE / "build.py", "--seeds", ROOT / "examples" / "quickstart", "--out", folder]
    subprocess.run([*build, "--seed", "3"], check=True, env=clean_env())
    return folder


def kept(text: str, rules: list[str]) -> bool:
    row = {"response": text, "rules": rules}
    return set(check_reply(row, rules_of_row(row)).values()) == {True}


def test_scores_are_those_of_the_rules(data: Path) -> None:
    for name in ("ranked", "ranked_valid", "ranked_test"):
        rows = read_rows(data / f"{name}.jsonl")
        replies = [(reply["score"], kept(reply["text"], row["rules"])) for row in rows for reply in row["responses"]]
        assert {(0.0, False), (5.0, True)} == set(replies)


def prompts(data: Path, name: str) -> set[str]:
    return {row["prompt"] for row in read_rows(data / f"{name}.jsonl")}


def test_no_prompt_of_a_training_is_held_out(data: Path) -> None:
    test, valid = prompts(data, "test"), prompts(data, "valid")
    assert len(test) == 80 and len(valid) > 50 and not test & valid
    assert prompts(data, "ranked_test") == test and prompts(data, "ranked_valid") == valid
    for name in ("ift", "ranked", "round-1", "round-2"):
        assert not (test | valid) & prompts(data, name)


def test_the_reported_prompts_are_the_same_with_all_seeds(data: Path, tmp_path: Path) -> None:
    build = [sys.executable, EXAMPLE / "build.py", "--seeds", ROOT / "examples" / "quickstart", "--out", tmp_path]
    subprocess.run(build, check=True, env=clean_env())
    for name, same in (("test", True), ("ranked_test", True), ("valid", False), ("ift", False)):
        assert ((tmp_path / f"{name}.jsonl").read_text() == (data / f"{name}.jsonl").read_text()) is same


@pytest.mark.slow
def test_both_arms_run_to_m3(tmp_path: Path) -> None:
    m0 = tiny_model(tmp_path / "m0")
    made = [f"SRLM={' '.join(FORKED)}", f"PYTHON={sys.executable}", f"M0={m0}", f"OUT={tmp_path / 'out'}"]
    done = subprocess.run(
        ["make", "-C", EXAMPLE, *made], capture_output=True, text=True, env={**clean_env(), **BRIEF}, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "What was learned" in done.stdout and "rules kept, control" in done.stdout
    for model in ("own/M0", "own/M1", "own/M2", "own/M3", "control/M2", "control/M3"):
        rows = read_rows(tmp_path / "out" / model / "eval-rules.jsonl")
        assert [row["n"] for row in rows if row["metric"] == "rules_kept" and "rule" not in row] == [16]
    shuffled = read_rows(tmp_path / "out" / "control" / "M1" / "pairs.jsonl")
    own = read_rows(tmp_path / "out" / "own" / "M1" / "pairs.jsonl")
    assert all("shuffled_labels" in row for row in shuffled) and not any("shuffled_labels" in row for row in own)
    assert {row["id"] for row in shuffled} == {row["id"] for row in own} and own
    model = json.loads((tmp_path / "out" / "control" / "M3" / "model" / "provenance.json").read_text())
    assert model["from"]["model"].endswith("control/M2/model")
