"""All replies to a prompt in one call: orders, letters, scores that can be read and those that cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest

from helpers import ListEngine, Record, Srlm, as_lines, asked_text
from srlm_cli.engines.base import Completion, Request, Sampling
from srlm_cli.errors import OptionError
from srlm_cli.records import response_record
from srlm_cli.stages.groupwise import judge_group
from srlm_cli.stages.judge import JudgeOptions
from srlm_cli.templates.groups import letters, load_group, scores_by_letter, shown

GROUP = load_group("group")


class Judge:
    """A judge that scores each reply by a function of its text and of its place."""

    name = "list"
    model = "fake"

    def __init__(self, score: Callable[[str, int], float]) -> None:
        self.score = score
        self.orders: list[list[str]] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            text = asked_text(request)
            texts = [part.split("\n</reply")[0] for part in text.split("<reply ")[1:]]
            named = [part.split(">\n", 1) for part in texts]
            self.orders.append([reply for _, reply in named])
            said = "\n".join(f"{name}: {self.score(reply, at)}" for at, (name, reply) in enumerate(named))
            yield Completion([f"Because.\n{said}"], ["stop"], 30, 5)


def rows(*texts: str, prompt: str = "Why?") -> list[Record]:
    return [response_record({"prompt": prompt, "response": text, "k": k}) for k, text in enumerate(texts)]


def judged(responses: list[Record], engine, count: int = 3, seed: int = 0) -> list:
    return list(judge_group(responses, engine, JudgeOptions(GROUP, count, Sampling(), seed)))


def test_a_score_is_the_mean_over_the_orders_and_belongs_to_its_reply() -> None:
    [outcome] = judged(rows("a", "bb", "ccc"), Judge(lambda text, at: len(text)))
    assert [row["score"] for row in outcome.rows] == [1.0, 2.0, 3.0]
    assert [row["scores"] for row in outcome.rows] == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    assert outcome.rows[0]["score_from"] == ["text"] * 3 and outcome.rows[0]["judge"]["by"] == "group"
    assert outcome.rows[0]["judgements"] == outcome.rows[1]["judgements"]
    assert outcome.counts == {"judgements": 9, "unparsed": 0, "calls": 3}
    assert (outcome.tokens_in, outcome.tokens_out, outcome.read) == (90, 15, 3)


def test_each_reply_has_each_place_once_in_n_orders() -> None:
    judge = Judge(lambda text, at: 5 - at)
    [outcome] = judged(rows("a", "bb", "ccc", "dddd"), judge, count=8)
    places = [row["places"] for row in outcome.rows]
    for of_one in places:
        assert sorted(of_one[:4]) == sorted(of_one[4:]) == [0, 1, 2, 3]
    for k, order in enumerate(judge.orders):
        assert [order.index("x" * 0 + text) for text in ("a", "bb", "ccc", "dddd")] == [one[k] for one in places]
    # a judge that looks at the place only gives all replies one score over n orders
    assert {row["score"] for row in outcome.rows} == {3.5}


def test_orders_depend_on_ids_and_seed_and_not_on_the_order_of_the_rows() -> None:
    found = rows("a", "bb", "ccc", "dddd")
    one, other, seeded, more = (Judge(lambda text, at: 1) for _ in range(4))
    judged(found, one, count=6)
    judged(found[::-1], other, count=6)
    judged(found, seeded, count=6, seed=1)
    judged(found, more, count=9)
    assert one.orders == other.orders == more.orders[:6] != seeded.orders


def test_what_cannot_be_read_is_null_and_counted() -> None:
    engine = ListEngine([["A: 4\nB: 2"], ["I like both."], ["B: 9\nA: 1\nC: 3"]])
    [outcome] = judged(rows("a", "bb"), engine)
    assert outcome.counts["unparsed"] == 3 and outcome.counts["judgements"] == 6
    places = [row["places"] for row in outcome.rows]
    for row, place in zip(outcome.rows, places, strict=True):
        assert row["scores"] == [[4.0, 2.0][place[0]], None, [1.0, None][place[2]]]
        assert row["score_from"] == [None if score is None else "text" for score in row["scores"]]
    [none] = judged(rows("a", "bb"), ListEngine([["?"]] * 3))
    assert [row["score"] for row in none.rows] == [None, None]


def test_replies_without_text_are_not_shown_and_a_lone_reply_is_scored() -> None:
    judge = Judge(lambda text, at: 3)
    outcomes = judged([*rows("a", "", "bb"), *rows("alone", prompt="How?"), *rows("", prompt="Who?")], judge)
    assert [[row["score"] for row in outcome.rows] for outcome in outcomes] == [[3.0, None, 3.0], [3.0], [None]]
    assert outcomes[0].counts["no reply"] == 1 and all("" not in order for order in judge.orders)
    assert outcomes[0].rows[1]["places"] == [] and len(judge.orders) == 6


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ("A: 4\nB: 2", [4, 2]),
        ("**A**: 4/5\n**B**: 2/5", [4, 2]),
        ("Reply A: 3.5\nReply B: 0", [3.5, 0]),
        ("- Reply A - 4\n- Reply B - 1", [4, 1]),
        ('{"A": 4, "B": 2}', [4, 2]),
        ("A: 4, B: 2", [4, 2]),
        ("| A | 4 |\n| B | 2 |", [4, 2]),
        ("Score of A: 4 points\nScore of B: 2 points", [4, 2]),
        ("a: 4\nb: 2", [4, 2]),
        ("A: 1\nB: 1\n\nNo, rather:\nA: 4\nB: 2", [4, 2]),
        ("A = 4\nB -> 2.", [4, 2]),
        ("A: 4 (good)\nB: 2 - vague", [4, 2]),
        ("A: 4 out of 5\nB: 2 out of 10", [4, None]),
        ("A: 4-5\nB: 2 to 3", [None, None]),
        ("A: 80%\nB: 6", [None, None]),
        ("A: 3 good points\nB: two", [None, None]),
        ("<reply A>\nA: 5\n</reply A>\nB: 2", [None, 2]),
        ("<think>A: 1\nB: 1</think>A: 4\nB: 2", [4, 2]),
        ("A is better than B.", [None, None]),
        ("A: 4\nB: 2\nC: 1", [4, 2]),
    ],
)
def test_scores_are_read_by_letter(answer: str, scores: list[float | None]) -> None:
    assert scores_by_letter(answer, GROUP, 2) == scores


def test_replies_have_letters_and_then_pairs_of_letters() -> None:
    assert letters(3) == ["A", "B", "C"] and letters(28)[-3:] == ["Z", "AA", "AB"]
    assert shown(["x", "y"]) == "<reply A>\nx\n</reply A>\n\n<reply B>\ny\n</reply B>"


def test_a_template_of_a_group_needs_its_fields_and_its_groups(tmp_path) -> None:
    path = tmp_path / "own.toml"
    for text, said in (
        ('text = "$prompt $replies"\npattern = "(\\\\d)"\nlow = 0\nhigh = 5\n', "`reply` and `score`"),
        ('text = "$prompt"\npattern = "(?P<reply>.)(?P<score>.)"\nlow = 0\nhigh = 5\n', "replies"),
        ('text = "$prompt $replies"\npattern = "(?P<reply>.)(?P<score>.)"\n', "`low`"),
    ):
        path.write_text(text)
        with pytest.raises(OptionError, match=said):
            load_group(str(path))
    path.write_text('text = "$prompt $replies"\npattern = "(?P<reply>[A-Z])=(?P<score>\\\\d+)"\nlow = 1\nhigh = 9\n')
    assert scores_by_letter("A=7 B=0", load_group(str(path)), 2) == [7.0, None]


def test_the_judged_rows_make_pairs(srlm: Srlm) -> None:
    found = rows("a", "bb")
    made = [row for outcome in judged(found, Judge(lambda text, at: len(text))) for row in outcome.rows]
    [pair] = srlm("make-pairs", stdin=as_lines(made)).rows
    assert (pair["chosen_id"], pair["rejected_id"]) == (found[1]["id"], found[0]["id"])
    assert "places" not in pair and "judgements" not in pair


def test_the_conversation_before_the_last_turn_can_be_left_out(srlm: Srlm) -> None:
    prompt = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "And then?"},
    ]
    found = as_lines({"prompt": prompt, "response": f"Two {k}.", "k": k} for k in range(2))
    for by in ("pairwise", "group"):
        whole = srlm("judge", "--by", by, "--show", "1", stdin=found).out
        last = srlm("judge", "--by", by, "--show", "1", "--conversation", "last", stdin=found).out
        assert "First?" in whole and "And then?" in whole and "First?" not in last and "And then?" in last
