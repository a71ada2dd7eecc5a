"""Criteria of a template: what may stand in the file, what the judge is asked, and how its answer is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import Srlm, as_lines, write_rows
from srlm_cli import templates
from srlm_cli.errors import OptionError
from srlm_cli.templates import criteria

TEXT = 'high = 10\ntext = "$prompt $response $criteria $form"\n'
ABSENT = "not_applicable = true"
THREE = """
[[criteria]]
name = "right"
description = "It is right."
scale = 4
weight = 3
not_applicable = true
[[criteria]]
name = "on topic"
description = "It is about the question."
scale = "yes/no"
[[criteria]]
name = "style"
description = "How it reads."
scale = ["poor", "fair", "good"]
"""


def own(folder: Path, source: str = TEXT + THREE) -> templates.Template:
    """Return a judge template of the user's own."""
    path = folder / "own.toml"
    path.write_text(source, encoding="utf-8")
    return templates.load_judge(str(path))


def answer(right: object = "4", topic: object = "yes", style: object = "good") -> str:
    """Return an answer of the judge."""
    values = {"right": right, "on topic": topic, "style": style}
    return json.dumps({name: {"reason": "So.", "value": value} for name, value in values.items()})


# --- what is asked -----------------------------------------------------------------------------


def test_the_judge_is_shown_the_criteria_and_the_form(tmp_path: Path) -> None:
    [turn] = own(tmp_path).chat(prompt="Why?", response="So.")
    assert turn["content"] == (
        'Why? So. - right: It is right. (0 (worst) to 4 (best), or "n/a" if it does not apply)\n'
        "- on topic: It is about the question. (no or yes)\n"
        "- style: How it reads. (poor, fair or good, from the worst to the best)"
        ' {"right": {"reason": "...", "value": "..."}, "on topic": {"reason": "...", "value": "..."},'
        ' "style": {"reason": "...", "value": "..."}}'
    )


def test_the_schema_has_the_keywords_that_all_implementations_read_alike(tmp_path: Path) -> None:
    form = own(tmp_path)
    schema = criteria.schema(form.criteria, direct=False)
    assert schema["required"] == ["right", "on topic", "style"]
    assert schema["properties"]["right"] == {
        "type": "object",
        "properties": {
            "reason": {"type": "string"},
            "value": {"type": "string", "enum": ["0", "1", "2", "3", "4", "n/a"]},
        },
        "required": ["reason", "value"],
    }
    assert list(criteria.schema(form.criteria, direct=True)["properties"]["style"]["properties"]) == ["value"]


def test_the_answer_before_a_value_is_what_the_whole_answer_has_there(tmp_path: Path) -> None:
    form = own(tmp_path)
    found = form.findings(answer())
    whole = criteria.whole(form.criteria, found, False)
    assert whole == answer()
    for one in form.criteria:
        before = criteria.begun(form.criteria, found, one, False) + criteria.before_value("So.")
        assert whole.startswith(before + found[one.name].value + '"')


# --- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (answer(), 10),
        (answer("0", "no", "poor"), 0),
        (answer("2", "no", "good"), (0.5 * 3 + 0 + 1) / 5 * 10),  # the weights are 3, 1, 1
        (answer(2, True, "Fair"), (0.5 * 3 + 1 + 0.5) / 5 * 10),
        (answer("n/a", "yes", "poor"), 5),
        (answer(None, "yes", "good"), 10),  # null means n/a where that is allowed
        (answer("N/A", "Yes ", "good"), 10),
        (answer(4.0), 10),
        ('{"Right": 4, "on_topic": "no", "STYLE": {"value": "good"}}', 8),
        ("Here it is:\n```json\n" + answer("3") + "\n```\nThat is all.", (0.75 * 3 + 2) / 5 * 10),
        ('{"criteria": ' + answer("3") + "}", (0.75 * 3 + 2) / 5 * 10),
        ("{so} " + answer("0") + answer("4"), 4),  # the first one counts
        ("<think>" + answer("4") + "</think>" + answer("0"), 4),
        ("<reply>" + answer("4") + "</reply>" + answer("0"), 4),
        (answer("4").replace("So.", "A line\nbreak"), 10),
        (answer("5"), None),
        (answer(3.5), None),
        (answer("4/4"), None),
        (answer(topic="maybe"), None),
        (answer(topic="n/a"), None),  # not allowed for this one
        (answer(style=None), None),
        (answer(style=["good"]), None),
        ('{"right": {"reason": "x", "value": "4"}, "style": "good"}', None),
        (answer()[:-1], None),
        ("[4, 1, 2]", None),
        ("Score: 4", None),
        ("{" * 300, None),
        ('{"right": ' + "9" * 5000 + "}", None),
        ("", None),
    ],
)
def test_the_score_of_an_answer(tmp_path: Path, text: str, score: float | None) -> None:
    found = own(tmp_path).score(text)
    assert found == (None if score is None else pytest.approx(score))


