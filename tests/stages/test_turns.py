"""Conversations: `turns` of the user answered one after the other, judged, paired and trained on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from commands_table import ECHO
from helpers import ListEngine, Srlm, as_lines, read_rows, write_rows
from srlm_cli.engines import LazyEngine
from srlm_cli.engines.base import Completion, EngineSpec, Sampling
from srlm_cli.engines.chat_template import rendered
from srlm_cli.engines.echo import EchoEngine
from srlm_cli.errors import BadRow, DataError
from srlm_cli.records import asks_turns, prompt_record, turns_record
from srlm_cli.stages.sample import SampleOptions, sample
from srlm_cli.train.data import dpo_rows, sft_rows
from srlm_cli.train.render import Renderer
from stub_server import Stub
from tiny import ALONE, TEMPLATE, tiny_model

torch.set_num_threads(1)

TWO = SampleOptions(2, Sampling(), seed=0)
ONE = SampleOptions(1, Sampling(), seed=0)
ROW = {"id": "81", "turns": ["Name a river.", "Where does it end?"], "category": "stem"}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str, **more: str) -> dict:
    return {"role": "assistant", "content": text, **more}


# --- answering ---------------------------------------------------------------------------------


def test_each_turn_has_n_responses_after_the_first_reply_of_the_turn_before() -> None:
    engine = ListEngine([["The Nile.", "The Po."], ["In the sea.", "There."]], model="M1")
    [outcome] = sample([turns_record(ROW)], engine, TWO)
    second = [user("Name a river."), said("The Nile."), user("Where does it end?")]
    assert [request.messages for request in engine.asked] == [[user("Name a river.")], second]
    assert [(row["id"], row["turn"], row["k"], row["response"]) for row in outcome.rows] == [
        ("81/turn-1/0", 1, 0, "The Nile."), ("81/turn-1/1", 1, 1, "The Po."),
        ("81/turn-2/0", 2, 0, "In the sea."), ("81/turn-2/1", 2, 1, "There."),
    ]  # fmt: skip
    assert outcome.rows[3] == {
        "id": "81/turn-2/1", "prompt_id": "81/turn-2", "prompt": second, "category": "stem", "turn": 2, "num_turns": 2,
        "response": "There.", "thought": None, "k": 1, "finish_reason": "stop", "model": "M1",
    }  # fmt: skip
    assert (outcome.counts["responses"], outcome.tokens_in, outcome.tokens_out, outcome.bad) == (4, 20, 4, "")
    assert len({seed for request in engine.asked for seed in request.seeds}) == 4


def test_rows_come_in_order_with_conversations_between_plain_prompts() -> None:
    rows = [
        turns_record({"turns": ["a", "b", "c"]}),
        prompt_record({"prompt": "d"}),
        turns_record({"turns": ["e", "f"]}),
    ]
    alone = [[made.rows for made in sample([row], EchoEngine(), TWO)] for row in rows]
    together = [made.rows for made in sample(rows, EchoEngine(), TWO)]
    assert together == [made for [made] in alone] and [len(made) for made in together] == [6, 2, 4]
    assert "turn" not in together[1][0] and together[0][0]["num_turns"] == 3


class Ahead(EchoEngine):
    """Read so many requests before each answer, as engines do that answer several together."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.ahead, self.calls = ahead, 0

    def generate(self, requests):
        self.calls += 1
        held = []
        for request in requests:
            held.append(request)
            if len(held) >= self.ahead:
                yield from super().generate([held.pop(0)])
        yield from super().generate(held)


@pytest.mark.parametrize("ahead", [1, 3, 99])
def test_how_far_an_engine_reads_ahead_changes_no_row(ahead: int) -> None:
    rows = [turns_record({"turns": [f"{n} {t}" for t in range(1 + n % 3)]}) for n in range(8)]
    plain = [made.rows for made in sample(rows, EchoEngine(), TWO)]
    engine = Ahead(ahead)
    assert [made.rows for made in sample(rows, engine, TWO)] == plain
    assert engine.calls <= 4  # the turns of all conversations go together, a turn at a time at the end


def test_a_turn_without_a_reply_ends_the_conversation_and_is_counted() -> None:
    row = turns_record({"id": "x", "turns": ["a", "b", "c"]})
    for text, response, reason in ((" ", "", "empty replies"), ("<think>\nHm", None, "unfinished thought")):
        [outcome] = sample([row], ListEngine([["So."], [text]]), ONE)
        assert [made["response"] for made in outcome.rows] == ["So.", response] and not outcome.bad
        assert outcome.counts[reason] == 1 and outcome.counts["turns not asked, after one without a reply"] == 1
    [outcome] = sample([row], ListEngine([["<think>\nHm", "So."], ["a", "b"], ["c", "d"]]), TWO)
    assert outcome.rows[2]["prompt"][1] == said("So.") and len(outcome.rows) == 6  # another reply was there


