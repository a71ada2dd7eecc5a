"""examples/facts: its data are what they say, and both arms run to M3 with a tiny model."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from both_arms import MODELS, keeps, rules_kept, run_to_m3
from helpers import ROOT, clean_env, read_rows, write_rows

EXAMPLE = ROOT / "examples" / "facts"
TRAINED = ("ift", "ranked", "round-1", "round-2", "round-3")
MEASURED = ("test", "valid", "never", "ranked_test")
PAIRS = {"SRLM_MAKE_PAIRS_MIN_GAP": "0", "SRLM_MAKE_PAIRS_MIN_CHOSEN_SCORE": "0"}


def test_a_mean_over_seeds_has_an_interval_if_all_have_one() -> None:
    mean = runpy.run_path(str(ROOT / "examples" / "over_seeds.py"))["mean"]
    assert mean([(0.5, 0.4, 0.6), (0.7, 0.6, 0.8)]) == pytest.approx((0.6, 0.6 - 0.1 / 2**0.5, 0.6 + 0.1 / 2**0.5))
    assert mean([(0.5, 0.4, 0.6), (0.7, None, None)]) == (0.6, None, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("facts")
    build = [sys.executable, EXAMPLE / "build.py", "--out", folder, "--seed", "3"]
    subprocess.run(build, check=True, env=clean_env())
    return folder


def test_scores_are_those_of_the_facts(data: Path) -> None:
    for name in ("ranked", "ranked_test"):
        for row in read_rows(data / f"{name}.jsonl"):
            assert sorted((reply["score"], keeps(reply["text"], row["rules"])) for reply in row["responses"]) == [
                (0.0, False),
                (5.0, True),
            ], row


def test_replies_for_sft_are_right(data: Path) -> None:
    assert all(keeps(row["completion"], row["rules"]) for row in read_rows(data / "ift.jsonl"))


def test_each_fact_is_in_the_corpus_once(data: Path) -> None:
    texts = [row["text"] for row in read_rows(data / "corpus.jsonl")]
    assert len(set(texts)) == len(texts) > 400
    for row in read_rows(data / "round-1.jsonl"):
        assert any(keeps(text, row["rules"]) for text in texts)


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


def test_what_m3_knows_is_counted_by_what_m1_knew(tmp_path: Path) -> None:
    said = {
        "own/M1": ("no no", "no yes", "yes yes"),
        "own/M3": ("no yes", "yes yes", "yes yes"),
        "control/M3": ("no no",) * 3,
    }
    for model, replies in said.items():
        rows = [
            {"prompt_id": str(at), "prompt": "?", "response": text, "rules": ["include:yes"]}
            for at, texts in enumerate(replies)
            for text in texts.split()
        ]
        (tmp_path / model).mkdir(parents=True)
        write_rows(tmp_path / model / "never.jsonl", rows)
    argv = [sys.executable, EXAMPLE / "unknown.py", tmp_path, "--file", "never.jsonl"]
    told = subprocess.run(argv, capture_output=True, text=True, env=clean_env(), check=True).stdout.splitlines()
    assert told[2:] == [
        "| none | 1 | 0% | 50% | 0% |",
        "| some, up to half | 1 | 50% | 100% | 0% |",
        "| more than half | 1 | 100% | 100% | 0% |",
    ]


@pytest.mark.slow
def test_both_arms_run_to_m3(tmp_path: Path) -> None:
    out = run_to_m3(EXAMPLE, tmp_path, ("all", "never"), PAIRS)
    assert all(rules_kept(out / model / "eval-rules-never.jsonl") == [16] for model in MODELS)
    assert all(len(row["evidence"]) == 1 for row in read_rows(out / "own" / "M1" / "judged.jsonl"))
    models = [str(out / "own" / model) for model in ("M1", "M2")]
    told = subprocess.run(
        [sys.executable, EXAMPLE / "own_replies.py", *models],
        capture_output=True,
        text=True,
        env=clean_env(),
        check=True,
    )
    for model, line in zip(models, told.stdout.splitlines(), strict=True):
        assert line.startswith(model) and f" {len(read_rows(Path(model) / 'pairs.jsonl'))} pairs" in line


def test_the_demo_runs_this_example() -> None:
    argv = ["make", "-n", "demo", "NAME=x", "ITER=2"]
    shown = subprocess.run(argv, cwd=ROOT, env=clean_env(), text=True, capture_output=True, check=True).stdout
    commands = shown.splitlines()
    trained = [line.split(" --out ")[1] for line in commands if " sft " in line or " dpo " in line]
    assert trained == [f"{ROOT}/runs/x/{model}/model" for model in ("own/M1", "own/M2", "control/M2")]
    [report] = [line for line in commands if " report " in line]
    assert report.endswith(f" report {ROOT}/runs/x/own --control {ROOT}/runs/x/control --config srlm.toml")