def test_what_cannot_be_read_does_not_hide_the_rest(tmp_path: Path) -> None:
    found = own(tmp_path).findings(answer("7", "yes", "n/a"))
    assert {name: one.value for name, one in found.items()} == {"on topic": "yes"}


@pytest.mark.parametrize(
    ("aggregate", "text", "score"),
    [
        ("min", answer("3", "yes", "good"), 7.5),
        ("min", answer("n/a", "yes", "fair"), 5),
        ("all", answer("4", "yes", "good"), 10),
        ("all", answer("3", "yes", "good"), 0),
        ("all", answer("n/a", "yes", "good"), 10),
    ],
)
def test_the_least_value_or_all_of_them(tmp_path: Path, aggregate: str, text: str, score: float) -> None:
    assert own(tmp_path, f'aggregate = "{aggregate}"\n' + TEXT + THREE).score(text) == score


def test_a_criterion_without_weight_is_read_and_not_counted(tmp_path: Path) -> None:
    form = own(tmp_path, TEXT + THREE.replace("weight = 3", "weight = 0"))
    assert form.score(answer("0", "yes", "good")) == 10
    assert form.score(answer("9", "yes", "good")) is None


def test_without_any_that_applies_there_is_no_score(tmp_path: Path) -> None:
    form = own(tmp_path, TEXT + THREE.replace("not_applicable = true\n", "").replace("scale", f"{ABSENT}\nscale"))
    found = form.findings(answer("n/a", "n/a", "n/a"))
    assert form.total(found) is None and [one.score for one in found.values()] == [None] * 3


def test_the_expectation_of_a_criterion(tmp_path: Path) -> None:
    right, topic, _ = own(tmp_path).criteria
    found = criteria.expected(topic, "no", "So.", [0.25, 0.75])
    assert (found.value, found.score, found.best) == ("no", 0.75, 0.75)
    found = criteria.expected(right, "n/a", "", [0.1, 0.0, 0.2, 0.0, 0.5, 0.2])  # n/a is left out below one half
    assert found.score == pytest.approx((0.2 * 0.5 + 0.5) / 0.8) and found.value == "4"
    found = criteria.expected(right, "4", "", [0.1, 0.0, 0.1, 0.0, 0.2, 0.6])
    assert (found.value, found.score) == (None, None)


# --- what may stand in the file ----------------------------------------------------------------