class Refusing(EchoEngine):
    """Give no text from the second turn on, with this finish reason."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def generate(self, requests):
        for request in requests:
            if len(request.messages) > 1:
                yield Completion([""] * len(request.seeds), [self.reason] * len(request.seeds), 1, 0, why="no")
            else:
                yield from super().generate([request])


def test_a_turn_that_is_too_long_is_counted_and_one_that_the_template_refuses_is_a_bad_row() -> None:
    rows = [turns_record(ROW), prompt_record({"prompt": "d"})]
    long, plain = sample(rows, Refusing("prompt-too-long"), TWO)
    assert [row["turn"] for row in long.rows] == [1, 1] and len(plain.rows) == 2 and not long.bad
    assert long.counts["prompt too long"] == 2 and long.counts["responses"] == 2
    refused, plain = sample(rows, Refusing("template-refused"), TWO)
    assert refused.bad == "turn 2: no" and refused.rows == [] and len(plain.rows) == 2


def test_a_thought_of_an_earlier_turn_is_where_templates_look_for_it() -> None:
    engine = ListEngine([["<think>\nLong one.\n</think>\n\nThe Nile."], ["In the sea."]])
    [outcome] = sample([turns_record(ROW)], engine, ONE)
    assert engine.asked[1].messages[1] == said("The Nile.", reasoning_content="Long one.")
    assert outcome.rows[0]["thought"] == "Long one." and outcome.rows[1]["thought"] is None


def test_forms_of_turns() -> None:
    read = turns_record({"prompt": ["a", "b"], "question_id": 7})  # MT-Bench on the hub
    assert (read["prompt"], read["turns"], read["question_id"]) == ("a", ["a", "b"], 7)
    assert read["id"] == turns_record({"turns": ["a", "b"]})["id"] != turns_record({"turns": ["a", "c"]})["id"]
    assert turns_record({"turns": ["a", "b"], "prompt": "a"})["prompt"] == "a"
    system = turns_record({"turns": ["a"], "system": "Rhyme."})
    assert system["prompt"] == [{"role": "system", "content": "Rhyme."}, user("a")]
    for row in ({"prompt": "a", "turns": 3}, {"prompt": "a", "turns": []}, {"prompt": "a", "turns": [{"a": 1}]}):
        assert not asks_turns(row) and [len(made.rows) for made in sample([prompt_record(row)], EchoEngine(), TWO)] == [
            2
        ]
    for row, problem in (
        ({"turns": ["a", " "]}, "an empty one at turn 2"),
        ({"turns": ["a", "b"], "prompt": "c"}, "not the first of `turns`"),
    ):
        with pytest.raises(BadRow, match=problem):
            turns_record(row)
    for row in ({"turns": []}, {"turns": "a"}, {"turns": ["a", None]}, {"turns": ["a", 3], "prompt": "a"}):
        with pytest.raises(BadRow, match="expected `turns`, a list of texts"):
            prompt_record(row)


# --- the commands ------------------------------------------------------------------------------

MANY = [{"turns": [f"Ask {n}.", *[f"More of {n}, {t}." for t in range(n % 3)]], "n": n} for n in range(20)]


def test_shards_and_a_killed_run_give_the_rows_of_a_whole_one(srlm: Srlm) -> None:
    prompts = str(write_rows(srlm.folder / "p.jsonl", MANY))
    argv = ["sample", "--in", prompts, *ECHO, "-n", "2", "--out"]
    assert srlm(*argv, "whole.jsonl").code == 0
    whole = (srlm.folder / "whole.jsonl").read_bytes()
    for shard in ("1/3", "2/3", "3/3"):
        assert srlm(*argv, f"{shard[0]}.jsonl", "--shard", shard).code == 0
    assert b"".join((srlm.folder / f"{at}.jsonl").read_bytes() for at in (1, 2, 3)) == whole
    for after in (1, 9, 30):
        killed = srlm.mortal(after, signal.SIGKILL, *argv, f"k{after}.jsonl")
        assert killed.code != 0 and (srlm.folder / f"k{after}.jsonl.part").exists()
        assert srlm(*argv, f"k{after}.jsonl").code == 0
        assert (srlm.folder / f"k{after}.jsonl").read_bytes() == whole
    assert [row["turn"] for row in read_rows(srlm.folder / "whole.jsonl")][:6] == [1, 1, 1, 1, 2, 2]


def test_from_turns_to_pairs(srlm: Srlm) -> None:
    sampled = srlm("sample", *ECHO, "--system", "Be brief.", stdin=as_lines(MANY))
    judged = srlm("judge", *ECHO, "--conversation", "last", stdin=sampled.out)
    assert sampled.code == judged.code == 0 and len(judged.rows) == len(sampled.rows) == 4 * sum(
        len(row["turns"]) for row in MANY
    )
    assert {row["judge"]["conversation"] for row in judged.rows} == {"last"}
    pairs = srlm("make-pairs", stdin=judged.out)
    assert pairs.code == 0 and {row["turn"] for row in pairs.rows} == {1, 2, 3}
    last = next(row for row in pairs.rows if row["turn"] == 3)
    assert [turn["role"] for turn in last["prompt"]] == ["system", *["user", "assistant"] * 2, "user"]
    assert last["prompt_id"].endswith("/turn-3") and last["num_turns"] == 3
    assert srlm("eval", "health", stdin=judged.out).code == 0


def test_the_judge_sees_the_whole_conversation_or_its_last_turn(srlm: Srlm) -> None:
    prompt = [user("Name a river."), said("The Nile."), user("Where does it end?")]
    rows = as_lines([{"prompt": prompt, "response": "In the sea.", "model": "m"}])
    whole, last = (
        srlm("judge", *ECHO, "--show", "1", "--conversation", which, stdin=rows) for which in ("whole", "last")
    )
    assert "User: Name a river.\n\nAssistant: The Nile.\n\nUser: Where does it end?" in whole.out
    assert "Where does it end?" in last.out and "Nile" not in last.out and "In the sea." in last.out
    judged = [srlm("judge", *ECHO, *more, stdin=rows).rows[0] for more in ((), ("--conversation", "last"))]
    assert "conversation" not in judged[0]["judge"] and judged[0]["judgements"] != judged[1]["judgements"]
    meta = srlm("judge", "--meta", *ECHO, stdin=as_lines([{**judged[1], "judgements": ["Score: 1", "Score: 2", "x"]}]))
    assert "Nile" not in json.dumps(meta.rows[0]["judge_prompt"]) and meta.code == 0


def test_turns_are_held_out_as_single_prompts_and_as_conversations(srlm: Srlm) -> None:
    held = str(write_rows(srlm.folder / "held.jsonl", [ROW]))
    model = str(tiny_model(srlm.folder / "m0"))
    conversation = [user("name a RIVER."), said("The Po."), user("Where does it end?")]
    for prompt, code in (("Name a river.", 3), (conversation, 3), (conversation[:2] + [user("Why?")], 0)):
        rows = as_lines([{"prompt": prompt, "completion": "So."}])
        done = srlm("sft", "--model", model, "--out", "m", "--held-out", held, "--dry-run", stdin=rows, env=ALONE)
        assert done.code == code and ("do not train on evaluation prompts" in done.err) is (code == 3), done.err


# --- training ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("turns") / "m")


@pytest.fixture
def tokenizer(model: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


SHOWS_LAST_THOUGHT = (
    "{% if loop.last and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}"
)
DIALOGUE = [user("a?"), said("One."), user("b?"), said("Two."), user("c?")]


def trained(tokenizer, rows: list[dict], turns: str, **more) -> tuple[list[tuple[str, str]], object]:
    """Return (text before the target, target) of each row."""
    made, report = sft_rows(rows, Renderer(tokenizer), 999, turns=turns, **more)
    parts = []
    for row in made:
        start = row["labels"].count(-100)
        parts.append((tokenizer.decode(row["input_ids"][:start]), tokenizer.decode(row["input_ids"][start:])))
    return parts, report


def test_all_turns_are_trained_after_what_sampling_shows(tokenizer) -> None:
    row = {"prompt": DIALOGUE, "completion": "Three.", "thought": "Hm."}
    assert [target for _, target in trained(tokenizer, [row], "reply")[0]] == [
        "<think>\nHm.\n</think>\n\nThree.<|end|>"
    ]
    parts, report = trained(tokenizer, [row, {**row, "completion": "Four."}], "all")
    assert [target.split("\n")[-1] for _, target in parts] == [
        "One.<|end|>",
        "Two.<|end|>",
        "Three.<|end|>",
        "Four.<|end|>",
    ]
    assert [head for head, _ in parts[:3]] == [rendered(tokenizer, DIALOGUE[:at], today=None) for at in (1, 3, 5)]
    assert "2 duplicates dropped" in report.line("rows")  # the turns that both rows begin with
    assert "4 of earlier turns of the assistant" in report.line("rows")


def test_a_template_that_drops_earlier_thoughts_trains_each_turn_as_it_was_sampled(tokenizer) -> None:
    """As Qwen3 does it: of the first turn the thought is shown when it is written, and not any more later."""
    tokenizer.chat_template = TEMPLATE.replace("{{ m['content'] }}", SHOWS_LAST_THOUGHT)
    prompt = [user("a?"), said("One.", reasoning_content="Hm."), user("b?")]
    parts, _ = trained(tokenizer, [{"prompt": prompt, "completion": "Two."}], "all")
    assert parts[0][1] == "<think>\nHm.\n</think>\n\nOne.<|end|>" and parts[1][1] == "Two.<|end|>"
    assert parts[1][0] == rendered(tokenizer, prompt, today=None) and "Hm." not in parts[1][0]


def test_rows_of_the_judge_keep_their_examples_untrained_and_empty_turns_are_refused(tokenizer) -> None:
    eft = {"id": "e", "prompt": DIALOGUE, "completion": "Score: 4", "score": 4}
    assert [target for _, target in trained(tokenizer, [eft], "all")[0]] == ["Score: 4<|end|>"]
    empty = {"id": "7", "prompt": [user("a?"), said(" "), user("b?")], "completion": "So."}
    with pytest.raises(DataError, match="row 7: a turn of the assistant in its prompt is empty"):
        trained(tokenizer, [empty], "all")
    parts, report = trained(tokenizer, [empty, {"prompt": "x", "completion": "y"}], "all", refuse=lambda *_: None)
    assert len(parts) == 1 and report.refused == 1


def test_only_the_last_turns_of_sampled_conversations(tokenizer) -> None:
    pairs = [
        {"prompt": DIALOGUE[:at], "chosen": "Yes.", "rejected": "No.", "turn": turn, "num_turns": 2}
        for at, turn in ((1, 1), (3, 2))
    ]
    other = {"prompt": "x", "chosen": "y", "rejected": "z"}
    for turns, count in (("reply", 3), ("all", 3), ("last", 2)):
        made, report = dpo_rows([*pairs, other], Renderer(tokenizer), 999, turns=turns)
        assert len(made) == count and report.not_last == 3 - count
    assert "1 left out by --train-turns last" in report.line("pairs")
    assert tokenizer.decode(made[0]["prompt_ids"]) == rendered(tokenizer, DIALOGUE[:3], today=None)


def test_the_option_reaches_the_training(srlm: Srlm, model: Path) -> None:
    rows = as_lines([{"prompt": DIALOGUE, "completion": "Three."}])
    for turns, count in (("reply", 1), ("all", 3)):
        argv = ["sft", "--model", str(model), "--out", "m", "--dry-run", "--train-turns", turns]
        done = srlm(*argv, stdin=rows, env=ALONE)
        assert done.code == 0 and f"{count} rows, " in done.err, done.err
    refused = srlm(*argv, "--positive-only", stdin=rows, env=ALONE)
    assert refused.code == 2 and "a score of its own" in refused.err


# --- the engines -------------------------------------------------------------------------------


def texts(rows: list[dict], spec: EngineSpec) -> list[list[tuple[str, str]]]:
    engine = LazyEngine(spec)
    options = SampleOptions(2, Sampling(temperature=1.0, max_new_tokens=6), seed=0)
    return [[(row["id"], row["response"]) for row in made.rows] for made in sample(rows, engine, options)]


def test_the_own_engine_answers_each_conversation_as_if_it_were_alone(model: Path) -> None:
    rows = [turns_record({"turns": [f"{n} {t}?" for t in range(1 + n % 3)]}) for n in range(6)]
    spec = EngineSpec("hf", str(model), device="cpu", dtype="float32", batch_size=4)
    together = texts(rows, spec)
    assert together == [made for row in rows for made in texts([row], spec)]
    assert [len(made) for made in together] == [2, 4, 6, 2, 4, 6]


def test_a_server_is_sent_the_conversation_so_far(srlm: Srlm) -> None:
    with Stub() as server:
        argv = ["sample", "--engine", "openai", "--base-url", server.url, "--model", "stub-model", "--route", "chat"]
        done = srlm(*argv, "-n", "2", stdin=as_lines([ROW, {"prompt": "Why?"}]))
        assert done.code == 0, done.err
        asked = [body["messages"] for body in (one.body for one in server.asked) if "messages" in body]
    first = done.rows[0]["response"]
    assert [len(messages) for messages in asked if messages[0]["content"] == ROW["turns"][0]][-1] == 3
    assert [user(ROW["turns"][0]), said(first), user(ROW["turns"][1])] in asked
    assert [row["id"] for row in done.rows][:4] == ["81/turn-1/0", "81/turn-1/1", "81/turn-2/0", "81/turn-2/1"]
