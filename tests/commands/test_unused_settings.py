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
    notes = [line for line in done.err.splitlines() if "does not use them: " in line]
    assert len(notes) == 1 and set(notes[0].partition("them: ")[2].split(", ")) == set(names), done.err
    plain = srlm(*mode, "--config", "/dev/null", stdin=as_lines(RESPONSES))
    assert (done.code, done.out) == (plain.code, plain.out)
    assert done.code == (2 if mode == REWARD else 0), done.err
    assert mode != REWARD or NO_MODEL in done.err
    assert "does not use" not in srlm(*mode, "--quiet", stdin=as_lines(RESPONSES)).err


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
    said = srlm(*REWARD, stdin=as_lines(RESPONSES), env={"SRLM_JUDGE_SCORE": "expected"}).err
    assert "settings in srlm.toml and the environment are ignored, because --engine reward does not use them: " in said
    configured(srlm, 'engine = "reward"')
    both = srlm("judge", "--model", "m", stdin=as_lines(RESPONSES), env=settings)
    assert both.code == 2 and "not with --force-score" in both.err


def test_a_setting_that_a_mode_uses_stays(srlm: Srlm) -> None:
    configured(srlm, 'rule = "words:..1"\nnum-judgements = 1')
    done = srlm(*ECHO, "--by", "pairwise", stdin=as_lines(RESPONSES))
    assert done.code == 0 and "score_rules" in done.rows[0] and "does not use" not in done.err


def test_pairs_of_judgements_set_pools_of_responses_aside(srlm: Srlm) -> None:
    configured(srlm, 'cut-off = "drop"\nrejected-pool = "none.jsonl"', "make-pairs")
    done = srlm("make-pairs", "--of", "judgements", "--in", "none.jsonl")
    assert "srlm.toml are ignored, because --of judgements does not use them: rejected-pool, cut-off" in done.err
    typed = srlm("make-pairs", "--of", "judgements", "--cut-off", "drop", "--in", "none.jsonl")
    assert typed.code == 2 and "--of judgements cannot be used with" in typed.err


EFT = ["make-eft", "--in", "none.jsonl"]
DPO = ["dpo", "--in", "none.jsonl", "--model", "m", "--out", "new"]


@pytest.mark.parametrize(
    ("argv", "typed", "needed"),
    [
        (ECHO, ["--evidence-passages", "5"], "--evidence or --evidence-cmd"),
        (ECHO, ["--evidence-query", "both"], "--evidence or --evidence-cmd"),
        (ECHO, ["--meta-replies", "9"], "--meta"),
        (ECHO, ["--meta-template", "own.toml"], "--meta"),
        (ECHO, ["--direct"], "--meta or --by pairwise"),
        (ECHO, ["--min-score-mass", "0.9"], "--score expected"),
        ([*ECHO, "--by", "pairwise"], ["--evidence-passages", "5"], "--evidence or --evidence-cmd"),
        ([*ECHO, "--by", "group"], ["--meta-replies", "2"], "--meta"),
        (EFT, ["--evidence-passages", "5"], "--evidence or --evidence-cmd"),
        (EFT, ["--rows-per-reply", "2"], "--method hindsight"),
        (EFT, ["--reason", "none"], "--method hindsight"),
        (EFT, ["--scale", "linear"], "--method hindsight"),
        ([*EFT, "--method", "hindsight"], ["--ties"], "--method accept"),
        ([*EFT, "--method", "hindsight"], ["--num-judgements", "2"], "--method accept"),
        ([*EFT, "--method", "hindsight"], ["--force-score"], "--method accept"),
        ([*EFT, "--method", "hindsight"], ["--score-high", "5"], "--method hindsight --scale linear"),
        (["eval", "judges", "--kinds", "text,group"], ["--min-score-mass", "0.1"], "--kinds expected"),
        (["eval", "judges", "--kinds", "group"], ["--force-score"], "--kinds text"),
        (DPO, ["--gamma", "2"], "--loss simpo"),
        (DPO, ["--rdpo-alpha", "3"], "--loss r-dpo"),
        ([*DPO, "--loss", "sigmoid", "--loss", "simpo"], ["--positive-lambda", "9"], "--loss dpo-positive"),
        ([*DPO, "--loss", "simpo"], ["--ref", "base"], "a --loss with a reference"),
        (DPO, ["--merge"], "--lora-r, or an adapter as --model"),
        (DPO, ["--lora-alpha", "8"], "--lora-r"),
        (["sft", *DPO[1:]], ["--merge"], "--lora-r, or an adapter as --model"),
        (["kto", *DPO[1:]], ["--lora-alpha", "8"], "--lora-r"),
    ],
)
def test_a_typed_option_without_effect_is_refused(srlm: Srlm, argv: list, typed: list, needed: str) -> None:
    done = srlm(*argv, *typed, stdin=as_lines(RESPONSES))
    assert done.code == 2 and f"{typed[0]} has no effect here (it needs {needed})" in done.err, done.err
    assert len(done.err.splitlines()) == 1 and not done.out
    assert "no effect" not in srlm(*argv, stdin=as_lines(RESPONSES)).err


def test_a_setting_without_effect_is_set_aside(srlm: Srlm) -> None:
    configured(srlm, "meta-replies = 9\nmin-score-mass = 0.9\nevidence-passages = 5")
    done = srlm(*ECHO, "--no-direct", stdin=as_lines(RESPONSES))
    [note] = [line for line in done.err.splitlines() if "does not use" in line]
    assert {"meta-replies", "min-score-mass", "evidence-passages"} == set(note.partition("them: ")[2].split(", "))
    plain = srlm(*ECHO, "--config", "/dev/null", stdin=as_lines(RESPONSES))
    assert done.code == 0 and done.out == plain.out


def test_an_option_stays_where_it_has_an_effect(srlm: Srlm) -> None:
    for more in (["--score", "expected", "--template", "score_only", "--min-score-mass", "0.1"],
                 ["--by", "pairwise", "--direct"]):  # fmt: skip
        assert "no effect" not in srlm(*ECHO, *more, stdin=as_lines(RESPONSES)).err
    losses = ["--loss", "simpo", "--gamma", "2", "--loss", "r-dpo", "--rdpo-alpha", "1", "--ref", "base"]
    assert "no effect" not in srlm(*DPO, *losses, "--lora-r", "2", "--lora-alpha", "4", "--merge").err
    adapter = srlm.folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for model in ("adapter", "owner/name"):  # a hub id can be an adapter
        done = srlm("dpo", "--in", "none.jsonl", "--model", model, "--out", "new", "--merge")
        assert done.code != 0 and "no effect" not in done.err
