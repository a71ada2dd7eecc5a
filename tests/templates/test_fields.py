"""Fields of a row in a judge's prompt: what is put in, what a block leaves out, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import Record, Srlm, as_lines, read_rows, write_rows
from srlm_cli import templates
from srlm_cli.errors import BadRow, OptionError
from srlm_cli.records import response_record
from srlm_cli.stages.judge import judge_prompt
from srlm_cli.templates.fields import rendered

ECHO = ("--engine", "echo", "--quiet")
SCORED = 'high = 5\npattern = "Score: ([0-9])"\nfinish = "Score: "\nchoices = ["0", "5"]\n'


def own(folder: Path, text: str) -> templates.Template:
    """Return a judge template of the user's own."""
    path = folder / "own.toml"
    path.write_text(SCORED + text, encoding="utf-8")
    return templates.load_judge(str(path))


def asked(form: templates.Template, **row: object) -> list[tuple[str, str]]:
    """Return the turns that a template asks about a row."""
    turns = judge_prompt(response_record({"prompt": "Why?", "response": "So.", **row}), form)
    return [(turn["role"], turn["content"]) for turn in turns]


@pytest.mark.parametrize(
    ("text", "row", "expected"),
    [
        ("$a-${b}", {"a": "x", "b": "y"}, "x-y"),
        ("$a.b", {"a": "x"}, "x.b"),  # a path needs braces: a sentence can end after a field
        ("${a.b} ${a.c.1}", {"a": {"b": 3, "c": [0, True]}}, "3 true"),
        ("${a-b}", {"a-b": 0.5}, "0.5"),
        ("$a", {"a": ["one", "two"]}, "- one\n- two"),
        ("$a", {"a": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
         "User: Hi\n\nAssistant: Ho"),
        ("$a", {"a": {"é": [1, None]}}, '{"é": [1, null]}'),
        ("$a", {"a": False}, "false"),
        ("$a", {"a": "$b $[ $$ ${a} $]", "b": "wrong"}, "$b $[ $$ ${a} $]"),  # a value is not read again
        ("$$a $$[x$$]", {"a": "x"}, "$a $[x$]"),
        ("1\n$[\n2 $a\n$]\n3", {"a": "x"}, "1\n2 x\n3"),
        ("1\n$[\n2 $a\n$]\n3", {"b": "x"}, "1\n3"),
        ("1$[ 2 $a$] 3", {"a": "x"}, "1 2 x 3"),
        ("1$[ 2 $a$] 3", {}, "1 3"),
        ("1$[ $a $b$]$[ $b$]", {"b": "y"}, "1 y"),
        ("1\n  $[  \n$a\n\t$]", {"a": "x"}, "1\nx\n"),
    ],
)  # fmt: skip
def test_a_text_with_its_fields(text: str, row: Record, expected: str) -> None:
    assert rendered(text, row) == expected


@pytest.mark.parametrize("value", [None, "", " \n", [], {}])
def test_a_field_without_a_value_is_missing(value: object) -> None:
    assert rendered("$[Facts: $a$]-", {"a": value}) == "-"
    with pytest.raises(BadRow, match="expected `a`"):
        rendered("Facts: $a", {"a": value})


@pytest.mark.parametrize("text", ["${a.b}", "${a.0.b}", "${c.2}", "${c.x}", "${d.0}"])
def test_a_path_that_leads_nowhere_is_missing(text: str) -> None:
    assert rendered(f"$[{text}$]", {"a": "x", "c": [1], "d": "text"}) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text = '$prompt $response $[ $a'", "has no `\\$\\]`"),
        ("text = '$prompt $response $]'", "needs a `\\$\\]`"),
        ("text = '$prompt $response $[ $[ $a $] $]'", "do not hold blocks"),
        ("text = '$prompt $response $[ no field $]'", "no field"),
        ("text = '$prompt $response ${a b}'", "doubled"),
        ("text = '$prompt $[ $response $a $]'", "response"),  # without `a` the judge would not see the reply
        ("text = '$prompt $response'\nsystem = '$[ $a'", "has no"),
        ("text = '$prompt $response'\nsystem = 1", "`system` has to be a text"),
        ("text = '$prompt $response'\nexamples = ['Score: 5']", "tables with an `answer`"),
        ("text = '$prompt $response'\nexamples = [{prompt = 'a', response = 'b'}]", "tables with an `answer`"),
        ("text = '$prompt $response'\nexamples = [{prompt = 'a', answer = 'Score: 5'}]", "example 1: .*`response`"),
        ("text = '$prompt $response'\nexamples = [{prompt = 'a', response = 'b', answer = 'Good'}]", "example 1"),
    ],
)
def test_a_template_that_cannot_work_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        own(tmp_path, text)


