"""Settings in srlm.toml that a mode of a command has no use for are set aside; typed options are refused."""

from __future__ import annotations

import pytest

from commands_table import RESPONSES
from helpers import Srlm, as_lines

ECHO = ["judge", "--engine", "echo"]
REWARD = ["judge", "--engine", "reward"]
NO_MODEL = "no model given: a scorer has to be named"


def configured(srlm: Srlm, text: str, command: str = "judge") -> None:
    (srlm.folder / "srlm.toml").write_text(f"[{command}]\n{text}\n")


@pytest.mark.parametrize(
    ("setting", "mode"),
    [
        ('template = "score_only"', REWARD),
        ("force-score = true", REWARD),
        ('score = "expected"', REWARD),
        ('num-judgements = "2:9"\nsettle = 0.8', REWARD),
        ('by = "group"', REWARD),
        ('rule = "no-commas"', REWARD),
        ('conversation = "last"', REWARD),
        ("ref = 'base'\nbeta = 0.2", REWARD),
        ('evidence = "none.db"', [*ECHO, "--by", "pairwise"]),
        ('num-judgements = "2:9"', [*ECHO, "--by", "group"]),
        ("comparisons = 2\ndirect = true", [*ECHO, "--by", "group"]),
        ('combine = "mean"\nby = "pairwise"', [*ECHO, "--model", "rules", "--rule", "no-commas"]),
        ("beta = 0.2\nsettle = 0.8\ncomparisons = 2", ECHO),
        ("settle = 0.8", [*ECHO, "-k", "2"]),
    ],
)
def test_a_setting_is_set_aside_by_a_mode_on_the_command_line(srlm: Srlm, setting: str, mode: list[str]) -> None:
    """As without the setting, with one line that names it."""
    configured(srlm, setting)
    done = srlm(*mode, stdin=as_lines(RESPONSES))
    names = [line.partition(" = ")[0] for line in setting.splitlines()]
    notes = [line for line in done.err.splitlines() if "has no use for: " in line]
    assert len(notes) == 1 and set(notes[0].partition("for: ")[2].split(", ")) == set(names), done.err
    plain = srlm(*mode, "--config", "/dev/null", stdin=as_lines(RESPONSES))
    assert (done.code, done.out) == (plain.code, plain.out)
    assert done.code == (2 if mode == REWARD else 0), done.err
    assert mode != REWARD or NO_MODEL in done.err
    assert "no use for" not in srlm(*mode, "--quiet", stdin=as_lines(RESPONSES)).err


@pytest.mark.parametrize(
    "typed",
    [
        ["--template", "score_only"],
        ["--score", "expected"],
        ["-k", "2"],
        ["--min-score-mass", "0.1"],
        ["--evidence-passages", "2"],
    ],
)
def test_a_scorer_refuses_what_is_typed(srlm: Srlm, typed: list[str]) -> None:
    done = srlm(*REWARD, "--model", "m", *typed, stdin=as_lines(RESPONSES))
    name = {"-k": "--num-judgements"}.get(typed[0], typed[0])
    assert done.code == 2 and f"without words: not with {name}" in done.err


def test_the_environment_is_weaker_than_the_command_line_and_stronger_than_the_file(srlm: Srlm) -> None:
    settings = {"SRLM_JUDGE_FORCE_SCORE": "1"}
    assert NO_MODEL in srlm(*REWARD, stdin=as_lines(RESPONSES), env=settings).err
    configured(srlm, "force-score = true")
    assert NO_MODEL in srlm("judge", stdin=as_lines(RESPONSES), env={"SRLM_ENGINE": "reward"}).err
    configured(srlm, 'engine = "reward"')
    both = srlm("judge", "--model", "m", stdin=as_lines(RESPONSES), env=settings)
    assert both.code == 2 and "not with --force-score" in both.err


def test_a_setting_that_a_mode_uses_stays(srlm: Srlm) -> None:
    configured(srlm, 'rule = "words:..1"\nnum-judgements = 1')
    done = srlm(*ECHO, "--by", "pairwise", stdin=as_lines(RESPONSES))
    assert done.code == 0 and "score_rules" in done.rows[0] and "has no use for" not in done.err


def test_pairs_of_judgements_set_pools_of_responses_aside(srlm: Srlm) -> None:
    configured(srlm, 'cut-off = "drop"\nrejected-pool = "none.jsonl"', "make-pairs")
    done = srlm("make-pairs", "--of", "judgements", "--in", "none.jsonl")
    assert "make-pairs: settings that --of judgements has no use for: rejected-pool, cut-off" in done.err
    typed = srlm("make-pairs", "--of", "judgements", "--cut-off", "drop", "--in", "none.jsonl")
    assert typed.code == 2 and "--of judgements cannot be used with" in typed.err
