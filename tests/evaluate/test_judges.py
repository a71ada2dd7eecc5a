"""Kinds of judging compared: the figures are those of judge and eval reward, and the cost is what was spent."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial

import pytest

from helpers import Record, Srlm, as_lines, read_rows, write_rows
from srlm_cli import templates
from srlm_cli.engines.base import Completion, Request, Sampling
from srlm_cli.engines.echo import EchoEngine
from srlm_cli.evaluate.judges import OfKind, judges_metrics, of_kind, table
from srlm_cli.records import ranked_record, responses_of
from srlm_cli.stages.groupwise import judge_group
from srlm_cli.stages.judge import JudgeOptions, judge
from srlm_cli.stages.judge_kinds import judge_kinds
from srlm_cli.templates.groups import load_group

ECHO = ("--engine", "echo")
# What the echo engine writes is read by its words: any that begins with a or b is a verdict, or names a reply.
TWO = 'text = "$prompt A $first B $second"\npattern = "\\\\b([ab])[a-z]+"\n'
MANY = (
    'text = "$prompt $replies"\nlow = 0\nhigh = 5\n'
    'pattern = "(?s)\\\\b(?P<reply>[abc])[a-z]+(?:(?!\\\\b[abc]).)*?(?P<score>\\\\d)"\n'
)


def ranked(prompts: int, replies: int = 3) -> list[Record]:
    return [
        {
            "prompt": f"Question {n}?",
            "responses": [{"text": f"Reply {n} {'so ' * (k * 7 % 5)}{k}.", "rank": k} for k in range(replies)],
        }
        for n in range(prompts)
    ]


@pytest.fixture
def here(srlm: Srlm) -> Srlm:
    (srlm.folder / "two.toml").write_text(TWO)
    (srlm.folder / "many.toml").write_text(MANY)
    odd = {"prompt": "Alone?", "responses": [{"text": "Yes.", "rank": 0}]}
    without = {"prompt": "Empty?", "responses": [{"text": " ", "rank": 1}, {"text": "Well.", "rank": 0}]}
    write_rows(srlm.folder / "ranked.jsonl", [*ranked(9), odd, without])
    return srlm


KINDS = {
    "text": (),
    "text:score_only": ("--template", "score_only"),
    "expected": ("--score", "expected"),
    "pairwise:two.toml": ("--by", "pairwise", "--template", "two.toml"),
    "pairwise-direct": ("--by", "pairwise", "--direct"),
    "group:many.toml": ("--by", "group", "--template", "many.toml"),
}


def test_each_kind_has_the_figures_of_judge_and_eval_reward(here: Srlm) -> None:
    seed = ("--seed", "5", "--num-judgements", "4")
    done = here(
        "eval", "judges", "-i", "ranked.jsonl", *ECHO, *seed, "--kinds", ",".join(KINDS), "--judged", "all.jsonl"
    )
    assert done.code == 0, done.err
    assert [row["kind"] for row in done.rows] == list(KINDS)  # in the order that was asked for
    together = read_rows(here.folder / "all.jsonl")
    for row, (kind, options) in zip(done.rows, KINDS.items(), strict=True):
        alone = here("judge", "-i", "ranked.jsonl", *ECHO, *seed, *options, "--out", "judged.jsonl", "--restart")
        assert alone.code == 0, alone.err
        judged = read_rows(here.folder / "judged.jsonl")
        mine = [one for one in together if one["kind"] == kind]
        more = ("kind", "tokens_in", "tokens_out", "id")
        assert [{k: v for k, v in one.items() if k not in more} for one in mine] == [
            {k: v for k, v in one.items() if k != "id"} for one in judged
        ]
        assert [one["id"] for one in mine] == [f"{one['id']}/{kind}" for one in judged]
        reward = {
            one["metric"]: one
            for one in here("eval", "reward", "--seed", "5", stdin=as_lines(judged)).rows
            if "replies" not in one
        }
        same = ("value", "n", "ci_low", "ci_high", "model", "metric")
        assert {name: row[name] for name in same} == {name: reward["pairwise_accuracy"][name] for name in same}
        assert row["tie_rate"] == reward["tie_rate"]["value"] and row["task"] == "judges"
        counts = json.loads((here.folder / "judged.jsonl.meta.json").read_text())["counts"]
        assert (row["tokens_in"], row["tokens_out"]) == (counts["tokens_in"], counts["tokens_out"])
        assert row["num_responses"] == counts["read"] == 30
        assert row["num_judgements"] == sum(len(one["judgements"]) for one in judged)
        assert sum(row["without_score"].values()) == sum(one["score"] is None for one in judged)
        assert row["without_score"]["no reply"] == 1
    values = {row["kind"]: row["value"] for row in done.rows}
    assert len(set(values.values())) > 2  # the kinds do not all say the same
    first = done.rows[0]
    assert first["difference"] is None
    for row in done.rows[1:]:
        assert row["difference"]["value"] == pytest.approx(row["value"] - first["value"])
        assert row["difference"]["ci_low"] <= row["difference"]["value"] <= row["difference"]["ci_high"]


def test_the_table_names_what_has_no_score_and_costs_are_per_reply(here: Srlm) -> None:
    done = here("eval", "judges", "-i", "ranked.jsonl", *ECHO, "--kinds", "text,pairwise")
    head, *lines = done.err.splitlines()[-3:]
    assert head.split("  ")[0] == "" and "minus text" in head and "first shown wins" in head
    assert lines[0].startswith("text") and lines[0].endswith("1 no reply")
    assert lines[1].startswith("pairwise") and lines[1].endswith("27 unreadable, 2 only reply, 1 no reply")
    assert f"{done.rows[0]['tokens_out'] / 30:.1f}" in lines[0]
    quiet = here("eval", "judges", "-i", "ranked.jsonl", *ECHO, "--kinds", "text,pairwise", "--quiet")
    assert quiet.err == "" and quiet.out == done.out


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ("text,nope", "--kinds nope: no such kind"),
        ("text,", "no such kind"),
        ("text:", "no such kind"),
        ("group:additive", "shows one response"),
        ("expected:evidence", "no passages"),
        ("expected:two.toml", "two.toml"),
        ("pairwise-direct:two.toml", "--direct needs them"),
    ],
)
def test_a_kind_that_cannot_be_is_one_line(here: Srlm, kinds: str, said: str) -> None:
    done = here("eval", "judges", "-i", "ranked.jsonl", *ECHO, "--kinds", kinds)
    assert done.code == 2 and said in done.err and len(done.err.splitlines()) == 1 and done.out == ""


def test_comparisons_need_pairs(here: Srlm) -> None:
    done = here("eval", "judges", "-i", "ranked.jsonl", *ECHO, "--kinds", "text", "--comparisons", "1")
    assert done.code == 2 and "--kinds pairwise" in done.err
    fewer = here("eval", "judges", "-i", "ranked.jsonl", *ECHO, "--kinds", "pairwise-direct", "--comparisons", "1")
    every = here("eval", "judges", "-i", "ranked.jsonl", *ECHO, "--kinds", "pairwise-direct")
    assert fewer.rows[0]["num_judgements"] < every.rows[0]["num_judgements"]


def test_kinds_can_be_a_list_in_the_settings(here: Srlm) -> None:
    (here.folder / "srlm.toml").write_text('["eval judges"]\nkinds = ["group", "text"]\n')
    assert [row["kind"] for row in here("eval", "judges", "-i", "ranked.jsonl", *ECHO).rows] == ["group", "text"]


def test_a_prompt_that_comes_back_is_a_bad_row(here: Srlm) -> None:
    rows = [*ranked(2), ranked(1)[0]]
    done = here("eval", "judges", *ECHO, "--kinds", "text,group", stdin=as_lines(rows))
    assert done.code == 3 and "<stdin>:3" in done.err and "not grouped" in done.err and done.out == ""
    skipped = here("eval", "judges", *ECHO, "--kinds", "text,group", "--on-error", "skip", stdin=as_lines(rows))
    assert skipped.code == 0 and [row["num_responses"] for row in skipped.rows] == [6, 6]


def test_a_killed_run_goes_on_and_gives_the_same_rows(srlm: Srlm) -> None:
    write_rows(srlm.folder / "in.jsonl", ranked(20, 2))
    argv = ("eval", "judges", "-i", "in.jsonl", *ECHO, "-k", "1", "--kinds", "text,group", "--quiet", "--judged")
    whole = srlm(*argv, "whole.jsonl")
    assert whole.code == 0 and len(whole.rows) == 2
    killed = srlm.mortal(16 * 3 + 5, signal.SIGKILL, *argv, "out.jsonl")  # after a turn of each kind
    assert killed.code == -signal.SIGKILL and len(read_rows(srlm.folder / "out.jsonl.part")) == 16 * 4
    again = srlm(*[word for word in argv if word != "--quiet"], "out.jsonl")
    assert "resuming after 32 completed inputs" in again.err and again.out == whole.out
    assert (srlm.folder / "out.jsonl").read_bytes() == (srlm.folder / "whole.jsonl").read_bytes()
    other = srlm(*argv, "out.jsonl", "--kinds", "text")
    assert other.code == 0 and len(other.rows) == 1


# --- the stage -------------------------------------------------------------------------------


class Counting(EchoEngine):
    """An echo engine that counts what it says was spent."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: Counter[str] = Counter()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for done in super().generate(requests):
            self.spent.update({"in": done.tokens_in, "out": done.tokens_out, "requests": 1})
            yield done


