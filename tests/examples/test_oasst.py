"""examples/oasst: Open Assistant's message trees as seed data."""

from __future__ import annotations

import json
import subprocess
import sys

from helpers import ROOT, write_rows

BUILD = ROOT / "examples" / "oasst" / "build.py"


def message(id: str, parent: str | None, text: str, rank: int | None = None, **more) -> dict:
    role = "prompter" if parent is None else "assistant"
    return {
        "message_id": id, "parent_id": parent, "text": text, "role": role, "lang": "en",
        "rank": rank, "deleted": False, "review_result": True, **more,
    }  # fmt: skip


def tree(n: int) -> list[dict]:
    return [
        message(f"p{n}", None, f"Question {n}?"),
        message(f"p{n}-b", f"p{n}", "second", 1),
        message(f"p{n}-a", f"p{n}", "best", 0),
        message(f"p{n}-x", f"p{n}", "no rank"),
        message(f"p{n}-d", f"p{n}", "deleted", 2, deleted=True),
        message(f"p{n}-r", f"p{n}", "failed review", 3, review_result=False),
        message(f"p{n}-c", f"p{n}-a", "a later turn", 0),
    ]


def test_trees_become_seed_rows_and_ranked_prompts_without_overlap(tmp_path):
    trees = [row for n in range(20) for row in tree(n)]
    trees += [message("g", None, "Frage?", lang="de"), message("g-a", "g", "Antwort", 0, lang="de")]
    trees += [message("one", None, "Only one?"), message("one-a", "one", "the one", 0)]
    trees += [message("lone", None, "Nobody answered?")]
    source = write_rows(tmp_path / "trees.jsonl", trees)
    command = [sys.executable, str(BUILD), "--dataset", str(source), "--out", str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {
        name: [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("ift", "ranked", "ranked_eval")
    }
    ranked = made["ranked"] + made["ranked_eval"]
    assert sorted(row["id"] for row in ranked) == sorted(f"p{n}" for n in range(20))
    assert all(
        row["responses"] == [{"text": "best", "rank": 0}, {"text": "second", "rank": 1}] for row in ranked
    )  # best first; unranked, deleted, failed and later turns are not replies to the prompt
    assert 1 <= len(made["ranked_eval"]) <= 10
    held = {row["prompt"] for row in made["ranked_eval"]}
    assert {row["prompt"] for row in made["ift"]} == {row["prompt"] for row in made["ranked"]} | {"Only one?"}
    assert not held & {row["prompt"] for row in made["ift"]}
    assert {row["completion"] for row in made["ift"]} == {"best", "the one"}


def test_a_prompt_that_is_measured_on_is_no_seed_row_under_another_id(tmp_path):
    twice = [row for n in range(20) for row in tree(n)]
    twice += [message(f"q{n}", None, f"question  {n}?") for n in range(20)]
    twice += [message(f"q{n}-a", f"q{n}", "once more", 0) for n in range(20)]
    source = write_rows(tmp_path / "trees.jsonl", twice)
    subprocess.run([sys.executable, str(BUILD), "--dataset", str(source), "--out", str(tmp_path)], check=True)
    held = {json.loads(line)["prompt"] for line in (tmp_path / "ranked_eval.jsonl").read_text().splitlines()}
    seeds = {json.loads(line)["prompt"].replace("  ", " ").capitalize() for line in (tmp_path / "ift.jsonl").open()}
    assert held and not held & seeds