def test_other_templates_take_no_fields_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    for text in ("text = '$prompt $first $second $a'", "text = '$prompt $first $second'\nsystem = '$a'"):
        path.write_text(f"{text}\npattern = '(A|B)'")
        with pytest.raises(OptionError, match="not known: a"):
            templates.load(str(path), fields={"prompt", "first", "second"}, reads=True)


def test_a_system_text_and_examples_are_turns_before_the_prompt(tmp_path: Path) -> None:
    form = own(
        tmp_path,
        """text = 'Q: $prompt A: $response$[ R: $reference$]'
system = 'Judge in $language.'
[[examples]]
prompt = '1+1?'
response = '2 $language'
reference = 2
answer = 'Right. Score: 5'
[[examples]]
prompt = '1+2?'
response = '4'
answer = 'Wrong. Score: 0'
""",
    )
    assert asked(form, language="English") == [
        ("system", "Judge in English."),
        ("user", "Q: 1+1? A: 2 $language R: 2"),
        ("assistant", "Right. Score: 5"),
        ("user", "Q: 1+2? A: 4"),
        ("assistant", "Wrong. Score: 0"),
        ("user", "Q: Why? A: So."),
    ]
    with pytest.raises(BadRow, match="`language`"):
        asked(form)


def test_a_reply_cannot_put_fields_into_the_prompt(tmp_path: Path) -> None:
    form = own(tmp_path, "text = '$prompt | $response | $[$reference$]'")
    assert asked(form, response="$prompt $[ ${reference} $$", reference="R $response") == [
        ("user", "Why? | $prompt $[ ${reference} $$ | R $response")
    ]


def test_the_built_in_templates_for_a_reference_and_a_rubric() -> None:
    reference, rubric = templates.load_judge("reference"), templates.load_judge("rubric")
    [(_, text)] = asked(reference, reference="It is so.")
    assert "<reference>\nIt is so.\n</reference>" in text and reference.score("Score: 4") == 4
    [(_, text)] = asked(rubric, rubric=["polite", "short"])
    assert "<rubric>\n- polite\n- short\n</rubric>" in text and "<reference>" not in text
    [(_, text)] = asked(rubric, rubric={"points": 3}, reference="R")
    assert '{"points": 3}' in text and "<reference>\nR\n</reference>" in text
    with pytest.raises(BadRow, match="`rubric`"):
        asked(rubric, reference="R")


# --- the commands ----------------------------------------------------------------------------

ROWS = [{"prompt": f"Q{n}?", "response": "So.", "reference": f"R{n}"} for n in range(3)]


def test_a_row_without_a_field_is_a_bad_row_named_by_its_line(srlm: Srlm) -> None:
    rows = [ROWS[0], {**ROWS[1], "reference": None}, ROWS[2]]
    result = srlm("judge", "--template", "reference", *ECHO, stdin=as_lines(rows))
    assert result.code == 3 and [row["prompt"] for row in result.rows] == ["Q0?"]
    assert ":2: expected `reference`, a field that template reference uses, got none" in result.err
    skipped = srlm("judge", "--template", "reference", *ECHO, "--on-error", "skip", stdin=as_lines(rows))
    assert skipped.code == 0 and [row["prompt"] for row in skipped.rows] == ["Q0?", "Q2?"]
    assert all(row["reference"] and row["judge"]["template"] == "reference" for row in skipped.rows)


