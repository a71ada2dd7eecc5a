"""Responses that no model wrote: never a row of `sample`, never judged, never chosen or rejected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import ListEngine, Srlm, read_json, read_rows, write_rows
from srlm_cli import templates
from srlm_cli.engines.base import Completion, Sampling
from srlm_cli.records import prompt_record, response_record
from srlm_cli.stages.gen_prompts import fault
from srlm_cli.stages.head_to_head import Entry, HeadToHeadOptions, head_to_head
from srlm_cli.stages.judge import JudgeOptions, judge
from srlm_cli.stages.make_pairs import PairOptions, make_pairs, scored_record
from srlm_cli.stages.sample import SampleOptions, sample
from srlm_cli.streams.reader import Reader
from srlm_cli.streams.writer import Rejects
from stub_server import MODEL, Asked, Fault, Stub, error

NEVER = [
    {"response": "", "finish_reason": "content_filter"},
    {"response": "Half a", "finish_reason": "error"},
    {"response": "", "finish_reason": "prompt-too-long"},
    {"response": " \n", "finish_reason": "stop"},
    {"response": ""},
]


class Ended(ListEngine):
    """A list-backed engine with a finish reason for each text."""

    def generate(self, requests) -> Iterator[Completion]:
        for request, answer in zip(requests, self.answers, strict=False):
            self.asked.append(request)
            texts, reasons = zip(*answer, strict=True)
            yield Completion(list(texts), list(reasons), 3, 1, why="400 no, thanks")


def prompts(*texts: str) -> list[dict]:
    return [prompt_record({"prompt": text}) for text in texts]


def test_a_completion_that_never_came_has_no_row_and_is_counted() -> None:
    engine = Ended([[("Yes.", "stop"), ("", "content_filter"), ("No", "length"), ("", "content_filter")]])
    [outcome] = sample(prompts("Why?"), engine, SampleOptions(4, Sampling(), 0))
    assert [(row["k"], row["response"], row["finish_reason"]) for row in outcome.rows] == [
        (0, "Yes.", "stop"), (2, "No", "length"),
    ]  # fmt: skip
    assert outcome.counts == {"responses": 2, "cut off": 1, "content filter": 2} and not outcome.bad


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("prompt-too-long", "the prompt is too long for the model: 400 no, thanks"),
        ("content_filter", "a content filter refused it: 400 no, thanks"),
        ("empty", "the model's replies are empty: 400 no, thanks"),
        ("tool_calls", "no reply: tool_calls: 400 no, thanks"),
    ],
)
def test_a_prompt_without_a_response_is_a_bad_row(reason: str, words: str) -> None:
    engine = Ended([[("", reason)] * 2, [("Yes.", "stop")] * 2])
    bad, good = sample(prompts("Why?", "How?"), engine, SampleOptions(2, Sampling(), 0))
    assert (bad.rows, bad.bad) == ([], words)
    assert len(good.rows) == 2 and not good.bad


def options(template: str = "additive", **more) -> JudgeOptions:
    form = templates.load(template, fields={"prompt", "response"})
    return JudgeOptions(form, 2, Sampling(), seed=0, **more)


@pytest.mark.parametrize("about", NEVER)
@pytest.mark.parametrize("how", [{}, {"force_score": True}, {"template": "score_only", "score": "expected"}])
def test_what_no_model_wrote_is_not_judged(about: dict, how: dict) -> None:
    came = {"prompt": "Why?", "prompt_id": "p", "response": "So.", "k": 1}
    rows = [response_record({"prompt": "Why?", "prompt_id": "p", "k": k, **about}) for k in (0, 2, 3)]
    rows.insert(1, response_record(came))
    answer = [0.0, 0, 0, 0, 1.0, 0] if "template" in how else ["Score: 4"] * 2
    engine = ListEngine([answer])
    outcomes = list(judge(rows, engine, options(**how)))
    assert [outcome.rows[0]["k"] for outcome in outcomes] == [0, 1, 2, 3] and len(engine.asked) == 1
    assert [outcome.rows[0]["score"] for outcome in outcomes] == [None, 4, None, None]
    assert [outcome.counts.get("no reply") for outcome in outcomes] == [1, None, 1, 1]
    assert outcomes[0].rows[0]["judgements"] == outcomes[0].rows[0]["scores"] == []


@pytest.mark.parametrize("reason", ["stop", "STOP", "length", "eos_token", "end_turn", None])
def test_what_ended_or_was_cut_is_judged(reason: str | None) -> None:
    row = response_record({"prompt": "Why?", "response": "So.", "finish_reason": reason})
    [outcome] = judge([row], ListEngine([["Score: 4"] * 2]), options())
    assert outcome.rows[0]["score"] == 4


def test_a_judgement_that_never_came_is_not_finished() -> None:
    """`--force-score` asks for the score of what the judge wrote; where it wrote nothing there is none to ask for."""
    engine = Ended([[("Fine.", "stop"), ("", "content_filter")], [("5", "stop")]])
    [outcome] = judge([response_record({"prompt": "Why?", "response": "So."})], engine, options(force_score=True))
    assert outcome.rows[0]["scores"] == [5, None] and len(engine.asked) == 2
    assert outcome.counts["content filter"] == 1 and outcome.counts["unparsed"] == 1


@pytest.mark.parametrize("unsorted", [False, True])
@pytest.mark.parametrize("about", NEVER)
@pytest.mark.parametrize("score", [0.0, 5.0])
def test_what_no_model_wrote_is_neither_chosen_nor_rejected(about: dict, score: float, unsorted: bool) -> None:
    """Also where an older judge has scored it."""
    base = {"prompt": "Why?", "prompt_id": "p", "finish_reason": "stop"}
    told = [{"response": "Good.", "score": 3.0}, {"response": "Bad.", "score": 2.0}, {"score": score, **about}]
    rows = [scored_record(response_record({**base, "k": k, **one})) for k, one in enumerate(told)]
    [outcome] = make_pairs(rows, PairOptions(unsorted=unsorted))
    [pair] = outcome.rows
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("Good.", "Bad.")
    assert outcome.counts["unscored"] == 1
    [outcome] = make_pairs(rows[1:], PairOptions(unsorted=unsorted))
    assert outcome.dropped == {"fewer than two scored responses": 1}


def test_what_never_came_is_not_compared_and_what_is_empty_is() -> None:
    """An empty answer is a bad one; a refused one says nothing of the model."""

    def side(model: str, *told: dict) -> list[dict]:
        return [response_record({"prompt": f"{at}?", "model": model, **one}) for at, one in enumerate(told)]

    came, empty, refused = {"response": "So."}, {"response": "", "finish_reason": "stop"}, NEVER[0]
    first, second = side("a", came, empty, refused, came), side("b", came, came, came, refused)
    engine = ListEngine([["Verdict: A"], ["Verdict: B"]] * 2)
    form = templates.load("pairwise", fields={"prompt", "first", "second"})
    entries = [Entry("a", "a.jsonl", first), Entry("b", "b.jsonl", second)]
    outcomes = list(head_to_head(entries, engine, HeadToHeadOptions(form, Sampling(), 0)))
    assert [row["prompt"] for outcome in outcomes for row in outcome.rows] == ["0?", "1?"]
    dropped = Counter(reason for outcome in outcomes for reason in Counter(outcome.dropped).elements())
    assert dropped == {"no reply": 1, "no response of the other model": 1}


@pytest.mark.parametrize(("reason", "dropped"), [("length", "cut off"), ("content_filter", "content filter")])
def test_a_new_prompt_that_never_came_is_dropped_by_its_reason(reason: str, dropped: str) -> None:
    assert fault("", reason) == dropped


def test_an_empty_response_that_people_ranked_is_neither_chosen_nor_rejected() -> None:
    replies = [{"text": "Good.", "rank": 0}, {"text": "Bad.", "rank": 1}, {"text": "", "rank": 2}]
    [outcome] = make_pairs(scored_record({"prompt": "Why?", "responses": replies}), PairOptions())
    assert outcome.rows[0]["rejected"][0]["content"] == "Bad."


# --- rows that turn out to be bad once they are asked about ------------------------------------


def test_a_record_is_refused_where_it_stands(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, "no JSON", {"prompt": "b"}, {"prompt": "c"}])

    def read(refused: dict[str, str] | None = None) -> Reader:
        reader = Reader([str(path)], prompt_record, on_error="skip", rejects=Rejects(str(tmp_path / "bad.jsonl")))
        if refused is not None:
            reader.skip(2, refused)
        assert len(list(reader)) == (3 if refused is None else 1)
        return reader

    reader = read()
    reader.finish(1)
    reader.refuse("too long")
    reader.finish(1)
    expected = [("2", "not JSON: "), ("3", "too long")]
    kept = read_rows(tmp_path / "bad.jsonl")
    assert reader.refused == {"1": "too long"} and reader.skipped == 2 and reader.unfinished == 1
    assert [(row["at"].rpartition(":")[2], row["reason"][:10]) for row in kept] == expected
    assert kept[1]["line"] == '{"prompt": "b"}'
    resumed = read(reader.refused)
    assert resumed.skipped == 2 and resumed.digest == reader.digest
    assert [row["at"] for row in read_rows(tmp_path / "bad.jsonl")] == [row["at"] for row in kept]


def test_a_record_is_refused_with_its_line_where_bad_rows_stop(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    reader = Reader([str(path)], prompt_record)
    assert len(list(reader)) == 2
    reader.refuse("too long")
    assert str(reader.error).startswith(f"{path}:1: too long (")


PROMPTS = [{"prompt": f"Question {n}?"} for n in range(8)]
REFUSAL = error(400, "The response was filtered due to the content management policy.", code="content_filter")


def refusing(asked: Asked, *more: str) -> Fault | None:
    return REFUSAL if "Question 3" in asked.text else None


def asking(stub: Stub, *more: str) -> list[str]:
    return [
        "sample",
        "--engine",
        "openai",
        "--model",
        MODEL,
        "--base-url",
        stub.url,
        "--retries",
        "0",
        "-n",
        "2",
        *more,
    ]


def test_a_refused_prompt_is_a_bad_row_of_the_command(srlm: Srlm) -> None:
    write_rows(srlm.folder / "in.jsonl", PROMPTS)
    with Stub(refusing) as stub:
        stopped = srlm(*asking(stub, "--in", "in.jsonl", "--out", "out.jsonl", "--concurrency", "2"))
    assert stopped.code == 3 and stopped.err.splitlines()[-1].startswith(
        "srlm sample: error: in.jsonl:4: a content filter refused it: 400 The response was filtered"
    )
    assert [row["prompt"] for row in read_rows(srlm.folder / "out.jsonl.part")][::2] == [
        f"Question {n}?" for n in range(3)
    ]


def test_a_refused_prompt_is_skipped_counted_and_kept_over_a_resumed_run(srlm: Srlm) -> None:
    """A run that a dead server ended after the bad row is continued: the same rows, counts and rejects."""
    write_rows(srlm.folder / "in.jsonl", [*PROMPTS[:1], {"prompt": ""}, *PROMPTS[1:]])
    skip = ["--in", "in.jsonl", "--on-error", "skip", "--concurrency", "1"]
    with Stub(refusing) as stub:
        whole = srlm(*asking(stub, *skip, "--out", "whole.jsonl", "--rejects", "bad.jsonl"))
        assert whole.code == 0 and "2 dropped: bad row" in whole.err and "2 content filter" in whole.err
        broken = Stub(lambda asked: refusing(asked) or (Fault(503) if "Question 6" in asked.text else None))
        with broken as stub:
            assert srlm(*asking(stub, *skip, "--out", "out.jsonl", "--rejects", "again.jsonl")).code == 1
        part = read_rows(srlm.folder / "out.jsonl.part")
        assert len(part) == 10
    with Stub(refusing) as stub:
        again = srlm(*asking(stub, *skip, "--out", "out.jsonl", "--rejects", "again.jsonl"))
        assert again.code == 0 and len(stub.posts()) == 2
    whole, out = (srlm.folder / name for name in ("whole.jsonl", "out.jsonl"))
    assert out.read_text() == whole.read_text() and len(read_rows(out)) == 14
    counts = [read_json(path.with_name(path.name + ".meta.json"))["counts"] for path in (whole, out)]
    for count in counts:
        count.pop("seconds")
    assert counts[0] == counts[1] and counts[0]["dropped"] == {"bad row": 2}
    bad = read_rows(srlm.folder / "bad.jsonl")
    assert bad == read_rows(srlm.folder / "again.jsonl") and [row["at"] for row in bad] == ["in.jsonl:2", "in.jsonl:5"]