def of_kinds(rows: list[Record], engine: EchoEngine, clock, seconds: dict) -> dict[str, list[OfKind]]:
    one = JudgeOptions(templates.load_judge("additive"), 2, Sampling(), 0)
    many = JudgeOptions(load_group("group"), 2, Sampling(), 0)
    kinds = {"text": partial(judge, options=one), "group": partial(judge_group, options=many)}
    found: dict[str, list[OfKind]] = {name: [] for name in kinds}
    for outcome in judge_kinds(rows, engine, kinds, clock, seconds):
        for name in kinds:
            found[name].append(of_kind([row for row in outcome.rows if row["kind"] == name], 0))
    return found


def test_tokens_are_what_the_engine_reports_and_time_is_that_of_each_kind() -> None:
    rows = [row for one in ranked(3) for row in responses_of(ranked_record(one))]
    engine, seconds = Counting(), {}
    ticks = iter([0.0, 2.0, 10.0, 15.0])
    found = of_kinds(rows, engine, lambda: next(ticks), seconds)
    assert seconds == {"text": 2.0, "group": 5.0}
    metrics = judges_metrics(found, {name: {} for name in found})
    assert sum(row["tokens_in"] for row in metrics) == engine.spent["in"]
    assert sum(row["tokens_out"] for row in metrics) == engine.spent["out"]
    assert engine.spent["requests"] == 9 + 6  # of each reply one, and of each prompt one for each order
    assert [row["num_judgements"] for row in metrics] == [18, 18]
    lines = table(metrics, {"text": 0.25, "group": None})
    assert lines[2].split()[-2:] == ["0.25", "0"] and lines[3].split()[-3:] == ["-", "9", "unreadable"]


