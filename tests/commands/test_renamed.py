"""Options that had another name: the old one works everywhere where the new one does, and says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from commands_table import ECHO, JUDGED, PROMPTS, RANKED, RESPONSES
from helpers import Result, Srlm, as_lines, write_rows
from srlm_cli.cli import command as build_command
from srlm_cli.options.renamed import RENAMED

OLD = [(command, old) for command, names in RENAMED.items() for old in names]
FLAGS = {"finish-score", "reparse"}
VALUES = {"part": "eval", "rejected-from": "earlier.jsonl", "agree-with": "earlier.jsonl", "eval-in": "earlier.jsonl"}
INPUT = {
    "make-eft": RANKED,
    "gen-prompts": PROMPTS,
    "sample": PROMPTS,
    "judge": [{**row, "judgements": ["Score: 3"], "judgement_finish_reasons": ["stop"]} for row in RESPONSES],
    "make-pairs": JUDGED,
}
OPTIONS = {
    "make-eft": (*ECHO, "--eval-share", "0.5"),
    "gen-prompts": (*ECHO, "--count", "2"),
    "sample": ECHO,
    "judge": ECHO,
    "make-pairs": (),
}


def value_of(old: str) -> str:
    return VALUES.get(old, "2")


def run(srlm: Srlm, command: str, *more: str, **env: str) -> Result:
    """Run a command of rows; one that trains stops where it finds no model."""
    write_rows(srlm.folder / "earlier.jsonl", JUDGED)
    stdin = as_lines(INPUT.get(command, []))
    return srlm(command, *OPTIONS.get(command, ()), *more, stdin=stdin, env=env)


def notes(result: Result) -> list[str]:
    return [line for line in result.err.splitlines() if " is now " in line]


@pytest.mark.parametrize(("command", "old"), OLD)
def test_an_old_name_on_the_command_line_is_the_new_one(srlm: Srlm, command: str, old: str) -> None:
    values = () if old in FLAGS else (value_of(old),)
    before = run(srlm, command, f"--{old}", *values)
    after = run(srlm, command, *(word for name in RENAMED[command][old] for word in (f"--{name}", *values)))
    assert before.code == after.code and before.out == after.out
    [note] = notes(before)
    assert note == f"srlm {command}: --{old} is now " + " or ".join(f"--{name}" for name in RENAMED[command][old])
    assert not notes(after)


@pytest.mark.parametrize(("command", "old"), OLD)
def test_an_old_name_in_srlm_toml_and_in_the_environment_is_the_new_one(srlm: Srlm, command: str, old: str) -> None:
    value = "true" if old in FLAGS else value_of(old)
    written = value if re.fullmatch(r"true|\d+", value) else f'"{value}"'
    listed = f"[{written}.0]" if old == "in-weight" else written
    results = []
    for names in ((old,), RENAMED[command][old]):
        lines = "".join(f"{name} = {listed}\n" for name in names)
        (srlm.folder / "srlm.toml").write_text(f"[{command}]\n{lines}")
        results.append(run(srlm, command))
    (srlm.folder / "srlm.toml").unlink()
    for names in ((old,), RENAMED[command][old]):
        variables = {f"SRLM_{command}_{name}".upper().replace("-", "_"): value for name in names}
        results.append(run(srlm, command, **variables))
    assert len({(result.code, result.out) for result in results}) == 1
    assert [len(notes(result)) for result in results] == [1, 0, 1, 0]
    assert f"srlm {command}: `{old}` in srlm.toml is now `{RENAMED[command][old][0]}`" in results[0].err
    assert f"srlm {command}: SRLM_" in results[2].err


def test_a_setting_by_both_names_is_refused(srlm: Srlm) -> None:
    (srlm.folder / "srlm.toml").write_text("[judge]\nsamples = 2\nnum-judgements = 3\n")
    result = run(srlm, "judge")
    assert result.code == 2 and "[judge] has `num-judgements` and `samples`, the old name" in result.err


def test_the_new_variable_goes_before_the_old_one_and_a_flag_before_both(srlm: Srlm) -> None:
    both = {"SRLM_SAMPLE_N": "1", "SRLM_SAMPLE_NUM_RESPONSES": "2"}
    result = run(srlm, "sample", **both)
    assert len(result.rows) == 2 * len(PROMPTS) and not notes(result)
    assert len(run(srlm, "sample", "--num-responses", "3", SRLM_SAMPLE_N="1").rows) == 3 * len(PROMPTS)


def test_a_name_given_twice_is_told_once(srlm: Srlm) -> None:
    assert len(notes(run(srlm, "sft", "--in-weight", "1", "--in-weight", "2"))) == 1


def test_the_way_back_of_a_flag_has_its_old_name_too(srlm: Srlm) -> None:
    (srlm.folder / "srlm.toml").write_text('[judge]\nforce-score = true\ntemplate = "own.toml"\n')
    (srlm.folder / "own.toml").write_text("text = '$prompt $response'\npattern = 'Score: (\\d)'\nhigh = 5\n")
    assert run(srlm, "judge").code == 2  # its template has no `finish`
    assert run(srlm, "judge", "--no-finish-score").code == 0


def test_settings_are_kept_by_the_new_name(srlm: Srlm) -> None:
    config = srlm.folder / "my.toml"
    stamps = []
    for name in ("samples", "num-judgements"):
        config.write_text(f"[judge]\n{name} = 2\n")
        lines = srlm("settings", "--config", "my.toml")
        stamps.append([row for row in lines.rows if row["command"] == "judge"])
    assert stamps[0] == stamps[1] and stamps[0][0]["num-judgements"] == 2 and "samples" not in stamps[0][0]


@pytest.mark.parametrize("command", RENAMED)
def test_help_and_pages_name_the_new_ones_only(command: str) -> None:
    shown = {name for option in build_command(command).params for name in option.opts}
    pages = "".join(path.read_text() for path in (Path(__file__).parents[1] / "docs").glob("*.md"))
    for old, new in RENAMED[command].items():
        assert f"--{old}" not in shown and {f"--{name}" for name in new} <= shown
        assert not re.search(rf"srlm {command} [^\n]*--{old}\b", pages)
