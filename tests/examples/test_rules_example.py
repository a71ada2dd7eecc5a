"""examples/rules: its data are what they say, and both arms run to M3 with a tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from both_arms import keeps, run_to_m3
from helpers import ROOT, clean_env, read_rows

EXAMPLE = ROOT / "examples" / "rules"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rules")
    build = [sys.executable, EXAMPLE / "build.py", "--seeds", ROOT / "examples" / "quickstart", "--out", folder]
    subprocess.run([*build, "--seed", "3"], check=True, env=clean_env())
    return folder


def test_scores_are_those_of_the_rules(data: Path) -> None:
    for name in ("ranked", "ranked_valid", "ranked_test"):
        rows = read_rows(data / f"{name}.jsonl")
        replies = [(reply["score"], keeps(reply["text"], row["rules"])) for row in rows for reply in row["responses"]]
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
    run_to_m3(EXAMPLE, tmp_path)
