"""The built-in rules: what each accepts, what it refuses, and how it is written."""

from __future__ import annotations

import pytest

from srlm_cli.errors import BadRow
from srlm_cli.rules import BadRule, check_reply, names, read_rule, rules_of_row
from srlm_cli.rules.checks import REPEATS

# Of each rule: replies that keep it, replies that do not.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "no-commas": (["One; two."], ["One, two.", "一，二"]),
    "lower-case": (["all small, 3 of it"], ["Not all small"]),
    "upper-case": (["ALL 3"], ["ALL of it", "123"]),
    "quoted": (['"So."', "“So.”"], ['"So', "So.", '"', '"So" he said']),
    "title": (["<<A title>>\nText"], ["<A title>", "<<\n>>"]),
    "bullets-only": (["- a\n\n* b", "• a"], ["- a\nb", "-a"]),
    "words:3": (["one two – three", "a b c"], ["one two", "a b c d"]),
    "words:..2": (["one", "one two"], ["one two three"]),
    "characters:2..4": (["ab", "abcd"], ["a", "abcde"]),
    "sentences:2": (["One. Two?", "It is 3.5 m. So!", 'He said "no." She left.'], ["One.", "One. Two. Three."]),
    "sentences:1": (["No end", "Well ..."], ["Well ... yes."]),
    "paragraphs:2": (["a\n\nb", "a\n \n\n\nb\nc"], ["a\nb", "a\n\nb\n\nc"]),
    "lines:2": (["a\n\nb"], ["a", "a\nb\nc"]),
    "bullets:2..": (["So:\n- a\n- b"], ["So:\n- a"]),
    "capital-words:1..": (["This is BIG"], ["This is big"]),
    "highlights:2": (["*one* and **two**"], ["*one*", "2 * 3 * 4"]),
    "placeholders:1": (["Dear [name],"], ["Dear []", "[a] [b]"]),
    "include:C++": (["I like c++."], ["I like C."]),
    "include:$5": (["It costs $5."], ["It costs 5."]),
    "include:art": (["The art."], ["The party."]),
    "not-include:sorry": (["Gladly."], ["Sorry, no."]),
    "count:2..:sky": (["Sky and sky"], ["sky", "skyline sky"]),
    "starts:answer:": (["Answer: 3"], ["The answer: 3"]),
    "ends:done": (["All Done"], ["Done."]),
    "equal: Paris ": (["Paris"], ["paris", "Paris."]),
    r"regex:\d{4}-\d\d": (["on 2026-07"], ["on 07-2026"]),
    "regex:^(?:a|b)$": (["a"], ["ab"]),
    "number:42": (["So 42.", "First 7, then 42!", "42.0"], ["42 and 7", "none", "4 2", "-42"]),
    "number:1234.5": (["1,234.50 euro", "It is 1234.5"], ["1,234", "1234.51"]),
    "number:-5": (["It is -5", "\u22125"], ["item-5", "5"]),
    "number:3.14~0.01": (["3.15", "3.13"], ["3.16", "31.4"]),
    "number:9007199254740993": (["9007199254740993"], ["9007199254740992"]),
    "json": (
        ['{"a": [1, null]}', "```json\n[1]\n```", "3", '"x"', "1" * 5000],
        ["{'a': 1}", "[NaN]", "So: {}", "[" * 9999],
    ),
    "json:object": (["{}"], ["[]", "3"]),
    "json:array": (["[]"], ["{}"]),
}  # fmt: skip


@pytest.mark.parametrize("spec", CASES)
def test_what_keeps_a_rule_and_what_breaks_it(spec: str) -> None:
    check = read_rule(spec).bind({})
    kept, broken = CASES[spec]
    assert [text for text in kept if not check(text)] == [] and [text for text in broken if check(text)] == []


