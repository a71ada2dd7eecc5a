"""examples/mt_bench: questions of two turns answered, rated and shown by category and turn."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import FORKED, ROOT, SHARED, clean_env, read_rows, write_rows
from tiny import tiny_model

EXAMPLE = ROOT / "examples" / "mt_bench"
QUESTIONS = SHARED / "eval_prompts" / "mt_bench.jsonl"
MADE_UP = [
    {"question_id": 1, "category": "math", "turns": ["What is 1 + 1?", "And times 3?"], "reference": ["2", "6"]},
    {"question_id": 2, "category": "writing", "turns": ["Write a line.", "Shorter."]},
]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("mt_bench", EXAMPLE / "mt_bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rated(name: str, category: str, *scores: float | None) -> list[dict]:
    return [
        {"prompt_id": f"{name}/turn-{turn}", "turn": turn, "category": category, "score": score}
        for turn, score in enumerate(scores, 1)
    ]


def test_the_table_has_the_means_by_category_and_turn(example) -> None:
    rows = [
        *rated("1", "math", 4, 2), *rated("2", "math", 2, None), *rated("3", "coding", 1, 1),
        *rated("4", "writing", 9, 8), *rated("5", "stem", 10, 7),
    ]  # fmt: skip
    lines = example.table(rows).split("\n")
    cells = {row[1]: row[2:] for line in lines[2:] if len(row := [cell.strip() for cell in line.split("|")]) > 2}
    assert lines[0].split(" | ")[1:3] == ["turn 1", "turn 2"]
    assert cells["math"][:2] == ["3.00", "2.00"] and cells["math"][2].startswith("2.67 (")  # (4 + 2 + 2) / 3
    assert cells["coding"] == ["1.00", "1.00", "1.00", "1", ""]
    assert cells["Math, Code & Reasoning"][:2] == ["2.33", "1.50"]
    assert cells["Humanities, Extraction, STEM, Roleplay & Writing"][2].startswith("8.50 (8.50 to 8.50)")
    assert cells["all"][0] == "5.20" and cells["all"][3] == "5" and "10 answers, 1 without a rating." in lines[-1]


@pytest.mark.parametrize("name", ["file", "hub"])
def test_questions_of_the_file_and_of_the_hub_are_the_same(example, tmp_path: Path, name: str) -> None:
    hub = [
        {"prompt": row["turns"], "prompt_id": row["question_id"], "category": row["category"],
         "reference": row.get("reference", [])}
        for row in MADE_UP
    ]  # fmt: skip
    file = write_rows(tmp_path / "q.jsonl", MADE_UP if name == "file" else hub)
    assert list(example.questions(str(file))) == [
        {"id": "1", "turns": MADE_UP[0]["turns"], "category": "math", "reference": ["2", "6"]},
        {"id": "2", "turns": MADE_UP[1]["turns"], "category": "writing"},
    ]
    with pytest.raises(SystemExit, match="expected `turns` and `category`"):
        list(example.questions(str(write_rows(tmp_path / "x.jsonl", [{"turns": "a"}]))))


@pytest.mark.parametrize("key", ["question_id", "prompt_id", "id"])
def test_an_id_of_zero_is_kept(example, tmp_path: Path, key: str) -> None:
    file = write_rows(tmp_path / "q.jsonl", [{key: 0, "turns": ["a", "b"], "category": "math"}])
    assert [row["id"] for row in example.questions(str(file))] == ["0"]


@pytest.mark.command
def test_files_are_made_again_when_a_variable_changes(tmp_path: Path) -> None:
    questions = write_rows(tmp_path / "q.jsonl", MADE_UP)
    fixed = [
        f"SRLM={' '.join(FORKED)}",
        f"PYTHON={sys.executable}",
        f"OUT={tmp_path / 'out'}",
        f"QUESTIONS={questions}",
    ]

    def judges(**given: str) -> list[str]:
        made = {"ANSWERS": "--engine echo", "JUDGE": "--engine echo --model constant:4", **given}
        argv = ["make", "-C", EXAMPLE, *fixed, *(f"{name}={value}" for name, value in made.items())]
        done = subprocess.run(argv, capture_output=True, text=True, env=clean_env(), check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return [row["judge"]["model"] for row in read_rows(tmp_path / "out" / "judged.jsonl")]

    assert judges(LIMIT="1") == ["echo:constant:4"] * 2 and judges() == ["echo:constant:4"] * 4
    assert judges(JUDGE="--engine echo --model 'constant:2'") == ["echo:constant:2"] * 4
    before = (tmp_path / "out" / "responses.jsonl").read_bytes()
    judges(JUDGE="--engine echo --model 'constant:2'")
    assert before == (tmp_path / "out" / "responses.jsonl").read_bytes()
    judges(ANSWERS="--engine echo --model random")
    assert before != (tmp_path / "out" / "responses.jsonl").read_bytes()


@pytest.mark.skipif(not QUESTIONS.is_file(), reason="the shared questions are not here")
def test_all_questions_are_read(example) -> None:
    rows = list(example.questions(str(QUESTIONS)))
    assert len(rows) == 80 and {len(row["turns"]) for row in rows} == {2} and len({row["id"] for row in rows}) == 80
    assert {row["category"] for row in rows} == {name for names in example.GROUPS.values() for name in names}


@pytest.mark.slow
def test_one_command_answers_rates_and_shows(tmp_path: Path) -> None:
    questions = write_rows(tmp_path / "q.jsonl", MADE_UP)
    made = [f"SRLM={' '.join(FORKED)}", f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}", f"QUESTIONS={questions}"]
    made += [f"MODEL={tiny_model(tmp_path / 'm')}", "JUDGE=--engine echo --model constant:4", "LIMIT=2"]
    brief = {"SRLM_SAMPLE_MAX_NEW_TOKENS": "8"}
    done = subprocess.run(
        ["make", "-C", EXAMPLE, *made], capture_output=True, text=True, env={**clean_env(), **brief}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    judged = read_rows(tmp_path / "out" / "judged.jsonl")
    assert [row["id"] for row in judged] == ["1/turn-1/0", "1/turn-2/0", "2/turn-1/0", "2/turn-2/0"]
    assert [row["prompt"][-1]["content"] if row["turn"] > 1 else row["prompt"] for row in judged] == [
        turn for row in MADE_UP for turn in row["turns"]
    ]
    assert "4 answers, " in done.stdout and "| all |" in done.stdout
