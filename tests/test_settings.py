"""srlm.toml: sections, spellings, what is refused, and the stamps that Make compares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands_table import PAGES
from helpers import Srlm, write_rows
from srlm_cli import settings
from srlm_cli.errors import OptionError

COMMANDS = ["sample", "judge", "make-pairs", "eval reward"]
OPTIONS = {"n": "n", "seed": "seed", "in": "in_", "top-p": "top_p"}
SHARED = {"seed", "limit", "top-p"}


def of(tmp_path: Path, text: str, command: str = "sample") -> dict:
    """Return what a settings file of this text says of a command."""
    path = tmp_path / "srlm.toml"
    path.write_text(text, encoding="utf-8")
    return settings.of_command(str(path), command, OPTIONS, COMMANDS, SHARED)


def test_a_section_comes_before_the_defaults(tmp_path: Path) -> None:
    assert of(tmp_path, "[defaults]\nseed = 1\ntop-p = 0.5\n[sample]\nseed = 2\n") == {"seed": 2, "top_p": 0.5}


def test_defaults_that_a_command_does_not_have_are_left_out(tmp_path: Path) -> None:
    assert of(tmp_path, "[defaults]\nlimit = 1\n") == {}


def test_keys_become_parameter_names_in_both_spellings(tmp_path: Path) -> None:
    assert of(tmp_path, '[sample]\nin = "x"\ntop_p = 1\n') == {"in_": "x", "top_p": 1}


def test_sections_of_other_commands_do_not_count(tmp_path: Path) -> None:
    assert of(tmp_path, '[judge]\nseed = 1\n["eval reward"]\nseed = 2\n') == {}
    assert of(tmp_path, '["eval reward"]\nseed = 2\n', "eval reward") == {"seed": 2}


def test_no_file_has_no_settings() -> None:
    assert settings.of_command("", "sample", OPTIONS, COMMANDS, SHARED) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[sample]\nsede = 1\n", "did you mean `seed`?"),
        ("[sample]\nxyzzy = 1\n", "no option `xyzzy`"),
        ("[defaults]\nn = 1\n", "[defaults] has no option `n`"),
        ("[sampel]\nn = 1\n", "did you mean `sample`?"),
        ("n = 1\n", "is outside a section"),
        ("[sample\n", "not TOML"),
        ("[sample]\nn = 1\nn = 2\n", "not TOML"),
        ("[sample]\ntop-p = 1\ntop_p = 0.5\n", "top-p"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        of(tmp_path, text)
    assert words in str(caught.value) and "srlm.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("temperature = true", "`temperature` cannot be true or false, got True"),
        ("num-responses = false", "`num-responses` cannot be true or false"),
        ("stop = true", "`stop` cannot be true or false"),
        ('system = ["a"]', "`system` cannot be a list, got ['a']"),
        ("model = {a = 1}", "`model-name-or-path` cannot be a table"),
    ],
)
def test_a_setting_that_would_become_another_value_is_refused(srlm: Srlm, setting: str, said: str) -> None:
    (srlm.folder / "srlm.toml").write_text(f"[sample]\n{setting}\n")
    for argv in (("sample", "--engine", "echo"), ("settings",)):
        result = srlm(*argv, stdin="")
        assert result.code == 2 and f"srlm.toml: {said}" in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[sample]\nnum-responses = 'a'\n", "`num-responses` in [sample]: Input should be a valid integer"),
        ("[sample]\nn = 0\n", "`n` in [sample]: Input should be greater than or equal to 1"),
        ("[defaults]\nseed = 'a'\n[sample]\nn = 1\n", "`seed` in [defaults]: Input should be a valid integer"),
        ("[sample]\ntemperature = inf\n", "`temperature` in [sample]: inf is not a finite number"),
        ("[sample]\nengine = 'x'\n", "`engine` in [sample]: 'x' is not one of"),
    ],
)
def test_a_wrong_value_is_reported_with_its_place_in_the_file(srlm: Srlm, text: str, place: str) -> None:
    (srlm.folder / "my.toml").write_text(text)
    for argv in (["sample"], ["settings"]):
        result = srlm(*argv, "--config", "my.toml")
        assert result.code == 2 and f": error: my.toml: {place}" in result.err and "Invalid" not in result.err, result
    typed = srlm("sample", "--num-responses", "b")
    assert "Invalid value for '--num-responses'" in typed.err


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SRLM_SAMPLE_NUM_RESPONSES", "a", "SRLM_SAMPLE_NUM_RESPONSES: Input should be a valid integer"),
        ("SRLM_SAMPLE_N", "0", "SRLM_SAMPLE_NUM_RESPONSES: Input should be greater than or equal to 1"),
        ("SRLM_SAMPLE_SEED", "a", "SRLM_SAMPLE_SEED: Input should be a valid integer"),
        ("SRLM_SEED", "a", "SRLM_SEED: Input should be a valid integer"),
        ("SRLM_SAMPLE_TEMPERATURE", "inf", "SRLM_SAMPLE_TEMPERATURE: inf is not a finite number"),
        ("SRLM_ENGINE", "x", "SRLM_ENGINE: 'x' is not one of"),
    ],
)
def test_a_wrong_value_of_the_environment_is_reported_with_its_variable(
    srlm: Srlm, variable: str, value: str, said: str
) -> None:
    (srlm.folder / "my.toml").write_text("[sample]\nnum-responses = 2\nseed = 3\n")
    for argv in (["sample"], ["settings"]):
        result = srlm(*argv, "--config", "my.toml", env={variable: value})
        assert result.code == 2 and f": error: {said}" in result.err and "Invalid" not in result.err, result


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ('num-judgements = "x"', "my.toml: `num-judgements` in [judge]: expected a number from 1 to"),
        ('template = "nothere.toml"', "nothere.toml"),
    ],
)
def test_settings_of_a_judge_that_meta_cannot_read_are_named(srlm: Srlm, judge: str, said: str) -> None:
    (srlm.folder / "my.toml").write_text(f"[judge]\n{judge}\n")
    done = srlm("settings", "--config", "my.toml", "--meta")
    assert done.code == 2 and said in done.err and not done.out, done


def test_settings_with_a_byte_order_mark_and_windows_line_ends_are_read(srlm: Srlm) -> None:
    (srlm.folder / "srlm.toml").write_bytes(b"\xef\xbb\xbf[sample]\r\nnum-responses = 2\r\nsystem = 5\r\n")
    rows = srlm("sample", "--engine", "echo", stdin='{"prompt": "a"}\n').rows
    assert len(rows) == 2 and rows[0]["prompt"][0] == {"role": "system", "content": "5"}
    (srlm.folder / "own.toml").write_bytes(b"\xef\xbb\xbfextends = 'additive'\r\n")
    judged = srlm("judge", "--engine", "echo", "--template", "own.toml", stdin='{"prompt": "a", "response": "b"}\n')
    assert judged.code == 0 and judged.rows[0]["judge"]["template"] == "own"


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "srlm.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match="not TOML"):
        settings.load(str(tmp_path / "srlm.toml"))


# --- srlm settings ---------------------------------------------------------------------------


def lines_of(srlm: Srlm, *args: str, **env: str) -> dict[str, dict]:
    result = srlm("settings", *args, env=env)
    assert result.code == 0, result.err
    return {row.pop("command"): row for row in result.rows}


def test_settings_prints_the_options_of_each_command(srlm: Srlm) -> None:
    (srlm.folder / "my.toml").write_text("[defaults]\nseed = 3\nbatch-size = 8\n[sample]\nnum-responses = 2\n")
    lines = lines_of(srlm, "--config", "my.toml", SRLM_JUDGE_NUM_JUDGEMENTS="5")
    assert set(lines) == set(PAGES) - {"init", "doctor", "report", "settings"} or set(lines) >= {
        "sample",
        "eval reward",
    }
    assert lines["sample"]["num-responses"] in (2, "2") and lines["sample"]["seed"] == 3
    assert str(lines["judge"]["num-judgements"]) == "5"
    assert "batch-size" not in lines["sample"] and "in" not in lines["sample"]


def test_every_section_is_checked(srlm: Srlm) -> None:
    (srlm.folder / "my.toml").write_text("[dpo]\nbetta = 3\n")
    result = srlm("settings", "--config", "my.toml")
    assert result.code == 2 and "did you mean `beta`" in result.err


def test_stamps_are_touched_only_when_their_settings_change(srlm: Srlm) -> None:
    config = srlm.folder / "my.toml"
    config.write_text("[sample]\nnum-responses = 2\n")
    argv = ["settings", "--config", "my.toml", "--stamps", "stamps"]
    assert srlm(*argv).code == 0
    stamps = srlm.folder / "stamps"
    before = {path.name: path.stat().st_mtime_ns for path in stamps.iterdir()}
    assert {"sample.json", "eval-head-to-head.json", "dpo.json"} <= set(before)
    config.write_text("[sample]\nnum-responses = 3\n[defaults]\nbatch-size = 1\n")
    assert srlm(*argv).code == 0
    touched = {path.name for path in stamps.iterdir() if path.stat().st_mtime_ns != before[path.name]}
    assert touched == {"sample.json"}
    assert json.loads((stamps / "sample.json").read_text())["num-responses"] == 3


def test_an_option_that_can_be_given_several_times_takes_a_text_or_a_list(srlm: Srlm) -> None:
    write_rows(srlm.folder / "ift.jsonl", [{"prompt": "Why?"}])
    for value in ('"ift.jsonl"', '["ift.jsonl"]'):
        (srlm.folder / "srlm.toml").write_text(f"[gen-prompts]\navoid = {value}\ncount = 0\n")
        assert srlm("gen-prompts", "--engine", "echo", stdin='{"prompt": "Why not?"}\n').code == 0


def test_the_text_of_a_template_is_part_of_its_stamp(srlm: Srlm) -> None:
    stamps = []
    for text in ("one", "two"):
        for name in ("own", "meta"):
            (srlm.folder / f"{name}.toml").write_text(f"text = '{text} of {name}'")
        (srlm.folder / "my.toml").write_text('[judge]\ntemplate = "own.toml"\nmeta-template = "meta.toml"\n')
        lines = srlm("settings", "--config", "my.toml").rows
        stamps.append(next(line for line in lines if line["command"] == "judge"))
    for key in ("template-hash", "meta-template-hash"):
        assert stamps[0][key] != stamps[1][key]


def test_one_value_can_be_asked_for(srlm: Srlm) -> None:
    (srlm.folder / "srlm.toml").write_text('["eval rules"]\nprompts = "ruled.jsonl"\n[judge]\nrule = ["no-commas"]\n')
    assert srlm("settings", "--get", "eval rules.prompts").out == "ruled.jsonl\n"
    assert srlm("settings", "--get", "judge.rule").out == '["no-commas"]\n'
    assert srlm("settings", "--get", "eval rules.max-fall").out == ""
    unknown = srlm("settings", "--get", "judge.rules")
    assert unknown.code == 2 and "--get judge.rules names no option" in unknown.err


def test_an_argument_that_is_none_is_refused_with_the_options(srlm: Srlm) -> None:
    done = srlm("settings", "sft")
    assert (
        done.code == 2
        and "(sft): it takes only options, --stamps, --also, --get, --meta, --dry-run, --config" in done.err
    )
    assert "(x): it takes only options (see srlm sample --help)" in srlm("sample", "x").err


def test_a_changed_rule_file_changes_the_settings(srlm: Srlm) -> None:
    (srlm.folder / "srlm.toml").write_text('[judge]\nrule-file = ["mine.py:polite"]\n')
    stamps = []
    for text in ("polite = bool", "polite = bool", "polite = len"):
        (srlm.folder / "mine.py").write_text(text)
        stamps.append(next(line for line in srlm("settings").out.splitlines() if '"command": "judge"' in line))
    assert stamps[0] == stamps[1] != stamps[2]