ONE = '[[criteria]]\nname = "a"\ndescription = "b"\nscale = 4\n'


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (TEXT + ONE.replace("4", "0"), "criterion 'a': its `scale`"),
        (TEXT + ONE.replace("4", "101"), "criterion 'a': its `scale`"),
        (TEXT + ONE.replace("4", '["x"]'), "criterion 'a': its `scale`"),
        (TEXT + ONE.replace("4", '["x", "X"]'), "criterion 'a': its `scale`"),
        (TEXT + ONE.replace("4", '\'["x", "y"]\''), "criterion 'a': its `scale`"),
        (TEXT + ONE.replace("4", '["none", "good"]\nnot_applicable = true'), "criterion 'a': its `scale`"),
        (TEXT + ONE.replace('"a"', '"a\\"b"'), "criterion 1: its `name`"),
        (TEXT + ONE.replace('"a"', "3"), "criterion 1: its `name`"),
        (TEXT + ONE.replace('"b"', '" "'), "criterion 'a': its `description`"),
        (TEXT + ONE + "weight = -1\n", "criterion 'a': its `weight`"),
        (TEXT + ONE + "weight = nan\n", "criterion 'a': its `weight`"),
        (TEXT + ONE + "weight = 0\n", "weight above 0"),
        (TEXT + ONE + 'not_applicable = "yes"\n', "criterion 'a': its `not_applicable`"),
        (TEXT + ONE + "other = 1\n", "criterion 1 has to be a table"),
        (TEXT + ONE.replace("scale = 4\n", ""), "missing `scale`"),
        (TEXT + ONE + ONE.replace('"a"', '"A"'), "two criteria named"),
        (TEXT + "criteria = 3", "its `criteria` has to be tables"),
        (TEXT + "criteria = [3]", "criterion 1 has to be a table"),
        ('aggregate = "max"\n' + TEXT + ONE, "`aggregate` has to be one of mean, min, all"),
        ('finish = "Score: "\n' + TEXT + ONE, "`criteria`, which are read as JSON, and `finish`"),
        (TEXT.replace(" $form", "") + ONE, "missing or not known: form"),
        (TEXT.replace("high = 10", "high = 0") + ONE, "`low` has to be below its `high`"),
        (TEXT.replace("high = 10", "high = 1e308\nlow = -1e308") + ONE, "too far apart"),
        (TEXT + ONE + '[[examples]]\nprompt = "p"\nresponse = "r"\nanswer = "Score: 4"\n', "example 1"),
    ],
)
def test_a_wrong_template_is_one_line(tmp_path: Path, source: str, said: str) -> None:
    with pytest.raises(OptionError) as error:
        own(tmp_path, source)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_criteria_are_for_templates_that_judge_one_reply(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text('high = 1\ntext = "$prompt $first $second"\n' + ONE)
    with pytest.raises(OptionError, match="only a template that judges one reply"):
        templates.load(str(path), fields={"prompt", "first", "second"}, reads=True)


def test_an_example_shows_the_criteria_too(tmp_path: Path) -> None:
    example = '[[examples]]\nprompt = "p"\nresponse = "r"\nanswer = \'{"a": 2}\'\n'
    user, assistant, last = own(tmp_path, TEXT + ONE + example).chat(prompt="x", response="y")
    assert user["content"].replace("p r", "x y") == last["content"] and assistant["content"] == '{"a": 2}'


def test_a_template_of_criteria_alone_extends_the_built_in_one(tmp_path: Path) -> None:
    form = own(tmp_path, 'extends = "criteria"\n' + ONE)
    assert [one.name for one in form.criteria] == ["a"] and form.score('{"a": 2}') == 2.5


def test_a_field_of_the_row_may_be_called_criteria(tmp_path: Path) -> None:
    form = own(tmp_path, 'extends = "additive"\ntext = "$prompt $response $criteria"\n')
    assert form.chat({"criteria": ["x"]}, prompt="p", response="r")[0]["content"] == "p r - x"


def test_make_eft_has_no_use_for_criteria(srlm: Srlm) -> None:
    ranked = {"prompt": "p", "responses": [{"text": "a", "rank": 1}, {"text": "b", "rank": 2}]}
    write_rows(srlm.folder / "ranked.jsonl", [ranked])
    done = srlm("make-eft", "--in", "ranked.jsonl", "--engine", "echo", "--template", "criteria")
    assert done.code == 2 and "template criteria has `criteria`" in done.err


def test_show_prints_the_criteria(srlm: Srlm) -> None:
    done = srlm("judge", "--template", "criteria", "--show", "1", stdin=as_lines([{"prompt": "p", "response": "r"}]))
    assert done.code == 0 and "- accuracy: " in done.out and '{"helpfulness": {"reason": "...", ' in done.out
