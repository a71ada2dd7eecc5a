"""Thoughts behind a server: in a field of their own, in the text, cut off, and what is asked after them."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import Srlm, as_lines
from srlm_cli.engines import open_engine, template_kwargs
from srlm_cli.engines.base import Completion, EngineSpec, Request, Sampling
from srlm_cli.errors import EngineError, OptionError
from srlm_cli.thoughts import UNFINISHED
from stub_server import MODEL, Asked, Stub
from tiny import tiny_model, with_template

CLOSED, CUT = "<think>\nHm.\n</think>\n\nFour.", "<think>\nHm"
OPENED = {"": "", "reasoning": "<think>\n", "reasoning_content": "<think>\n"}  # by the prompt, where it is not told
OPENS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """Return a model whose template opens a thought."""
    folder = tmp_path_factory.mktemp("models")
    return str(with_template(tiny_model(folder / "m"), folder / "opens", OPENS))


def spec(stub: Stub, **more) -> EngineSpec:
    return EngineSpec("openai", MODEL, base_url=stub.url, retries=0, **more)


def ask(text: str = "Two and two?", **more) -> Request:
    return Request([{"role": "user", "content": text}], Sampling(0.7, 0.9, 16), (1,), **more)


def answers(stub: Stub, *requests: Request, **more) -> list[Completion]:
    return list(open_engine(spec(stub, **more)).generate(requests))


@pytest.mark.parametrize("field", ["", "reasoning", "reasoning_content"])
def test_a_thought_is_apart_however_the_server_has_it(field: str) -> None:
    with Stub(write=lambda text, seed: CUT if "cut" in text else CLOSED) as stub:
        stub.thoughts_in = field
        done, cut = answers(stub, ask(), ask("cut"))
    assert (done.texts, done.thoughts[0].text, done.finish_reasons) == (["Four."], "Hm.", ["stop"])
    assert (cut.texts, cut.thoughts[0].text, cut.finish_reasons) == ([""], "Hm", [UNFINISHED])


@pytest.mark.parametrize("field", ["", "reasoning", "reasoning_content"])
def test_a_thought_is_as_the_model_wrote_it_however_the_server_has_it(field: str, tokenizer: str) -> None:
    """A score is asked for after it, so no line break may be there twice. A stop text counts in the answer alone."""
    sampling = Sampling(0.7, 0.9, 16, stop=("\n\n",))
    with Stub(write=lambda text, seed: CLOSED + "\n\nFive.") as stub:
        stub.thoughts_in = field
        [done] = answers(stub, Request(ask().messages, sampling, (1,)), tokenizer=tokenizer)
    assert (done.texts, done.thoughts[0].raw) == (["Four."], CLOSED.removesuffix("Four.").removeprefix(OPENED[field]))


def test_what_continues_an_answer_is_no_thought() -> None:
    """vLLM 0.32 with `--reasoning-parser qwen3` answers so after `continue_final_message`: content null."""
    with Stub(write=lambda text, seed: " Four.") as stub:
        stub.thoughts_in = "reasoning"
        [done] = answers(stub, ask(prefix="The answer is: "))
        [asked] = stub.posts()
    assert asked.body["continue_final_message"] is True
    assert (done.texts, done.thoughts, done.finish_reasons) == (["Four."], (), ["stop"])


@pytest.mark.parametrize("owner", ["vllm", "sglang", "llamacpp", ""])
def test_marks_that_are_special_tokens_stay_in_texts(owner: str) -> None:
    """vLLM 0.32 without a reasoning parser removes them, and the thought is a part of the answer."""

    def write(text: str, seed: int) -> str:
        return CLOSED if stub.posts()[-1].body.get("skip_special_tokens") is False else "\nHm.\n\n\nFour."

    with Stub(write=write, owner=owner) as stub:
        [done] = answers(stub, ask())
    assert (done.texts == ["Four."]) is (owner in ("vllm", "sglang"))


def test_a_lone_closing_mark_ends_a_thought_that_the_server_has_opened() -> None:
    with Stub(write=lambda text, seed: "Hm.\n</think>\n\nFour.") as stub:
        [done] = answers(stub, ask())
    assert (done.texts, done.thoughts[0].text) == (["Four."], "Hm.")


@pytest.mark.parametrize(("greeting", "thinks"), [("Hm.\n</think>\n\nHi!", True), ("Hi!", False)])
def test_a_reply_that_was_cut_off_without_a_mark_is_a_thought_if_a_greeting_begins_with_one(greeting, thinks) -> None:
    with Stub(write=lambda text, seed: greeting if text == "Hello!" else "Let me see", reason="length") as stub:
        done = answers(stub, ask(), ask("Three?"))
        asked = [asked.text for asked in stub.posts()]
    assert [one.finish_reasons for one in done] == [[UNFINISHED if thinks else "length"]] * 2
    assert [one.texts for one in done] == [["" if thinks else "Let me see"]] * 2
    assert asked.count("Hello!") == 1


def test_the_template_at_hand_tells_what_was_cut_off(tokenizer: str) -> None:
    with Stub(write=lambda text, seed: "Let me see", reason="length") as stub:
        for route in ("chat", "completion"):
            [done] = answers(stub, ask(), tokenizer=tokenizer, route=route)
            assert (done.finish_reasons, done.thoughts[0].text) == ([UNFINISHED], "Let me see")
        assert len(stub.posts()) == 2


@pytest.mark.parametrize("field", ["", "reasoning"])
def test_a_reply_without_the_thought_of_its_prompt_is_an_answer_if_other_replies_have_theirs(field, tokenizer) -> None:
    with Stub(write=lambda text, seed: CLOSED if text == "Hello!" else "</think>Four.") as stub:
        stub.thoughts_in = field
        [done] = answers(stub, ask(), tokenizer=tokenizer)
    assert (done.texts, done.finish_reasons) == (["Four."], ["stop"])


def test_a_server_that_removes_the_marks_of_thoughts_is_found_out(tokenizer: str) -> None:
    """As `transformers serve` 5.23 does where they are special tokens."""
    with Stub(write=lambda text, seed: "\nHm.\n\n\nFour.") as stub:
        with pytest.raises(EngineError, match="opens a thought, and the replies of .* have none"):
            answers(stub, ask(), tokenizer=tokenizer)
        assert answers(stub, ask())[0].texts == ["\nHm.\n\n\nFour."]  # nothing here knows of thoughts


def test_options_of_the_template_and_further_fields_are_sent() -> None:
    with Stub() as stub:
        engine = open_engine(
            spec(stub, thinking="off", template_kwargs='{"effort": "low"}', extra_body='{"thinking_token_budget": 9}')
        )
        list(engine.generate([ask(), ask(template_kwargs={"effort": "high"})]))
        bodies = [asked.body for asked in stub.posts()]
    assert [body["thinking_token_budget"] for body in bodies] == [9, 9]
    assert sorted(body["chat_template_kwargs"]["effort"] for body in bodies) == ["high", "low"]
    assert all(body["chat_template_kwargs"]["enable_thinking"] is False for body in bodies)


def test_filters_are_sent_where_they_change_something() -> None:
    sampling = Sampling(top_k=20, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.5)
    with Stub() as stub:
        list(open_engine(spec(stub)).generate([Request(ask().messages, sampling, (1,)), ask()]))
        first, second = sorted((asked.body for asked in stub.posts()), key=len, reverse=True)
    filters = {"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.5}
    assert filters.items() <= first.items() and not filters.keys() & second.keys()


def test_llama_cpp_gets_its_own_name_of_the_repetition_penalty() -> None:
    with Stub(owner="llamacpp") as stub:
        list(open_engine(spec(stub)).generate([Request(ask().messages, Sampling(repetition_penalty=1.3), (1,))]))
        [body] = [asked.body for asked in stub.posts()]
    assert body["repeat_penalty"] == 1.3 and "repetition_penalty" not in body


STEPS = [{"4": 0.6, "5": 0.3, "3": 0.1}, {".": 1.0}]


def test_a_score_is_asked_for_after_the_thought_as_text(tokenizer: str) -> None:
    """By the completions route with the template rendered here: the thought as the model wrote it, closed."""
    request = ask(thought="Hm", prefix="Score: ", choices=("3", "4", "5"))
    with Stub(steps=lambda asked: STEPS) as stub:
        [done] = answers(stub, request, tokenizer=tokenizer)
        [asked] = stub.posts("/completions")[-1:]
    assert asked.path == "/completions" and done.probabilities == pytest.approx([0.1, 0.6, 0.3])
    assert asked.text.endswith("<|assistant|>\n<think>\nHm\n</think>\n\nScore:")


def test_without_the_template_nothing_is_asked_after_a_thought() -> None:
    request = ask(thought="<think>Hm</think>", prefix="Score: ", choices=("3", "4", "5"))
    with Stub(steps=lambda asked: STEPS) as stub, pytest.raises(EngineError, match="cannot continue after a thought"):
        answers(stub, request)


def test_a_direct_score_comes_after_a_closed_thought(tokenizer: str) -> None:
    def behave(asked: Asked):
        from stub_server import refuse

        return refuse(asked, "continue_final_message")

    with Stub(behave, steps=lambda asked: STEPS) as stub:
        answers(stub, ask(prefix="Score: ", choices=("3", "4", "5")), tokenizer=tokenizer)
        asked = stub.posts("/completions")[-1]
    assert asked.text.endswith("<think>\n\n</think>\n\nScore:")


def test_a_server_has_no_limit_of_thoughts() -> None:
    with Stub() as stub, pytest.raises(OptionError, match="a server closes thoughts itself"):
        list(open_engine(spec(stub)).generate([Request(ask().messages, Sampling(max_thinking_tokens=4), (1,))]))


def test_options_that_the_template_at_hand_ignores_are_refused(tokenizer: str) -> None:
    with Stub() as stub:
        assert template_kwargs(spec(stub, thinking="on")) == {"enable_thinking": True}
        with pytest.raises(OptionError, match="always opens"):
            template_kwargs(spec(stub, thinking="off", tokenizer=tokenizer))


def test_rows_of_a_thinking_server(srlm: Srlm, tmp_path: Path) -> None:
    with Stub(write=lambda text, seed: CUT if seed % 2 else CLOSED) as stub:
        stub.thoughts_in = "reasoning"
        argv = ["--engine", "openai", "--base-url", stub.url, "--model", MODEL]
        done = srlm("sample", *argv, "-n", "4", stdin=as_lines([{"prompt": "Two and two?"}]))
    assert {(row["response"], row["thought"]) for row in done.rows} == {("Four.", "Hm."), (None, "Hm")}
    assert "unfinished thought" in done.err and "--max-new-tokens 512" in done.err
    assert "--max-thinking-tokens" not in done.err and "--extra-body '{\"thinking_token_budget\": 512}'" in done.err
