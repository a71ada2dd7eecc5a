"""Sampling: N responses a prompt, each with an id and a seed of its own; the echo engine behind it."""

from __future__ import annotations

import pytest

from helpers import ListEngine
from srlm_cli.engines import LazyEngine, open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling
from srlm_cli.engines.echo import EchoEngine
from srlm_cli.errors import OptionError
from srlm_cli.records import prompt_record
from srlm_cli.stages.sample import SampleOptions, sample

PROMPTS = [prompt_record({"prompt": f"Question {n}?", "tag": n}) for n in range(3)]
TWO = SampleOptions(2, Sampling(), seed=0)


def test_n_responses_a_prompt_in_the_order_of_the_prompts() -> None:
    engine = ListEngine([[f" a{n} ", f"b{n}\n"] for n in range(3)], model="M1")
    made = [outcome.rows for outcome in sample(PROMPTS, engine, TWO)]
    assert [[row["response"] for row in rows] for rows in made] == [["a0", "b0"], ["a1", "b1"], ["a2", "b2"]]
    own = PROMPTS[1]["id"]
    assert made[1][1] == {
        "id": f"{own}/1", "prompt_id": own, "prompt": "Question 1?", "tag": 1, "response": "b1", "k": 1,
        "finish_reason": "stop", "model": "M1",
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
