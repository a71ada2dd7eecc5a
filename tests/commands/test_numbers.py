"""Each numeric option of each command at its borders: it works, or it is a usage error of one line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from commands_table import AGAINST, RESPONSES, ROW_COMMANDS, SAMPLE, Command
from helpers import Srlm, as_lines, slow, write_rows
from srlm_cli import cli
from srlm_cli.options.numbers import DRAWS, LARGEST, NUMBERS

NO_NUMBERS = ["nan", "-nan", "-inf", "1e400", "9" * 5000, "1,5", "0x10", ""]
NO_WHOLE_ONES = ["1.5", "1e3", str(LARGEST + 1), str(-LARGEST - 1), str(2**64), "-9" + "0" * 400]
LEAST, MOST = "5e-324", "1.7e308"  # of a float: its square, product or sum with another is 0 or infinite
# The echo engine has no use for them, in any command.
OF_A_MODEL = (
    "--batch-size",
    "--tensor-parallel-size",
    "--data-parallel-size",
    "--concurrency",
    "--retries",
    "--timeout",
)
# Work without end, unless something else bounds it.
ENDLESS = {"gen-prompts": {"--count": ("--max-tries", "4")}}


def numeric(name: str) -> Iterator[tuple[str, bool]]:
    """Yield the options of a command that take numbers, and whether these are whole ones."""
    words = name.split()
    made = cli.command(words[0])
    for option in (made.commands[words[1]] if words[1:] else made).params:
        if option.type_descriptor.annotation in NUMBERS:
            yield option.opts[0], option.type_descriptor.annotation in (int, list[int])


def names() -> list[str]:
    """Return all commands, those of groups by both words."""
    groups = {name: getattr(cli.command(name), "commands", {"": None}) for name in cli.COMMANDS}
    return [f"{name} {sub}".strip() for name, subs in groups.items() for sub in subs]


@pytest.mark.parametrize("name", names())
def test_what_is_no_finite_number_is_a_usage_error(name: str, capsys: pytest.CaptureFixture) -> None:
    """Each option with inf, which many ranges hold, and every fourth of the others, another one first each time."""
    for at, (option, whole) in enumerate(numeric(name)):
        texts = [*NO_NUMBERS, *(NO_WHOLE_ONES if whole else ())]
        for value in ["inf", *texts[at % 4 :: 4]]:
            code = cli.run([*name.split(), f"{option}={value}"])
            said = capsys.readouterr().err
            assert code == 2 and said.count("\n") == 1, (option, value, said)
            assert said.startswith(f"srlm {name}: error: Invalid value for '{option}'"), said


def borders(option: str, whole: bool) -> list[str]:
    """Return the numbers at the borders of an option, inside and outside of its range."""
    if not whole:
        return ["0", "-0.0", "-1", "1", LEAST, MOST, f"-{MOST}"]
    most = DRAWS + 1 if option in ("--num-responses", "--num-judgements", "--rows-per-reply") else LARGEST
    return ["0", "1", "-1", str(most), str(-LARGEST)]


@pytest.mark.parametrize(
    "command", [one if str(one) in ("sample", "make-pairs") else slow(one) for one in ROW_COMMANDS], ids=str
)
def test_a_number_at_the_border_works_or_is_a_usage_error(
    srlm: Srlm, command: Command, capsys: pytest.CaptureFixture
) -> None:
    write_rows(srlm.folder / AGAINST, [{**row, "model": "M9"} for row in RESPONSES])
    write_rows(srlm.folder / "in.jsonl", command.rows)
    for option, whole in numeric(command.name):
        if option in OF_A_MODEL and command is not SAMPLE:
            continue
        more = ENDLESS.get(command.name, {}).get(option, ())
        for value in borders(option, whole):
            if cli.run([*command.name.split(), f"{option}={value}", "--on-error=?"]) == 2:
                said = capsys.readouterr().err
                assert said.count("\n") == 1
                if f"'{option}'" in said:
                    continue
            result = srlm(*command.argv("--quiet", "--in", "in.jsonl", *more, f"{option}={value}"))
            assert result.code in (0, 2, 4), (option, value, result.err)
            assert result.err.count("error: ") == (result.code != 0), (option, value, result.err)
            assert "NaN" not in result.out and "Infinity" not in result.out


@pytest.mark.parametrize("value", ["nan", "-inf", "1e999", str(LARGEST + 1)])
def test_settings_and_variables_are_held_to_the_same(srlm: Srlm, value: str) -> None:
    option = "seed" if value.isdecimal() else "temperature"
    (srlm.folder / "srlm.toml").write_text(f"[sample]\n{option} = {value.replace('1e999', 'inf')}\n")
    variable = {f"SRLM_SAMPLE_{option.upper()}": value, "SRLM_CONFIG": ""}
    for env, place in ({}, f"srlm.toml: `{option}` in [sample]"), (variable, f"SRLM_SAMPLE_{option.upper()}: "):
        result = srlm("sample", "--engine", "echo", stdin="", env=env)
        assert result.code == 2 and place in result.err, result.err


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e400", "", "9" * 5000])
@pytest.mark.parametrize("option", ["--length-penalty", "--shard"])
def test_texts_that_hold_a_number_are_held_to_the_same(srlm: Srlm, option: str, text: str) -> None:
    command = "make-pairs" if option == "--length-penalty" else "sample"
    result = srlm(command, option, text if option == "--length-penalty" else f"1/{text}", stdin="")
    assert result.code == 2 and option in result.err and result.err.count("\n") == 1, result.err


@pytest.mark.parametrize("more", [("--length-penalty", MOST), ("--length-penalty", MOST, "--rho", "0.5"), ()], ids=len)
def test_scores_of_any_size_make_a_pair(srlm: Srlm, more: tuple[str, ...]) -> None:
    scores = [-1.7e308, 1.7e308, 0.0]
    rows = [{"prompt": "a", "response": "b" * (at + 1), "score": score} for at, score in enumerate(scores)]
    result = srlm("make-pairs", *more, stdin=as_lines(rows))
    assert result.code == 0, result.err
    assert [row["score_chosen"] > row["score_rejected"] for row in result.rows] in ([True], []), result.out


@pytest.mark.parametrize(("name", "option", "least"), [("sample", "--seed", 0), ("dpo", "--max-steps", -1)])
def test_the_message_names_the_range_of_the_option(name: str, option: str, least: int, capsys: pytest.CaptureFixture):
    assert cli.run([name, f"{option}={10**23}"]) == 2
    assert f"must be from {least} to {LARGEST} (" in capsys.readouterr().err