def test_kinds_on_one_prompt_are_not_compared() -> None:
    rows = [row for one in ranked(1) for row in responses_of(ranked_record(one))]
    found = of_kinds(rows, Counting(), lambda: 0.0, {})
    metrics = judges_metrics(found, {name: {} for name in found})
    assert all(row["value"] is not None and row["ci_low"] is None for row in metrics)
    assert metrics[1]["difference"]["ci_high"] is None
    assert "[" not in "".join(table(metrics, dict.fromkeys(found))[2:])


def judged(places: list[int], scores: list[float | None], **more) -> Record:
    score = next((score for score in scores if score is not None), None)
    return {
        "id": "x", "prompt": "Why?", "response": "So.", "human": 1.0, "score": score,
        "scores": scores, "judgements": [""] * len(scores), "judgement_finish_reasons": ["stop"] * len(scores),
        "tokens_in": 1, "tokens_out": 1, **({"places": places} if places else {}), **more,
    }  # fmt: skip


def test_the_reply_shown_earlier_is_counted_in_each_order_of_a_group() -> None:
    group = [judged([0, 1], [4.0, 2.0]), judged([1, 0], [3.0, 2.5]), judged([], [])]
    assert of_kind(group, 0).first_wins == [True, True]
    late = [judged([0, 1], [1.0, 3.0]), judged([1, 0], [1.0, None])]
    assert of_kind(late, 0).first_wins == []  # a tie, and a score that is missing


def test_the_reply_shown_first_is_counted_once_for_each_verdict() -> None:
    def verdicts(*shares: tuple[bool, float | None]) -> Record:
        scores = [None if share is None else 5 * share for _, share in shares]
        games = [{"id": "y", "shown_first": first} for first, _ in shares]
        return judged([], scores, comparisons=games)

    one = verdicts((True, 1.0), (False, 0.0), (True, None))
    other = verdicts((False, 0.0), (True, 0.4), (False, None))
    assert of_kind([one, other], 0).first_wins == [True, False]
    assert of_kind([verdicts((True, 0.5)), verdicts((False, 0.5))], 0).first_wins == []  # a tie


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (judged([], [], response=" "), "no reply"),
        (judged([], []), "only reply"),
        (judged([], [None, None]), "unreadable"),
        (judged([], [None], judgement_finish_reasons=["prompt-too-long"]), "prompt too long"),
        (judged([], [None], score_mass=[0.1]), "low score mass"),
    ],
)
def test_a_reply_without_a_score_is_named_by_its_reason(row: Record, why: str) -> None:
    assert of_kind([row], 0).without_score == [why]
