"""Sampling: N responses a prompt, each with an id and a seed of its own; the echo engine behind it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from commands_table import ECHO
from helpers import ListEngine, Srlm, as_lines
from srlm_cli.engines import LazyEngine, open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling
from srlm_cli.engines.echo import EchoEngine
from srlm_cli.errors import OptionError
from srlm_cli.options.common import SamplingOptions
from srlm_cli.records import prompt_record
from srlm_cli.stages.sample import SampleOptions, sample
from tiny import ALONE, tiny_model

PROMPTS = [prompt_record({"prompt": f"Question {n}?", "tag": n}) for n in range(3)]
TWO = SampleOptions(2, Sampling(), seed=0)


def test_n_responses_a_prompt_in_the_order_of_the_prompts() -> None:
    engine = ListEngine([[f" a{n} ", f"b{n}\n"] for n in range(3)], model="M1")
    made = [outcome.rows for outcome in sample(PROMPTS, engine, TWO)]
    assert [[row["response"] for row in rows] for rows in made] == [["a0", "b0"], ["a1", "b1"], ["a2", "b2"]]
    own = PROMPTS[1]["id"]
    assert made[1][1] == {
        "id": f"{own}/1", "prompt_id": own, "prompt": "Question 1?", "tag": 1, "response": "b1",
        "thought": None, "k": 1, "finish_reason": "stop", "model": "M1",
    }  # fmt: skip


def test_a_seed_does_not_depend_on_what_stands_beside() -> None:
    def seeds(rows: list[dict], seed: int = 0) -> dict[str, tuple[int, ...]]:
        engine = ListEngine([["a", "b"]] * 3)
        list(sample(rows, engine, SampleOptions(2, Sampling(), seed)))
        return {row["id"]: request.seeds for row, request in zip(rows, engine.asked, strict=True)}

    whole = seeds(PROMPTS)
    assert len({seed for own in whole.values() for seed in own}) == 6
    assert seeds(PROMPTS[::-1]) == whole
    assert seeds(PROMPTS[1:]) == {row["id"]: whole[row["id"]] for row in PROMPTS[1:]}
    assert seeds(PROMPTS, 1) != whole


def test_responses_that_were_cut_off_are_counted() -> None:
    [outcome] = sample(PROMPTS[:1], ListEngine([["a", "b"]], reasons="length"), TWO)
    assert outcome.counts == {"responses": 2, "cut off": 2} and outcome.read == 1


def test_rows_are_pulled_lazily() -> None:
    pulled = []

    def prompts():
        for row in PROMPTS:
            pulled.append(row)
            yield row

    outcomes = sample(prompts(), ListEngine([["a", "b"]] * 3), TWO)
    next(outcomes)
    assert len(pulled) == 1


def test_the_chat_is_passed_on_as_messages() -> None:
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    engine = ListEngine([["a", "b"]] * 2)
    list(sample([prompt_record({"prompt": turns}), PROMPTS[0]], engine, TWO))
    assert [request.messages for request in engine.asked] == [turns, [{"role": "user", "content": "Question 0?"}]]


def test_an_engine_is_opened_once_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srlm_cli.engines.open_engine", lambda spec: ListEngine([["a", "b"]] * 9))
    engine = LazyEngine(EngineSpec("hf", "M1"))
    assert list(sample([], engine, TWO)) == [] and engine.loads == 0 and engine.model == "M1"
    for _ in range(2):
        assert len(list(sample(PROMPTS, engine, TWO))) == 3
    assert engine.loads == 1 and engine.model == "fake"  # the opened engine knows its model: a server's only one


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(OptionError, match="no engine"):
        open_engine(EngineSpec("gpt"))


def ask(text: str = "Why?", **more) -> Request:
    return Request(**{"messages": [{"role": "user", "content": text}], "sampling": Sampling(), "seeds": (1, 2), **more})


def test_echo_answers_alike_to_the_same_and_differently_to_another() -> None:
    def answer(request: Request) -> tuple[str, ...]:
        [completion] = EchoEngine().generate([request])
        return tuple(completion.texts)

    assert answer(ask()) == answer(ask())
    assert len({answer(ask()), answer(ask("What?")), answer(ask(seeds=(1, 3))), answer(ask(prefix="x"))}) == 4
    assert answer(ask())[0] != answer(ask())[1]


def test_echo_keeps_to_choices_lengths_and_stop_texts() -> None:
    cut, chosen, stopped = EchoEngine().generate(
        [
            ask(sampling=Sampling(max_new_tokens=2)),
            ask(choices=("A", "B")),
            ask(sampling=Sampling(stop=("\n",))),
        ]
    )
    assert [len(text.split()) for text in cut.texts] == [2, 2] and cut.finish_reasons == ["length"] * 2
    assert set(chosen.texts) <= {"A", "B"} and chosen.probabilities == [0.5, 0.5]
    assert not any("Score" in text for text in stopped.texts) and stopped.finish_reasons == ["stop"] * 2


def test_thoughts_stand_beside_the_responses() -> None:
    texts = ["<think>\nHm.\n</think>\n\nBecause.", "<think>\nHm"]
    [outcome] = sample(PROMPTS[:1], ListEngine([texts]), TWO)
    assert [(row["response"], row["thought"], row["finish_reason"]) for row in outcome.rows] == [
        ("Because.", "Hm.", "stop"), (None, "Hm", "unfinished-thought"),
    ]  # fmt: skip
    assert outcome.counts == {"responses": 2, "unfinished thought": 1} and not outcome.bad


def test_the_options_of_the_chat_template_are_asked_with_and_written_down() -> None:
    row = {**PROMPTS[0], "chat_template_kwargs": {"effort": "low"}}
    engine = ListEngine([["a", "b"]])
    options = SampleOptions(2, Sampling(), 0, {"enable_thinking": False, "effort": "high"})
    [outcome] = sample([row], engine, options)
    wanted = {"enable_thinking": False, "effort": "low"}
    assert engine.asked[0].template_kwargs == wanted
    assert all(made["chat_template_kwargs"] == wanted for made in outcome.rows)


def test_a_system_message_stands_before_the_prompt(srlm: Srlm) -> None:
    (srlm.folder / "system.txt").write_text("Be brief.\n")
    rows = [{"prompt": "Why?"}, {"prompt": [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "?"}]}]
    done = srlm("sample", *ECHO, "-n", "1", "--system", "system.txt", "--on-error", "skip", stdin=as_lines(rows))
    [made] = done.rows
    assert made["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert made["prompt_id"] == prompt_record(rows[0])["id"] and "1 dropped: bad row" in done.err


def test_a_file_of_a_system_message_that_is_not_there_is_not_the_message(srlm: Srlm) -> None:
    (srlm.folder / "bom.txt").write_bytes(b"\xef\xbb\xbfBe brief.\r\n")
    for system, read in (("bom.txt", "Be brief."), ("/no_think", "/no_think"), ("See notes.txt", "See notes.txt")):
        [made] = srlm("sample", *ECHO, "-n", "1", "--system", system, stdin='{"prompt": "Why?"}\n').rows
        assert made["prompt"][0]["content"] == read
    refused = srlm("sample", *ECHO, "--system", "sytem.txt", stdin="")
    assert refused.code == 2 and "there is no file sytem.txt" in refused.err


def test_the_settings_of_a_model_are_used_only_when_asked_for_and_then_shown(srlm: Srlm, tmp_path) -> None:
    model = tiny_model(tmp_path / "m")
    (model / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": true}')
    spec = EngineSpec(model=str(model))
    own = SamplingOptions(temperature=1.0, min_p=0.1)
    assert own.sampling(spec) == Sampling(temperature=1.0, min_p=0.1)
    asked = replace(own, sampling_="model").sampling(spec)
    assert asked == Sampling(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1)
    argv = ["sample", "--model", str(model), "-n", "1", "--max-new-tokens", "2", "--sampling", "model"]
    done = srlm(*argv, stdin=as_lines([{"prompt": "Why?"}]), env=ALONE)
    assert done.code == 0 and "--sampling model: temperature 0.6, top_p 0.95, top_k 20" in done.err
    (model / "generation_config.json").write_text("{}")
    with pytest.raises(OptionError, match="no settings for sampling"):
        replace(own, sampling_="model").sampling(spec)
    with pytest.raises(OptionError, match="--engine hf or vllm"):
        replace(own, sampling_="model").sampling(EngineSpec("openai", "m"))


def test_a_limit_of_thoughts_leaves_room_for_an_answer() -> None:
    with pytest.raises(OptionError, match="leaves no room"):
        SamplingOptions(max_new_tokens=8, max_thinking_tokens=8).sampling(EngineSpec())