def test_show_prints_what_the_judge_reads_without_a_model(srlm: Srlm) -> None:
    write_rows(srlm.folder / "rows.jsonl", [*ROWS, {"prompt": "No?", "response": "", "reference": "R"}])
    result = srlm("judge", "--in", "rows.jsonl", "--template", "reference", "--show", "1", "--model", "./none")
    assert result.code == 0 and result.out.startswith("--- rows.jsonl:1: user\nJudge the reply") and not result.err
    assert "<reference>\nR0\n</reference>" in result.out and "R1" not in result.out
    direct = srlm("judge", "--in", "rows.jsonl", "--template", "score_only", "--score", "expected", "--show", "9",
                  "--system", "Be strict.")  # fmt: skip
    assert direct.out.startswith("--- rows.jsonl:1: system\nBe strict.\n--- rows.jsonl:1: user\n")
    assert "--- rows.jsonl:3: assistant\nScore: \n--- rows.jsonl:4: no reply" in direct.out
    write_rows(srlm.folder / "rows.jsonl", [ROWS[0], {"prompt": "Q?", "response": "So."}])
    bad = srlm("judge", "--in", "rows.jsonl", "--template", "reference", "--show", "2")
    assert bad.code == 3 and "rows.jsonl:2:" in bad.err and "R0" in bad.out


@pytest.mark.parametrize("argv", [("--meta",), ("--rescore",), ("--model", "rules")])
def test_show_is_refused_where_no_judge_is_asked(srlm: Srlm, argv: tuple[str, ...]) -> None:
    refused = srlm("judge", "--show", "1", *ECHO, *argv, stdin=as_lines(ROWS))
    assert refused.code == 2 and "--show prints the prompt of a judge" in refused.err


def test_training_rows_have_the_fields_of_the_template(srlm: Srlm) -> None:
    replies = [{"text": "Good.", "rank": 0}, {"text": "Bad.", "rank": 1}]
    ranked = [{"prompt": f"{word}?", "responses": replies, "reference": "It is so."} for word in ("Why", "Who")]
    del ranked[1]["reference"]
    argv = ("make-eft", "--method", "hindsight", "--reason", "none", "--template", "reference", "--quiet")
    made = srlm(*argv, stdin=as_lines(ranked[:1]))
    assert made.code == 0 and len(made.rows) == 2
    assert all("It is so." in row["prompt"][0]["content"] for row in made.rows)
    refused = srlm(*argv, stdin=as_lines(ranked))
    assert refused.code == 3 and ":2: expected `reference`" in refused.err


def test_the_meta_judge_sees_the_fields_that_the_judge_saw(srlm: Srlm) -> None:
    rows = [{**row, "judge": {"template": "reference"}, "score": 2, "scores": [1, 3],
             "judgements": ["Poor. Score: 1", "Fine. Score: 3"]} for row in ROWS]  # fmt: skip
    argv = ("judge", "--meta", "--template", "reference", *ECHO)
    made = srlm(*argv, stdin=as_lines(rows))
    assert made.code == 0 and "R0" in made.rows[0]["judge_prompt"][0]["content"]
    del rows[1]["reference"]
    assert srlm(*argv, stdin=as_lines(rows)).code == 3


def test_two_system_messages_are_refused(srlm: Srlm) -> None:
    (srlm.folder / "own.toml").write_text('extends = "additive"\nsystem = "Be fair."\n')
    result = srlm("judge", "--template", "own.toml", "--system", "Be strict.", *ECHO, stdin=as_lines(ROWS))
    assert result.code == 2 and "own.toml has a `system` message" in result.err
    made = srlm("judge", "--template", "own.toml", *ECHO, stdin=as_lines(ROWS))
    assert made.code == 0 and len(made.rows) == 3


def test_a_jury_knows_the_scale_of_a_template_with_fields(srlm: Srlm) -> None:
    for name, template in (("a", "reference"), ("b", "rating")):
        out = srlm("judge", "--template", template, *ECHO, "--out", f"{name}.jsonl", stdin=as_lines(ROWS))
        assert out.code == 0 and len(read_rows(srlm.folder / f"{name}.jsonl")) == 3
    result = srlm("jury", "--in", "a.jsonl", "--in", "b.jsonl")
    assert result.code == 2 and "scale" in result.err