def test_every_rule_has_a_case() -> None:
    assert {spec.removeprefix("not-").partition(":")[0] for spec in CASES} | {"passes"} == set(names())  # test_code.py


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nothing", "no rule 'nothing'; the rules are bullets"),
        ("", "no rule ''"),
        ("not-", "no rule"),
        ("no-commas:3", "takes no arguments"),
        ("no-commas=field", "takes no arguments"),
        ("words", "takes a range"),
        ("words:", "takes a range"),
        ("words:..", "takes a range"),
        ("words:3 4", "takes a range"),
        ("words:-1", "takes a range"),
        ("words:5..2", "is empty"),
        ("words=", "name of a field"),
        ("include", "takes a text"),
        ("include: ", "takes a text"),
        ("count:3", "a range and a text"),
        ("count:x:sky", "takes a range"),
        ("number:x", "takes a number"),
        ("number:3~-1", "takes a number"),
        ("number:3~", "takes a number"),
        ("json:text", "object, array or nothing"),
        ("regex:", "takes a pattern"),
        ("regex:(", "not a regular expression"),
        ("regex:" + "(" * 999, "not a regular expression"),
        ("regex:" + "a" * 1001, "at most 1000 characters"),
        (f"regex:a{{{REPEATS + 1}}}", f"{REPEATS} repeats"),
        ("regex:((a{99}){99}){99}", "repeats"),
        ("regex:a{99999999999}", "repeats"),
    ],
)
def test_a_wrong_rule_says_what_is_wrong(spec: str, said: str) -> None:
    with pytest.raises(BadRule) as raised:
        read_rule(spec)
    assert said in str(raised.value)


def checked(response: str, *rules: str, **fields: object) -> dict[str, bool | float]:
    row = {"prompt": "?", "response": response, "rules": list(rules), **fields}
    return check_reply(row, rules_of_row(row))


def test_a_reply_without_text_keeps_no_rule() -> None:
    rules = ("lower-case", "not-include:x", "words:..3")
    assert set(checked("", *rules).values()) == set(checked(" \n", *rules).values()) == {False}
    assert set(checked("a", *rules, finish_reason="content_filter").values()) == {False}
    assert set(checked("a", *rules, finish_reason="length").values()) == {True}


def test_the_space_around_a_reply_does_not_count() -> None:
    assert checked("\n a b \n\n", "lines:1", "starts:a", "ends:b", "equal:a b", "characters:3") == dict.fromkeys(
        ["lines:1", "starts:a", "ends:b", "equal:a b", "characters:3"], True
    )


def test_arguments_from_a_field() -> None:
    gold = {"answer": "Paris", "more": {"value": 1000}}
    assert checked("Paris", "equal=answer", "not-equal=prompt", **gold) == {
        "equal=answer": True,
        "not-equal=prompt": True,
    }
    assert checked("about 1,001", "number=more.value~1", "number=more.value", **gold) == {
        "number=more.value~1": True, "number=more.value": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "fields", "said"),
    [
        (["equal=answer"], {}, "needs `answer`, a text or a number, got None"),
        (["equal=answer"], {"answer": [1]}, r"got \[1\]"),
        (["equal=answer"], {"answer": True}, "got True"),
        (["equal=a.b"], {"a": "x"}, "needs `a.b`"),
        (["number=answer"], {"answer": "Paris"}, "`answer`: rule number takes a number"),
        ("no-commas", {}, "expected `rules`, a list of texts"),
        ([1], {}, "expected `rules`, a list of texts"),
        (["no-comma"], {}, "`rules`: no rule 'no-comma'"),
        (7, {}, "expected `rules`"),
    ],
)
def test_a_row_whose_rules_cannot_be_checked_is_bad(rules: object, fields: dict, said: str) -> None:
    row = {"prompt": "?", "response": "Paris", "rules": rules, **fields}
    with pytest.raises(BadRow, match=said):
        check_reply(row, rules_of_row(row))


def test_a_pattern_that_takes_too_long_is_a_bad_row_and_not_a_broken_rule() -> None:
    with pytest.raises(BadRow, match="needs more than 1 s for one reply"):
        checked("a" * 60 + "b", "regex:(a|aa)+$")


def test_results_of_a_check_name_the_rules_to_check_again() -> None:
    row = {"rules": {"no-commas": True, "words:..3": False, "own:mine.polite": 0.5}}
    assert [rule.spec for rule in rules_of_row(row)] == ["no-commas", "words:..3"]
    assert rules_of_row({}) == rules_of_row({"rules": None}) == rules_of_row({"rules": []}) == ()
