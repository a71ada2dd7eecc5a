"""What a run learned: the lines, the bars and the words follow the replies, and those of the control."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import Record, Srlm, write_rows
from srlm_cli.report import page
from srlm_cli.report.collect import Run, collect
from srlm_cli.report.learned import lines, sentences
from srlm_cli.report.terminal import bars

PROMPTS = 40


def replies(kept: int, text: str = "aa") -> list[Record]:
    """Replies to PROMPTS prompts under "no commas": the first `kept` keep it."""
    return [
        {
            "id": f"p{n}/0", "prompt_id": f"p{n}", "prompt": f"What of {n}?", "k": 0, "rules": ["no-commas"],
            "response": text if n < kept else f"{text[:-1]},", "finish_reason": "stop",
        }
        for n in range(PROMPTS)
    ]  # fmt: skip


def metric(name: str, value: float, spread: float = 0.05, task: str = "reward") -> Record:
    return {"task": task, "metric": name, "value": value, "n": 9, "ci_low": value - spread, "ci_high": value + spread}


def write_model(folder: Path, kept: int, text: str = "aa", judge: float = 0.75) -> None:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "provenance.json").write_text(json.dumps({"command": "dpo", "from": {"model": "m"}}))
    write_rows(folder / "eval-rule-responses.jsonl", replies(kept, text))
    rules = [metric("rules_kept", kept / PROMPTS, task="rules"), metric("length", float(len(text)), task="rules")]
    write_rows(folder / "eval-rules.jsonl", rules)
    of_length = [metric("longest_wins", 0.45), metric("shortest_wins", 0.55)]
    write_rows(folder / "eval-reward.jsonl", [metric("pairwise_accuracy", judge), *of_length])


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A run whose M2 keeps 30 of 40 rules, 12 more than M1."""
    for name, kept in (("M1", 18), ("M2", 30)):
        write_model(tmp_path / "own" / name, kept)
    return tmp_path / "own"


def control_of(own: Path, kept: int) -> Run:
    """A run that was trained from the same M1 on pairs dealt at random."""
    write_model(own.with_name("control") / "M2", kept)
    return collect(own.with_name("control"))


def in_words(own: Path, control: Run | None = None) -> str:
    return "\n".join(sentences(collect(own), control))


def test_a_gain_is_named_with_the_interval_of_the_change(own: Path) -> None:
    words = in_words(own)
    assert words.startswith("M2 keeps more rules than M1; the rules kept on held-out prompts: 45% to 75%, +30 points [")
    assert "control" not in words
    assert (
        "The judge of M2 orders 75% [70–80] of the held-out pairs, “longest wins” 45% and “shortest wins” 55%:" in words
    )
    assert "more than chance and length" in words and "×1.00 as long as those of M1" in words


def test_a_gain_counts_only_above_its_control(own: Path) -> None:
    flat = in_words(own, control_of(own, 18))
    assert "changed by 0 points [0 to 0]; M2 is above it by +30 points [" in flat
    assert "so the gain comes from the judgements" in flat


def test_a_gain_that_the_control_has_too_is_not_from_the_judgements(own: Path) -> None:
    assert "so no gain comes from the judgements" in in_words(own, control_of(own, 29))


def test_a_control_that_gains_more_is_named(own: Path) -> None:
    assert "M2 is below it, " in in_words(own, control_of(own, 40))


@pytest.mark.parametrize(
    ("kept", "begins"),
    [(19, "No change beyond chance from M1 to M3: nothing was learned"), (4, "M3 keeps fewer rules than M1")],
)
def test_what_was_not_learned_is_said(own: Path, kept: int, begins: str) -> None:
    write_model(own / "M3", kept)
    assert in_words(own).startswith(begins)


def test_a_judge_that_sees_length_only_is_named_and_so_is_a_changed_length(own: Path) -> None:
    write_model(own / "M3", 30, text="aaaa", judge=0.58)
    words = in_words(own)
    assert "58% [53–63] of the held-out pairs" in words and "no more than chance or length can" in words
    assert "×2.00 as long as those of M1 (4 and 2 characters), more than a fifth: read" in words


def test_the_lines_of_the_control_begin_at_the_same_m1(own: Path) -> None:
    made = lines(collect(own), control_of(own, 20))
    assert list(made) == ["rules kept", "rules kept, control", "judge, held-out pairs", "longest wins", "shortest wins"]
    assert [row and row["value"] for row in made["rules kept, control"]] == [0.45, 0.5]
    assert lines(Run("none", [], {}, []), None) == {}
    shown = bars(collect(own), collect(own.with_name("control")))
    assert shown[:2] == [f"rules kept            M1  {'█' * 18:<40}  45%", f"{'':<21} M2  {'█' * 30:<40}  75%"]
    assert shown[3].endswith(" 50%") and len(shown) == 10


def test_replies_that_are_not_those_measured_give_no_words(own: Path) -> None:
    write_rows(own / "M2" / "eval-rule-responses.jsonl", replies(20))
    assert in_words(own) == ""
    write_rows(own / "M2" / "eval-rule-responses.jsonl", [{**row, "rules": ["own:f"]} for row in replies(30)])
    assert in_words(own) == ""


def test_the_terminal_and_the_page_show_what_was_learned(srlm: Srlm, own: Path) -> None:
    control_of(own, 18)
    done = srlm("report", str(own), "--control", str(own.with_name("control")))
    assert done.code == 0 and done.out.rstrip().endswith("characters).")
    assert "What was learned" in done.out and "rules kept, control" in done.out
    html = (own / "report.html").read_text()
    assert 'aria-label="What was learned, by round"' in html and "so the gain comes from the judgements" in html
    assert "What was learned" not in page.render(collect(own.with_name("control")), 1, 0)


def test_a_control_that_is_no_run_is_refused(srlm: Srlm, own: Path, tmp_path: Path) -> None:
    done = srlm("report", str(own), "--control", str(tmp_path / "none"))
    assert done.code == 2 and "is not a run folder" in done.err
