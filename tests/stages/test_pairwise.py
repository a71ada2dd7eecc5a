"""Replies to a prompt compared two by two: the scores of Bradley-Terry models, Swiss rounds, what cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import exp, log

import pytest

from helpers import ListEngine, Record, Srlm, as_lines, asked_text, read_rows, write_rows
from srlm_cli import templates
from srlm_cli.engines.base import Completion, Request, Sampling
from srlm_cli.records import response_record
from srlm_cli.stages.pairwise import PairwiseOptions, judge_pairwise

PAIRWISE = templates.load("pairwise", fields={"prompt", "first", "second"}, reads=True)


class Judge:
    """A judge that prefers by a function of the two replies, and remembers which it saw."""

    name = "list"
    model = "fake"

    def __init__(self, prefers: Callable[[str, str], str]) -> None:
        self.prefers = prefers
        self.seen: list[tuple[str, str]] = []
        self.rounds: list[int] = []
        self.seeds: list[int] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        self.rounds.append(0)
        for request in requests:
            text = asked_text(request)
            shown = [text.split(f"<reply {side}>\n")[1].split("\n</reply")[0] for side in "AB"]
            self.seen.append((shown[0], shown[1]))
            self.seeds += request.seeds
            self.rounds[-1] += 1
            said = [f"So.\nVerdict: {self.prefers(*shown)}"] * len(request.seeds)
            yield Completion(said, ["stop"] * len(said), 10, 2)


def rows(*texts: str, prompt: str = "Why?") -> list[Record]:
    return [response_record({"prompt": prompt, "response": text, "k": k}) for k, text in enumerate(texts)]


def judged(responses: list[Record], engine, **more) -> list:
    options = PairwiseOptions(PAIRWISE, more.pop("num_judgements", 1), Sampling(), more.pop("seed", 0), **more)
    return list(judge_pairwise(responses, engine, options))


def longer(first: str, second: str) -> str:
    return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


# --- scores ----------------------------------------------------------------------------------


def test_two_replies_get_the_probabilities_of_their_bradley_terry_model() -> None:
    [outcome] = judged(rows("Long one.", "Short."), Judge(longer))
    # two wins and one tie between them: 2.5 to 0.5
    assert [row["score"] for row in outcome.rows] == pytest.approx([5 * 2.5 / 3, 5 * 0.5 / 3])
    first, second = outcome.rows
    assert first["scores"] == [5.0, 5.0] and second["scores"] == [0.0, 0.0]
    assert first["judgements"] == ["So.\nVerdict: A", "So.\nVerdict: B"] == second["judgements"]
    assert first["comparisons"] == [{"id": second["id"], "shown_first": shown} for shown in (True, False)]
    assert second["comparisons"] == [{"id": first["id"], "shown_first": shown} for shown in (False, True)]
    assert first["score_from"] == ["pairwise"] * 2 and first["judgement_finish_reasons"] == ["stop"] * 2
    assert first["judge"]["by"] == "pairwise" and first["judge"]["template_hash"] == PAIRWISE.hash
    assert outcome.counts == {
        "verdicts": 2, "unparsed": 0, "pairs compared": 1, "orders disagree": 0, "cycles": 0,
    }  # fmt: skip


def test_the_scores_of_three_replies_are_those_of_the_likelihood_s_maximum() -> None:
    replies = ["a", "bb", "ccc"]
    [outcome] = judged(rows(*replies), Judge(longer))
    means = [row["score"] / 5 for row in outcome.rows]
    # by symmetry the strengths are -s, 0, s: 4 wins and a tie with each of the two others, of 6 games, at the maximum
    low, high = 0.0, 20.0
    for _ in range(100):
        middle = (low + high) / 2
        expected = 3 / (1 + exp(-middle)) + 3 / (1 + exp(-2 * middle))
        low, high = (middle, high) if expected < 5 else (low, middle)
    top = (1 / (1 + exp(-low)) + 1 / (1 + exp(-2 * low))) / 2
    assert means == pytest.approx([1 - top, 0.5, top], abs=1e-8)


def test_a_judge_that_prefers_the_first_place_makes_ties_and_is_found_out() -> None:
    [outcome] = judged(rows("a", "bb", "ccc"), Judge(lambda first, second: "A"))
    assert [row["score"] for row in outcome.rows] == [2.5, 2.5, 2.5]
    assert outcome.counts["orders disagree"] == outcome.counts["pairs compared"] == 3


def test_a_cycle_is_counted_and_gives_equal_scores() -> None:
    beats = {("rock", "scissors"), ("scissors", "paper"), ("paper", "rock")}
    [outcome] = judged(rows("rock", "paper", "scissors"), Judge(lambda a, b: "A" if (a, b) in beats else "B"))
    assert outcome.counts["cycles"] == 1 and outcome.counts["orders disagree"] == 0
    assert [row["score"] for row in outcome.rows] == [2.5] * 3
    [straight] = judged(rows("a", "bb", "ccc", "dddd"), Judge(longer))
    assert straight.counts["cycles"] == 0


def test_equal_records_of_wins_are_equal_scores_to_the_last_digit() -> None:
    [outcome] = judged(rows("ccc", "a", "bb", "dd"), Judge(longer))
    scores = [row["score"] for row in outcome.rows]
    assert scores[2] == scores[3] and scores[0] > scores[2] > scores[1]


def test_unreadable_verdicts_are_null_and_counted_and_do_not_decide() -> None:
    answers = {frozenset(("a", "bb")): "A", frozenset(("a", "ccc")): "?", frozenset(("bb", "ccc")): "?"}

    judge = Judge(lambda a, b: answers[frozenset((a, b))] if answers[frozenset((a, b))] == "?" else longer(a, b))
    [outcome] = judged(rows("a", "bb", "ccc"), judge)
    assert outcome.counts["verdicts"] == 6 and outcome.counts["unparsed"] == 4
    a, bb, ccc = outcome.rows
    assert (a["score"], bb["score"]) == pytest.approx((5 * 0.5 / 3, 5 * 2.5 / 3)) and ccc["score"] is None
    assert a["scores"] == [0.0, 0.0, None, None] and ccc["scores"] == [None] * 4
    assert ccc["score_from"] == [None] * 4


def test_probabilities_are_shares_of_a_win_and_one_answer_is_enough() -> None:
    engine = ListEngine([[0.9, 0.1], [0.3, 0.7]])
    [outcome] = judged(rows("a", "bb"), engine, direct=True, num_judgements=3)
    first, second = outcome.rows
    assert first["scores"] == pytest.approx([4.5, 3.5]) and second["scores"] == pytest.approx([0.5, 1.5])
    strength = log((0.9 + 0.7 + 0.5) / (0.1 + 0.3 + 0.5))
    assert first["score"] == pytest.approx(5 / (1 + exp(-strength)))
    assert first["judgements"] == ["Verdict: A", "Verdict: B"]
    assert all(request.prefix == "Verdict: " and request.choices == ("A", "B") for request in engine.asked)
    assert [len(request.seeds) for request in engine.asked] == [1, 1]


# --- which replies are compared --------------------------------------------------------------


def test_replies_without_text_and_lone_replies_are_kept_without_a_score() -> None:
    found = [*rows("a", "", "bb"), *rows("alone", prompt="How?"), *rows("", "  ", prompt="Who?")]
    outcomes = judged(found, Judge(longer))
    assert [[row["score"] is None for row in outcome.rows] for outcome in outcomes] == [
        [False, True, False], [True], [True, True],
    ]  # fmt: skip
    assert [outcome.read for outcome in outcomes] == [3, 1, 2]
    assert outcomes[0].counts["no reply"] == 1 and outcomes[2].counts["no reply"] == 2
    assert outcomes[1].counts["prompts with one reply"] == 1
    assert outcomes[0].rows[1]["judgements"] == [] and [one.at_end for one in outcomes] == [False, False, True]


def test_each_pair_is_seen_in_both_orders_with_its_own_seeds() -> None:
    judge = Judge(longer)
    judged(rows("a", "bb", "ccc"), judge, num_judgements=2)
    assert sorted(judge.seen) == sorted((a, b) for a in ("a", "bb", "ccc") for b in ("a", "bb", "ccc") if a != b)
    assert len(set(judge.seeds)) == 12 and judge.rounds == [6]


def test_what_is_drawn_does_not_depend_on_the_order_of_the_rows() -> None:
    one, other = Judge(longer), Judge(longer)
    found = rows("a", "bb", "ccc")
    judged(found, one)
    judged(found[::-1], other)
    assert dict(zip(one.seen, one.seeds, strict=True)) == dict(zip(other.seen, other.seeds, strict=True))


@pytest.mark.parametrize(("replies", "most", "pairs"), [(8, 3, 12), (7, 2, 6), (2, 5, 1), (6, 5, 15), (5, 1, 2)])
def test_swiss_rounds_compare_each_reply_with_so_many_others(replies: int, most: int, pairs: int) -> None:
    judge = Judge(longer)
    [outcome] = judged(rows(*("x" * (n + 1) for n in range(replies))), judge, comparisons=most)
    met = {frozenset(pair) for pair in judge.seen}
    assert len(judge.seen) == 2 * len(met)  # nobody meets another twice, and each pair is seen in both orders
    played = [sum("x" * (n + 1) in pair for pair in met) for n in range(replies)]
    assert max(played) <= most and max(played) - min(played) <= 1
    assert outcome.counts["pairs compared"] == len(met) == pairs


def test_swiss_rounds_find_the_best_and_the_worst_with_fewer_comparisons() -> None:
    texts = ["x" * (n * 7 % 17 + 1) for n in range(16)]
    [all_pairs] = judged(rows(*texts), Judge(longer))
    [swiss] = judged(rows(*texts), Judge(longer), comparisons=5)
    assert swiss.counts["verdicts"] <= 2 * 5 * 8 and all_pairs.counts["verdicts"] == 16 * 15
    by_length = sorted(range(16), key=lambda at: len(texts[at]))
    scores = [row["score"] for row in swiss.rows]
    assert scores.index(max(scores)) == by_length[-1] and scores.index(min(scores)) == by_length[0]
    assert swiss.rows[0]["judge"]["comparisons"] == 5
    ranked = [all_pairs.rows[at]["score"] for at in by_length]
    assert ranked == sorted(ranked)


def test_prompts_take_turns_in_a_swiss_round() -> None:
    judge = Judge(longer)
    found = [row for n in range(3) for row in rows("a", "bb", "ccc", "dddd", prompt=f"Ask {n}?")]
    assert len(judged(found, judge, comparisons=2)) == 3
    assert judge.rounds == [12, 12]


# --- the command -----------------------------------------------------------------------------

ARGV = ("judge", "--engine", "echo", "--by", "pairwise", "--direct")
FOUND = [{"prompt": f"Ask {n}?", "response": "x" * (k + 1), "k": k} for n in range(3) for k in range(3)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--score", "expected"), "--score expected is for one response at a time"),
        (("--force-score",), "--force-score is for one response at a time"),
        (("--meta",), "--meta is for one response at a time"),
        (("--rescore",), "--rescore is for one response at a time"),
        (("--model", "rules"), "--model rules is for one response at a time"),
        (("--evidence", "corpus.db"), "--evidence is for one response at a time"),
        (("--template", "score_only"), "known: first, response, second; it is a template that judges one reply"),
        (("--by", "pointwise"), "--direct has no effect here (it needs --meta or --by pairwise)"),
        (("--by", "group"), "--direct reads one verdict, and --by group has many"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_cannot_hold_are_refused_by_name(srlm: Srlm, options: tuple[str, ...], said: str) -> None:
    result = srlm(*ARGV, *options, stdin=as_lines(FOUND))
    assert result.code == 2 and said in result.err and len(result.err.splitlines()) == 1


def test_comparisons_are_of_two_responses(srlm: Srlm) -> None:
    done = srlm("judge", "--engine", "echo", "--comparisons", "2", stdin=as_lines(FOUND))
    assert done.code == 2 and "--comparisons is about pairs of responses (--by pairwise)" in done.err


def test_a_prompt_that_comes_back_is_a_bad_row_at_its_line(srlm: Srlm) -> None:
    write_rows(srlm.folder / "in.jsonl", [*FOUND, FOUND[0]])
    result = srlm(*ARGV, "--in", "in.jsonl", "--out", "out.jsonl", "--quiet")
    assert result.code == 3 and "in.jsonl:10: the responses of prompt" in result.err and "not grouped" in result.err
    assert len(read_rows(srlm.folder / "out.jsonl.part")) == 9
    skipped = srlm(*ARGV, "--in", "in.jsonl", "--on-error", "skip", "--rejects", "bad.jsonl")
    assert skipped.code == 0 and len(skipped.rows) == 9 and "1 dropped: bad row" in skipped.err
    again = srlm(*ARGV, "--in", "in.jsonl", "--out", "out.jsonl", "--quiet")
    assert again.code == 3 and "in.jsonl:10:" in again.err  # a resumed run remembers the prompts before


def test_pairs_metrics_juries_and_health_take_the_rows_as_they_are(srlm: Srlm) -> None:
    ranked = [
        {"prompt": f"Ask {n}?", "responses": [{"text": "x" * (k + 1), "rank": 2 - k} for k in range(3)]}
        for n in range(3)
    ]
    judged_rows = srlm("judge", "--engine", "echo", "--by", "pairwise", "--direct", stdin=as_lines(ranked))
    assert judged_rows.code == 0 and {row["human"] for row in judged_rows.rows} == {0.0, -1.0, -2.0}
    by_length = [{**row, "score": len(row["response"]) * 1.0} for row in judged_rows.rows]
    assert len(srlm("make-pairs", stdin=as_lines(by_length)).rows) == 3
    pair = srlm("make-pairs", stdin=as_lines(by_length)).rows[0]
    assert "comparisons" not in pair and pair["judge"]["by"] == "pairwise"
    values = {row["metric"]: row["value"] for row in srlm("eval", "reward", stdin=as_lines(by_length)).rows}
    assert values["pairwise_accuracy"] == 1.0
    health = {row["metric"]: row["value"] for row in srlm("eval", "health", stdin=as_lines(by_length)).rows}
    assert health["parse_rate"] == 1.0
    write_rows(srlm.folder / "a.jsonl", by_length)
    write_rows(srlm.folder / "b.jsonl", by_length)
    jury = srlm("jury", "--in", "a.jsonl", "--in", "b.jsonl")
    assert jury.code == 0 and jury.rows[0]["score_from"] == ["pairwise"] * 2 and "comparisons" not in jury.rows[0]
    rescored = srlm("judge", "--rescore", stdin=as_lines(by_length))
    assert rescored.code == 3 and "judged with --by pairwise" in rescored.err


def test_rules_are_combined_with_the_scores_of_comparisons(srlm: Srlm) -> None:
    result = srlm(*ARGV, "--rule", "words:..1", "--rule", "no-commas", "--combine", "mean", stdin=as_lines(FOUND))
    assert result.code == 0, result.err
    for row in result.rows:
        assert row["score_rules"] == 5.0 and row["score"] == pytest.approx((5 + row["score_judge"]) / 2)


def test_show_prints_the_first_comparisons_without_a_model(srlm: Srlm) -> None:
    result = srlm("judge", "--by", "pairwise", "--show", "2", stdin=as_lines(FOUND))
    assert result.code == 0 and result.out.count("Decide which reply helps the user more") == 2
    assert "<reply A>\nx\n</reply A>\n\n<reply B>\nxx\n</reply B>" in result.out
    assert "<reply A>\nxx\n</reply A>\n\n<reply B>\nx\n</reply B>" in result.out


def test_settings_for_one_response_at_a_time_give_way_to_by(srlm: Srlm) -> None:
    (srlm.folder / "srlm.toml").write_text('[judge]\ntemplate = "score_only"\nscore = "expected"\nforce-score = true\n')
    result = srlm("judge", "--engine", "echo", "--by", "pairwise", "--direct", stdin=as_lines(FOUND))
    assert result.code == 0 and result.rows[0]["judge"]["template"] == "pairwise"
    given = srlm("judge", "--engine", "echo", "--score", "expected", "--by", "group", stdin=as_lines(FOUND))
    assert given.code == 2 and "--score expected" in given.err
    (srlm.folder / "srlm.toml").write_text('[judge]\nby = "group"\nscore = "expected"\n')
    both = srlm("judge", "--engine", "echo", stdin=as_lines(FOUND))
    assert both.code == 2 and "--score expected" in both.err
