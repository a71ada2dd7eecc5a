"""examples/facts: its data are what they say, and both arms run to M3 with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import FORKED, ROOT, clean_env, read_rows
from srlm_cli.rules import check_reply, rules_of_row
from tiny import tiny_model

EXAMPLE = ROOT / "examples" / "facts"
TRAINED = ("ift", "ranked", "round-1", "round-2", "round-3")
MEASURED = ("test", "valid", "never", "ranked_test")
BRIEF = {
    "SRLM_SAMPLE_LIMIT": "4",
    "SRLM_SAMPLE_MAX_NEW_TOKENS": "8",
    "SRLM_JUDGE_LIMIT": "8",
    "SRLM_JUDGE_MIN_SCORE_MASS": "0",  # a tiny model writes anything
    "SRLM_MAKE_EFT_LIMIT": "4",
    "SRLM_MAKE_PAIRS_MIN_GAP": "0",
    "SRLM_MAKE_PAIRS_MIN_CHOSEN_SCORE": "0",
    "SRLM_SFT_MAX_STEPS": "1",
    "SRLM_SFT_MAX_LENGTH": "2048",  # the letters of a tiny model are tokens
    "SRLM_DPO_MAX_LENGTH": "2048",
    "SRLM_DPO_MAX_STEPS": "1",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("facts")
    build = [sys.executable, EXAMPLE / "build.py", "--out", folder, "--seed", "3"]
    subprocess.run(build, check=True, env=clean_env())
    return folder


def right(text: str, rules: list[str]) -> bool:
    row = {"response": text, "rules": rules}
    return set(check_reply(row, rules_of_row(row)).values()) == {True}


def test_scores_are_those_of_the_facts(data: Path) -> None:
    for name in ("ranked", "ranked_test"):
        for row in read_rows(data / f"{name}.jsonl"):
            assert sorted((reply["score"], right(reply["text"], row["rules"])) for reply in row["responses"]) == [
                (0.0, False),
                (5.0, True),
            ], row


def test_replies_for_sft_are_right(data: Path) -> None:
    assert all(right(row["completion"], row["rules"]) for row in read_rows(data / "ift.jsonl"))


def test_each_fact_is_in_the_corpus_once(data: Path) -> None:
    texts = [row["text"] for row in read_rows(data / "corpus.jsonl")]
    assert len(set(texts)) == len(texts) > 400
    for row in read_rows(data / "round-1.jsonl"):
        assert any(right(text, row["rules"]) for text in texts)


def test_no_question_of_a_training_is_held_out(data: Path) -> None:
    prompts = {name: {row["prompt"] for row in read_rows(data / f"{name}.jsonl")} for name in (*TRAINED, *MEASURED)}
    for trained in TRAINED:
        for measured in MEASURED:
            assert not prompts[trained] & prompts[measured], (trained, measured)
    assert prompts["round-1"] == prompts["round-2"] and len(prompts["test"]) + len(prompts["valid"]) == len(
        prompts["round-1"]
    )
    assert not prompts["test"] & prompts["valid"]


def test_what_is_asked_in_other_words_has_the_same_answers(data: Path) -> None:
    asked = sorted(row["rules"][0] for row in read_rows(data / "round-1.jsonl"))
    assert asked == sorted(row["rules"][0] for name in ("test", "valid") for row in read_rows(data / f"{name}.jsonl"))


@pytest.mark.slow
def test_both_arms_run_to_m3(tmp_path: Path) -> None:
    m0 = tiny_model(tmp_path / "m0")
    made = [f"SRLM={' '.join(FORKED)}", f"PYTHON={sys.executable}", f"M0={m0}", f"OUT={tmp_path / 'out'}"]
    done = subprocess.run(
        ["make", "-C", EXAMPLE, "all", "never", *made],
        capture_output=True,
        text=True,
        env={**clean_env(), **BRIEF},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "What was learned" in done.stdout and "rules kept, control" in done.stdout
    for model in ("own/M0", "own/M1", "own/M2", "own/M3", "control/M2", "control/M3"):
        for name in ("eval-rules", "eval-rules-never"):
            rows = read_rows(tmp_path / "out" / model / f"{name}.jsonl")
            assert [row["n"] for row in rows if row["metric"] == "rules_kept" and "rule" not in row] == [16]
    shuffled = read_rows(tmp_path / "out" / "control" / "M1" / "pairs.jsonl")
    own = read_rows(tmp_path / "out" / "own" / "M1" / "pairs.jsonl")
    assert all("shuffled_labels" in row for row in shuffled) and not any("shuffled_labels" in row for row in own)
    assert {row["id"] for row in shuffled} == {row["id"] for row in own} and own
    judged = read_rows(tmp_path / "out" / "own" / "M1" / "judged.jsonl")
    assert all(len(row["evidence"]) == 1 for row in judged)
    model = json.loads((tmp_path / "out" / "control" / "M3" / "model" / "provenance.json").read_text())
    assert model["from"]["model"].endswith("control/M2/model")
