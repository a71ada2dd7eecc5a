"""The openai engine against a server in this process that fails in all the ways that servers fail."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from helpers import Srlm, as_lines, read_json, read_rows, write_rows
from srlm_cli import templates
from srlm_cli.engines import LazyEngine, open_engine
from srlm_cli.engines.base import Completion, EngineSpec, Request, Sampling
from srlm_cli.engines.choice_probabilities import Step, masses, named_in, pick, shared
from srlm_cli.errors import EngineError, OptionError
from srlm_cli.records import response_record
from srlm_cli.stages.judge import JudgeOptions, judge
from stub_server import MODEL, Asked, Fault, Stub, error, number_of, refuse, words

openai = pytest.importorskip("openai")

SCORES = tuple("012345")
PROMPTS = [{"prompt": f"Question {n}?"} for n in range(12)]


@pytest.fixture(autouse=True)
def _quick_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def engine_of(stub: Stub, **more):
    return open_engine(EngineSpec("openai", **{"model": MODEL, "base_url": stub.url, "retries": 3, **more}))


def ask(text: str, *seeds: int, sampling: Sampling | None = None, **more) -> Request:
    return Request([{"role": "user", "content": text}], sampling or Sampling(), seeds or (1,), **more)


def numbered(count: int) -> list[Request]:
    return [ask(f"Question {n}", n) for n in range(count)]


def answers(stub: Stub, requests: list[Request], **more) -> list[Completion]:
    return list(engine_of(stub, **more).generate(requests))


def first_try(fault: Fault):
    """Return the behaviour of a server that fails the first try of every text."""
    seen: set[str] = set()

    def behave(asked: Asked) -> Fault | None:
        new = asked.text not in seen
        seen.add(asked.text)
        return fault if new else None

    return behave


# --- what is asked, what comes back ----------------------------------------------------------


def test_a_request_is_one_post_with_n_and_a_seed() -> None:
    sampling = Sampling(0.6, 0.8, 77, stop=("END", "\n\n"))
    with Stub() as stub:
        [completion] = answers(stub, [ask("Why?", 2**40 + 5, 11, 12, sampling=sampling)])
        [asked] = stub.asked
    assert asked.path == "/chat/completions"
    assert asked.body == {
        "model": MODEL, "messages": [{"role": "user", "content": "Why?"}], "temperature": 0.6, "top_p": 0.8,
        "max_tokens": 77, "stop": ["END", "\n\n"], "n": 3, "seed": 5,
    }  # fmt: skip
    assert completion.texts == [words("Why?", seed) for seed in (5, 6, 7)]
    assert completion.finish_reasons == ["stop"] * 3
    assert completion.tokens_in == 1 and completion.tokens_out == 3 * 7


@pytest.mark.parametrize(
    ("reason", "expected"), [("stop", "Score: 5\nNo, it is wrong.\nScore: 1"), ("length", "Score: 5")]
)
def test_a_last_line_cuts_off_only_what_did_not_end_by_itself(reason: str, expected: str) -> None:
    sampling = Sampling(last_line=r"Score: \d")
    with Stub(write=lambda text, seed: "Score: 5\nNo, it is wrong.\nScore: 1", reason=reason) as stub:
        [completion] = answers(stub, [ask("Why?", sampling=sampling)])
    assert (completion.texts, completion.finish_reasons) == ([expected], ["stop"])


def test_greedy_completions_are_asked_for_once() -> None:
    with Stub() as stub:
        [completion] = answers(stub, [ask("Why?", 4, 5, 6, sampling=Sampling(temperature=0.0))])
        assert len(stub.asked) == 1 and "n" not in stub.asked[0].body
    assert completion.texts == [words("Why?", 4)] * 3


def test_order_is_kept_whatever_is_done_first() -> None:
    with Stub(delay=lambda asked: 0.002 * ((number_of(asked) * 7) % 11)) as stub:
        made = answers(stub, numbered(40), concurrency=8)
        assert stub.most <= 8
    assert [one.texts for one in made] == [[words(f"Question {n}", n)] for n in range(40)]


@pytest.mark.parametrize("concurrency", [1, 5])
def test_so_many_requests_are_in_flight_and_no_more(concurrency: int) -> None:
    with Stub(delay=lambda asked: 0.03) as stub:
        answers(stub, numbered(4 * concurrency + 3), concurrency=concurrency)
        assert stub.most == concurrency


def test_the_bound_holds_for_one_by_one_requests_too() -> None:
    with Stub(delay=lambda asked: 0.01, takes_n=False) as stub:
        answers(stub, [ask(f"Question {n}", *range(6)) for n in range(6)], concurrency=4)
        assert stub.most == 4 and len(stub.asked) == 36


def test_an_endless_input_is_read_only_so_far_ahead() -> None:
    pulled = itertools.count()

    def endless() -> Iterator[Request]:
        for n in pulled:
            yield ask(f"Question {n}", n)

    with Stub(delay=lambda asked: 0.005) as stub:
        made = engine_of(stub, concurrency=3).generate(endless())
        for _ in range(10):
            next(made)
        assert next(pulled) <= 10 + 4 * 3 + 1
        made.close()
        time.sleep(0.05)
        asked = len(stub.asked)
        time.sleep(0.1)
        assert len(stub.asked) == asked  # nothing goes on behind a caller who has gone


def test_a_stopped_caller_does_not_wait_for_a_hanging_server() -> None:
    with Stub(lambda asked: Fault(hang=True) if number_of(asked) else None) as stub:
        made = engine_of(stub).generate(iter(numbered(5)))
        assert next(made).texts == [words("Question 0", 0)]
        closer = threading.Thread(target=made.close)
        closer.start()
        closer.join(5)
        assert not closer.is_alive()


def test_two_streams_of_one_engine_share_the_bound() -> None:
    """The judge asks for the scores of some judgements while later judgements are being written."""
    with Stub(delay=lambda asked: 0.005) as stub:
        engine = engine_of(stub, concurrency=4)
        outer = engine.generate(iter(numbered(20)))
        for _ in range(5):
            next(outer)
        inner = list(engine.generate([ask(f"Inner {n}", n) for n in range(6)]))
        assert [one.texts[0] for one in inner] == [words(f"Inner {n}", n) for n in range(6)]
        assert len(list(outer)) == 15 and stub.most <= 4


def test_an_engine_that_is_no_longer_used_leaves_no_thread_and_no_open_loop(monkeypatch) -> None:
    before, loops, new = engine_threads(), [], asyncio.new_event_loop
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: loops.append(new()) or loops[-1])
    with Stub() as stub:
        answers(stub, [ask("Why?")])
    until = time.monotonic() + 10
    while not all(loop.is_closed() for loop in loops) and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert loops and all(loop.is_closed() for loop in loops)
    while engine_threads() > before and time.monotonic() < until:  # a thread ends after it has closed its loop
        time.sleep(0.01)
    assert engine_threads() <= before


def engine_threads() -> int:
    return sum(thread.name == "openai" for thread in threading.enumerate())


# --- servers that have less ------------------------------------------------------------------


def test_a_server_that_ignores_n_is_asked_one_by_one() -> None:
    with Stub(takes_n=False) as stub:
        [completion] = answers(stub, [ask("Why?", 21, 31, 41)])
        assert stub.asked[0].body["seed"] == 21 and {asked.body["seed"] for asked in stub.asked[1:]} == {31, 41}
    assert completion.texts == [words("Why?", seed) for seed in (21, 31, 41)]
    assert completion.tokens_in == 1 and completion.tokens_out == 21


@pytest.mark.parametrize("field", ["n", "seed", "stop"])
def test_a_refused_field_is_left_out_for_the_rest_of_the_run(field: str, capsys: pytest.CaptureFixture) -> None:
    requests = [ask(f"Question {n}", 1, 2, sampling=Sampling(stop=("END",))) for n in range(3)]
    with Stub(lambda asked: refuse(asked, field), takes_n=field != "n") as stub:
        made = answers(stub, requests, concurrency=1)
        assert sum(field in asked.body for asked in stub.asked) == 1
    assert [len(one.texts) for one in made] == [2, 2, 2]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"rejects `{field}`" in said


def test_a_field_is_found_in_what_other_servers_say() -> None:
    wrong = {"type": "extra_forbidden", "loc": ["body", "n"], "msg": "Extra inputs are not permitted"}
    pydantic = {"detail": [{**wrong, "input": {"temperature": 0.7, "seed": 1}}]}
    with Stub(lambda asked: Fault(422, pydantic) if "n" in asked.body else None, takes_n=False) as stub:
        assert len(answers(stub, [ask("Why?", 1, 2)])[0].texts) == 2


def test_max_tokens_has_another_name_for_some_models() -> None:
    with Stub(lambda asked: refuse(asked, "max_tokens")) as stub:
        answers(stub, numbered(2), concurrency=1)
        assert [asked.body.get("max_completion_tokens") for asked in stub.asked] == [None, 512, 512]


def test_a_stop_text_is_cut_off_here_where_the_server_does_not() -> None:
    with Stub(write=lambda text, seed: "One. END Two.", reason="length") as stub:
        [completion] = answers(stub, [ask("Why?", sampling=Sampling(stop=("END",)))])
    assert (completion.texts, completion.finish_reasons) == (["One. "], ["stop"])


@pytest.mark.parametrize(("reason", "text"), [("length", "Half."), ("content_filter", ""), (None, "Half.")])
def test_finish_reasons_are_kept(reason: str | None, text: str) -> None:
    with Stub(write=lambda *_: "Half.", reason=reason) as stub:
        [completion] = answers(stub, [ask("Why?")])
    assert (completion.texts, completion.finish_reasons) == ([text], [reason or "stop"])


def test_a_prompt_refused_for_its_content_is_an_empty_completion() -> None:
    refusal = error(400, "The response was filtered due to the content management policy.", code="content_filter")
    with Stub(lambda asked: refusal if number_of(asked) == 1 else None) as stub:
        made = answers(stub, [ask(f"Question {n}", 1, 2) for n in range(3)])
    assert made[1].texts == ["", ""] and made[1].finish_reasons == ["content_filter"] * 2
    assert made[2].texts[0] == words("Question 2", 1)


@pytest.mark.parametrize(
    ("message", "tokens"),
    [
        ("This model's maximum context length is 64 tokens. However, your prompt contains 90 input tokens.", 90),
        ("maximum context length is 64 tokens, you requested 95 tokens (90 in the messages, 5 in the completion)", 0),
        ("the prompt is too long", 0),
    ],
)
def test_a_prompt_too_long_is_an_empty_completion(message: str, tokens: int) -> None:
    with Stub(lambda asked: error(400, message) if number_of(asked) == 1 else None) as stub:
        made = answers(stub, [ask(f"Question {n}", 1, 2) for n in range(3)])
    assert made[1] == Completion(["", ""], ["prompt-too-long"] * 2, tokens, 0, why=f"400 {message}")
    assert [len(one.texts) for one in made] == [2, 2, 2] and made[2].texts[0]


def test_a_completion_that_does_not_fit_behind_its_prompt_gets_what_is_left() -> None:
    message = "'max_tokens' is too large: 512. This model's maximum context length is 64 tokens."
    with Stub(lambda asked: error(400, message) if "max_tokens" in asked.body else None) as stub:
        [completion] = answers(stub, [ask("Why?", 3)])
        assert len(stub.asked) == 2 and stub.asked[1].body["seed"] == 3
    assert completion.texts == [words("Why?", 3)]


# --- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [error(429, "slow down"), error(408, "late"), error(500, "oops"), error(503, "loading"), Fault(cut=True)],
    ids=["429", "408", "500", "503", "cut"],
)
def test_what_may_pass_is_tried_again(fault: Fault) -> None:
    with Stub(first_try(fault)) as stub:
        made = answers(stub, numbered(6))
        assert len(stub.asked) == 12
    assert [one.texts for one in made] == [[words(f"Question {n}", n)] for n in range(6)]


def test_a_hanging_server_is_given_up_and_asked_again() -> None:
    with Stub(first_try(Fault(hang=True))) as stub:
        [completion] = answers(stub, numbered(1), timeout=0.2)
        assert len(stub.asked) == 2
    assert completion.texts == [words("Question 0", 0)]


def test_retry_after_is_waited_for() -> None:
    with Stub(first_try(Fault(429, {"error": {"message": "slow"}}, {"retry-after": "0.4"}))) as stub:
        answers(stub, numbered(1))
        assert stub.asked[1].time - stub.asked[0].time >= 0.4


@pytest.mark.parametrize(
    ("fault", "tries", "said"),
    [
        (error(429, "slow down"), 4, "failed 4 times: 429 slow down"),
        (error(500, "oops"), 4, "failed 4 times: 500 oops"),
        (Fault(429, {"error": {"message": "later"}}, {"retry-after": "600"}), 1, "failed and asks to wait too long"),
        (Fault(cut=True), 4, "cannot reach"),
        (Fault(hang=True), 4, "did not answer within 0.4 s, in 4 tries"),
        (error(400, "no such thing"), 2, "rejected a request: 400 no such thing"),
        (error(422, "no such thing"), 2, "rejected a request: 422 no such thing"),
        (error(401, "who are you"), 1, "rejects the API key: 401 who are you (set OPENAI_API_KEY)"),
        (error(403, "not you"), 1, "rejects the API key: 403"),
        (error(404, f"The model `{MODEL}` does not exist."), 1, "404 The model"),
        (Fault(body=b'{"choices": [{"mess'), 1, "not from an OpenAI-compatible server"),
        (Fault(body={"choices": []}), 1, "not from an OpenAI-compatible server"),
        (Fault(body={"error": {"message": "all is lost"}}), 4, "failed 4 times: 502 all is lost"),
        (Fault(body={"error": {"message": "who are you", "code": 401}}), 1, "rejects the API key: 401 who are you"),
        (Fault(body="<html>Welcome</html>"), 1, "<html>Welcome</html>' (--base-url usually ends in /v1)"),
    ],
)  # fmt: skip
def test_what_does_not_pass_ends_in_one_plain_error(fault: Fault, tries: int, said: str) -> None:
    with Stub(lambda asked: fault) as stub:
        with pytest.raises(EngineError) as raised:
            answers(stub, numbered(1), timeout=0.4 if fault.hang else 5)
        assert said in str(raised.value) and stub.url in str(raised.value)
        assert len(stub.posts()) == tries  # after a 400 an ordinary prompt is tried: is it the row, or the run?


def test_completions_before_a_failure_come_out_first() -> None:
    with Stub(lambda asked: error(402, "no") if number_of(asked) == 3 else None) as stub:
        made = engine_of(stub).generate(numbered(8))
        assert [next(made).texts[0] for _ in range(3)] == [words(f"Question {n}", n) for n in range(3)]
        with pytest.raises(EngineError):
            next(made)


def test_a_wrong_model_is_told_which_there_are() -> None:
    said = r"does not serve the model x: 404 no such model \(it offers one, two\)"
    wrong = Stub(lambda asked: error(404, "no such model"), models=("one", "two"))
    with wrong as stub, pytest.raises(EngineError, match=said):
        answers(stub, numbered(1), model="x")


def test_a_url_without_its_v1_is_told() -> None:
    wrong = Stub(lambda asked: error(404, "Not Found"))
    with wrong as stub, pytest.raises(EngineError, match="nothing to ask at .*usually ends in /v1"):
        answers(stub, numbered(1), base_url=stub.url.removesuffix("/v1") + "/v2")


def test_nobody_listens() -> None:
    with Stub() as stub:
        pass
    with pytest.raises(EngineError, match="cannot reach"):
        answers(stub, numbered(1), retries=1)


def test_a_url_that_is_none_is_a_usage_error() -> None:
    with pytest.raises(OptionError, match="is not a URL"):
        open_engine(EngineSpec("openai", MODEL, base_url="localhost:8000"))


@pytest.mark.parametrize(
    "url",
    ["http://localhost:80a0/v1", "http://localhost:99999/v1", "http://", "http://a/\udcff", f"http://{'a' * 70_000}"],
)
def test_a_port_that_is_none_is_a_usage_error(url: str) -> None:
    with pytest.raises(OptionError, match="is not a URL"):
        open_engine(EngineSpec("openai", MODEL, base_url=url))


def test_a_key_that_is_none_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-…")
    with pytest.raises(OptionError, match="OPENAI_API_KEY is not a key"):
        open_engine(EngineSpec("openai", MODEL, base_url="http://localhost:1/v1"))


def test_a_lone_surrogate_is_neither_sent_nor_taken() -> None:
    with Stub(write=lambda prompt, seed: "half \ud83d of it") as stub:
        engine = engine_of(stub)
        [done] = engine.generate([ask("half \ud83d of it", prefix="so \ud83d")])
        assert [m["content"] for m in stub.asked[0].body["messages"]] == ["half \ufffd of it", "so \ufffd"]
        assert done.texts == ["half \ufffd of it"]
        assert sum(engine.noted.values()) == 1


def test_top_p_0_is_greedy() -> None:
    with Stub() as stub:
        answers(stub, [ask("Why?", 1, 2, sampling=Sampling(0.7, 0.0, 8))])
        assert [(post.body["temperature"], post.body["top_p"]) for post in stub.posts()] == [(0.0, 1.0)]


def reply(content: object = "", **more: object) -> Fault:
    message = {"role": "assistant", "content": content}
    return Fault(body={"choices": [{"index": 0, "message": message, "finish_reason": "stop", **more}]})


def test_a_text_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "Be"}, {"type": "image"}, {"type": "text", "text": "cause."}]
    with Stub(lambda asked: reply(parts)) as stub:
        assert answers(stub, [ask("Why?")])[0].texts == ["Because."]


def test_an_answer_without_a_token_has_no_choice() -> None:
    with Stub(lambda asked: reply(logprobs={"content": []})) as stub:
        assert answers(stub, [ask("Judge", prefix="Score: ", choices=SCORES)])[0].finish_reasons == ["no-choice"]


def test_a_token_without_a_text_is_passed_over() -> None:
    top = [{"token": None, "logprob": -0.1}, {"token": "4", "logprob": -1.0}]
    told = {"content": [{"token": "4", "logprob": -1.0, "top_logprobs": top}]}
    with Stub(lambda asked: reply(logprobs=told)) as stub:
        [completion] = answers(stub, [ask("Judge", prefix="Score: ", choices=SCORES)])
    assert completion.texts == ["4"]


def test_openais_own_server_needs_a_key() -> None:
    with pytest.raises(OptionError, match="OPENAI_API_KEY"):
        open_engine(EngineSpec("openai", MODEL))


def test_the_only_model_is_taken_and_of_several_one_is_asked_for() -> None:
    with Stub(models=("alone",)) as stub:
        engine = LazyEngine(EngineSpec("openai", base_url=stub.url))
        list(engine.generate(numbered(1)))
        assert engine.model == "alone" == stub.posts()[0].body["model"]
    with Stub(models=("one", "two")) as stub, pytest.raises(OptionError, match="no model given, .*--model one, two"):
        answers(stub, numbered(1), model=None)


# --- the beginning of a turn -----------------------------------------------------------------


def test_a_prefix_is_gone_on_with() -> None:
    with Stub(write=lambda *_: " rain?") as stub:
        [completion] = answers(stub, [ask("Go on", prefix="Task 9: ")])
        body = stub.asked[0].body
    assert body["messages"][-1] == {"role": "assistant", "content": "Task 9:"}
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert completion.texts == ["rain?"]


def test_a_server_without_the_extension_gets_the_turn_alone_and_its_repetition_is_cut() -> None:
    def behave(asked: Asked) -> Fault | None:
        return refuse(asked, "continue_final_message", "add_generation_prompt")

    with Stub(behave, write=lambda *_: "Task 9: rain?") as stub:
        made = answers(stub, [ask("Go on", prefix="Task 9: ")] * 3, concurrency=1)
        assert ["continue_final_message" in asked.body for asked in stub.asked] == [True, False, False, False]
        assert all(asked.body["messages"][-1]["content"] == "Task 9:" for asked in stub.asked)
    assert [one.texts for one in made] == [["rain?"]] * 3


# --- choices ---------------------------------------------------------------------------------


def test_masses_by_hand() -> None:
    digits = [Step(" ", 0.8, {" ": 0.8, "5": 0.1, " 4": 0.05}), Step("3", 0.5, {"3": 0.5, "4": 0.25, "x": 0.2})]
    found = masses(digits, SCORES, " ")  # "5" without the space is another text
    assert found == pytest.approx({"0": 0, "1": 0, "2": 0, "3": 0.8 * 0.5, "4": 0.05 + 0.8 * 0.25, "5": 0})
    assert shared(list(found.values())) == pytest.approx([0, 0, 0, 0.4 / 0.65, 0.25 / 0.65, 0])
    letters = [Step(" A", 0.6, {" A": 0.6, "ĠB": 0.2, " C": 0.1}), Step("B", 0.9, {"B": 0.9})]
    assert masses(letters, ("A", "B"), " ") == pytest.approx({"A": 0.6, "B": 0.2})  # the second step is another word
    bare = [Step("A", 0.7, {"A": 0.7, "B": 0.3})]  # a server that leaves the spaces of tokens out
    assert masses(bare, ("A", "B"), " ") == pytest.approx({"A": 0.7, "B": 0.3})
    assert shared(list(masses(letters, ("X", "Y")).values())) is None


def test_pick_is_greedy_at_0_and_follows_the_tempered_probabilities() -> None:
    assert pick("abc", [0.2, 0.5, 0.3], 0.0, seed=1) == "b"
    drawn = [pick("abc", [0.2, 0.8, 0.0], 0.5, seed) for seed in range(4000)]
    share = 0.2**2 / (0.2**2 + 0.8**2)
    assert "c" not in drawn
    assert drawn.count("a") == pytest.approx(4000 * share, abs=4 * math.sqrt(4000 * share * (1 - share)))


def test_a_choice_named_in_a_text() -> None:
    assert [named_in(text, ("1", "10", "4")) for text in (" 10/10", "**4**", "14", "1.", "none", "")] == [
        "10", "4", "", "1", "", "",
    ]  # fmt: skip


@pytest.mark.parametrize("route", ["chat", "completion"])
def test_choices_are_drawn_from_log_probabilities(route: str, small_model: str) -> None:
    steps = [{" ": 0.9, "\n": 0.05}, {"4": 0.6, "2": 0.2, "x": 0.1}]
    more = {"route": route, "tokenizer": small_model} if route == "completion" else {"route": route}
    with Stub(steps=lambda asked: steps) as stub:
        sampling = Sampling(temperature=1.0)
        [completion] = answers(
            stub, [ask("Judge", *range(200), prefix="Score: ", choices=SCORES, sampling=sampling)], **more
        )
        [asked] = stub.asked
    assert asked.body["temperature"] == 0 and asked.body["max_tokens"] == 2 and "n" not in asked.body
    if route == "chat":
        assert asked.body["logprobs"] is True and asked.body["top_logprobs"] == 20
    else:
        assert asked.body["logprobs"] == 20 and asked.body["prompt"].endswith("Score:")
    assert completion.probabilities == pytest.approx([0, 0, 0.25, 0, 0.75, 0])
    assert set(completion.texts) == {"2", "4"} and 120 < completion.texts.count("4") < 180
    assert completion.tokens_out == 7  # what the server says it wrote


def test_ten_is_told_from_one() -> None:
    choices = tuple(map(str, range(1, 11)))

    def steps(asked: Asked) -> list[dict[str, float]]:
        again = asked.body["messages"][-1]["content"].endswith("1")
        return [{"0": 0.75, "]": 0.25}] if again else [{"1": 0.8, "7": 0.2}]

    with Stub(steps=steps) as stub:
        [completion] = answers(stub, [ask("Judge", prefix="Rating: [[", choices=choices)])
        assert len(stub.asked) == 2
    by_choice = dict(zip(choices, completion.probabilities, strict=True))
    assert by_choice["10"] == pytest.approx(0.6) and by_choice["1"] == pytest.approx(0.2)
    assert by_choice["7"] == pytest.approx(0.2) and sum(by_choice.values()) == pytest.approx(1)


def test_few_log_probabilities_are_better_than_none() -> None:
    def behave(asked: Asked) -> Fault | None:
        if asked.body.get("top_logprobs", 0) > 5:
            return error(400, "Requested sample logprobs of 20, which is greater than max allowed: 5")
        return None

    with Stub(behave, steps=lambda asked: [{"4": 0.5, "3": 0.5}]) as stub:
        made = answers(stub, [ask(f"Judge {n}", prefix="Score: ", choices=SCORES) for n in range(4)], concurrency=2)
        assert stub.asked[-1].body["top_logprobs"] == 5
    assert all(one.probabilities == pytest.approx([0, 0, 0, 0.5, 0.5, 0]) for one in made)


def test_no_choice_among_the_most_probable_tokens_is_no_choice() -> None:
    with Stub(steps=lambda asked: [{"Well": 0.5, "I": 0.5}]) as stub:
        [completion] = answers(stub, [ask("Judge", 1, 2, prefix="Score: ", choices=SCORES)])
    assert (completion.texts, completion.finish_reasons) == (["", ""], ["no-choice"] * 2)
    assert completion.probabilities is None


ANEW = [{"The": 0.9, "4": 0.005, "3": 0.004}]


def test_a_server_that_starts_anew_once_gives_no_choice_and_one_that_always_does_is_an_error() -> None:
    requests = [ask(f"Judge {n}", 1, prefix="Fine.\nScore: ", choices=SCORES) for n in range(40)]
    with Stub(steps=lambda asked: [{" 4": 0.6, " 3": 0.2}] if number_of(asked) % 4 else ANEW) as stub:
        made = answers(stub, requests, concurrency=1)
    assert [one.finish_reasons for one in made] == [["stop"] if n % 4 else ["no-choice"] for n in range(40)]
    assert made[1].mass == pytest.approx(0.8) and made[0].mass == pytest.approx(0.009)
    with Stub(steps=lambda asked: ANEW) as stub, pytest.raises(EngineError, match="starts new answers.*--route"):
        answers(stub, requests, concurrency=1)


def test_a_choice_without_a_beginning_continues_nothing() -> None:
    with Stub(steps=lambda asked: ANEW) as stub:
        made = answers(stub, [ask(f"Judge {n}", 1, choices=SCORES) for n in range(20)], concurrency=1)
    assert {(one.texts[0], one.finish_reasons[0]) for one in made} == {("3", "stop")}


def judged(stub: Stub, template: str, **more) -> dict:
    form = templates.load(template, fields={"prompt", "response"})
    options = JudgeOptions(form, 2, Sampling(), seed=0, **more)
    rows = [response_record({"prompt": "Why 1?", "response": "Because."})]
    [outcome] = judge(rows, engine_of(stub), options)
    return outcome.rows[0]


def test_an_expected_score_is_the_mean_by_log_probabilities() -> None:
    with Stub(write=lambda *_: "Good.\nScore: 4", steps=lambda asked: [{" ": 1.0}, {"4": 0.6, "3": 0.2}]) as stub:
        row = judged(stub, "additive", score="expected")
        again = stub.asked[-1].body["messages"][-1]
    assert row["scores"] == pytest.approx([3.75, 3.75]) and row["score_from"] == ["expected"] * 2
    assert again == {"role": "assistant", "content": "Good.\nScore:"}


def test_without_log_probabilities_an_expected_score_is_an_error_and_a_missing_one_is_written() -> None:
    def behave(asked: Asked) -> Fault | None:
        return refuse(asked, "top_logprobs", "logprobs")

    for template in ("additive", "score_only"):
        written = Stub(behave, write=lambda *_: "Score: 4")
        with written as stub, pytest.raises(EngineError, match="no log-probabilities.*--score text"):
            judged(stub, template, score="expected")
    with Stub(behave, write=lambda *_: "3 of 5") as stub:
        row = judged(stub, "additive", force_score=True)
    assert row["scores"] == [3, 3] and row["score_from"] == ["finish"] * 2


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of words with a chat template and a BOS that it adds itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<s>": 0, "?": 1}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="?")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


def test_the_completion_route_renders_the_chat_with_one_bos(small_model: str) -> None:
    with Stub(write=lambda *_: " rain?") as stub:
        [completion] = answers(stub, [ask("Go on", 1, 2, prefix="Task 9: ")], route="completion", tokenizer=small_model)
        asked = stub.asked[0]
    assert asked.path == "/completions" and asked.body["n"] == 2
    assert asked.body["prompt"] == "<user>Go on\n<assistant>Task 9:"
    assert completion.texts == ["rain?"] * 2


def test_a_prefix_takes_the_completion_route_where_chat_cannot_go_on_and_a_tokenizer_is_given(small_model: str) -> None:
    def behave(asked: Asked) -> Fault | None:
        return refuse(asked, "continue_final_message", "add_generation_prompt")

    with Stub(behave, write=lambda *_: " rain?") as stub:
        made = answers(stub, [ask("Go on", prefix="Task 9: "), ask("Plain")], concurrency=1, tokenizer=small_model)
        assert [asked.path for asked in stub.asked] == ["/chat/completions", "/completions", "/chat/completions"]
    assert made[0].texts == ["rain?"]


def test_the_completion_route_leaves_a_completion_what_the_context_has(small_model: str) -> None:
    def message(context: int) -> Fault:
        return error(400, f"This model's maximum context length is {context} tokens, your prompt contains at least 5")

    # <s> < user > Go on < assistant > are 9 tokens.
    with Stub(lambda asked: message(12) if asked.body["max_tokens"] > 3 else None) as stub:
        [completion] = answers(stub, [ask("Go on")], route="completion", tokenizer=small_model)
        assert [asked.body["max_tokens"] for asked in stub.asked] == [512, 3]
    assert completion.finish_reasons == ["stop"]
    with Stub(lambda asked: message(9)) as stub:
        [completion] = answers(stub, [ask("Go on")], route="completion", tokenizer=small_model)
        assert len(stub.asked) == 1
    assert completion.finish_reasons == ["prompt-too-long"]


# --- the commands ----------------------------------------------------------------------------


def remote(stub: Stub, *more: str) -> list[str]:
    return ["--engine", "openai", "--base-url", stub.url, "--retries", "0", *more]


def test_sample_and_judge_on_a_server(srlm: Srlm) -> None:
    with Stub() as stub:
        sampled = srlm("sample", "-n", "2", "--out", "r.jsonl", *remote(stub), stdin=as_lines(PROMPTS[:3]))
        assert sampled.code == 0, sampled.err
        scored = srlm("judge", "--in", "r.jsonl", "--out", "j.jsonl", *remote(stub))
        assert scored.code == 0, scored.err
    responses, rows = read_rows(srlm.folder / "r.jsonl"), read_rows(srlm.folder / "j.jsonl")
    assert [row["model"] for row in responses] == [MODEL] * 6
    assert all(row["judge"]["model"] == MODEL and None not in row["scores"] for row in rows)
    meta = read_json(srlm.folder / "r.jsonl.meta.json")
    assert (meta["engine"], meta["model"], meta["base_url"]) == ("openai", MODEL, stub.url)
    assert meta["versions"]["openai"] and "torch" not in meta["versions"]
    assert meta["counts"]["tokens_in"] == 6 and meta["counts"]["tokens_out"] == 6 * 7
    assert "tokens in" in sampled.err and "/s)" in sampled.err


def test_the_judge_without_a_name_is_the_writer_of_the_rows(srlm: Srlm) -> None:
    row = {"prompt": "Why?", "response": "So.", "model": "writer"}
    unnamed = {key: value for key, value in row.items() if key != "model"}
    with Stub(models=("writer", "other")) as stub:
        result = srlm("judge", *remote(stub), stdin=as_lines([row]))
        assert [made["judge"]["model"] for made in result.rows] == ["writer"]
        nobody = srlm("judge", *remote(stub), stdin=as_lines([unnamed]))
        assert nobody.code == 2 and "--model writer, other" in nobody.err
    with Stub(models=("alone",)) as stub:
        result = srlm("judge", *remote(stub), stdin=as_lines([unnamed]))
        assert [made["judge"]["model"] for made in result.rows] == ["alone"]


def test_the_url_comes_from_flag_environment_or_settings(srlm: Srlm) -> None:
    (srlm.folder / "srlm.toml").write_text('[defaults]\nengine = "openai"\nbase-url = "http://settings.invalid/v1"\n')
    with Stub() as stub:
        assert srlm("sample", "--base-url", stub.url, stdin=as_lines(PROMPTS[:1])).code == 0
        env = {"OPENAI_BASE_URL": stub.url}
        assert srlm("sample", stdin=as_lines(PROMPTS[:1]), env=env).code == 0
        both = {"SRLM_BASE_URL": stub.url, "OPENAI_BASE_URL": "http://environment.invalid/v1"}
        assert srlm("sample", stdin=as_lines(PROMPTS[:1]), env=both).code == 0
    wrong = srlm("sample", "--model", "x", "--retries", "0", stdin=as_lines(PROMPTS[:1]))
    assert wrong.code == 1 and "settings.invalid" in wrong.err


def test_the_key_is_sent_and_never_shown(srlm: Srlm) -> None:
    with Stub(lambda asked: error(401, "Incorrect API key provided")) as stub:
        env = {"OPENAI_API_KEY": "sk-very-secret"}
        result = srlm("sample", *remote(stub), "--out", "r.jsonl", stdin=as_lines(PROMPTS[:1]), env=env)
        doctor = srlm("doctor", env={**env, "OPENAI_BASE_URL": stub.url})
    assert result.code == 1 and "rejects the API key" in result.err
    assert "very-secret" not in result.err + doctor.out
    assert f"OPENAI_BASE_URL {stub.url}" in doctor.out and "OPENAI_API_KEY is set" in doctor.out


def test_a_server_that_dies_and_comes_back_makes_the_same_rows(srlm: Srlm) -> None:
    write_rows(srlm.folder / "in.jsonl", PROMPTS)
    argv = ["sample", "--in", "in.jsonl", "-n", "2", "--concurrency", "2"]
    with Stub() as stub:
        assert srlm(*argv, "--out", "whole.jsonl", *remote(stub)).code == 0
    dying = Stub()
    dying.behave = lambda asked: die(dying) if asked.at == 6 else None
    broken = srlm(*argv, "--out", "out.jsonl", *remote(dying))
    assert broken.code == 1 and "cannot reach" in broken.err and broken.err.count("\n") == 1
    part = read_rows(srlm.folder / "out.jsonl.part")
    assert part and not (srlm.folder / "out.jsonl").exists()
    with Stub() as stub:  # on another port: where the model is served does not decide the rows
        again = srlm(*argv, "--out", "out.jsonl", *remote(stub, "--concurrency", "5"))
        assert again.code == 0 and "resuming after" in again.err
        assert len(stub.posts()) == len(PROMPTS) - len(part) // 2
    whole, out = (srlm.folder / name for name in ("whole.jsonl", "out.jsonl"))
    assert out.read_text() == whole.read_text()
    assert read_json(str_meta(out))["counts"]["tokens_out"] == read_json(str_meta(whole))["counts"]["tokens_out"]


def die(stub: Stub) -> Fault:
    threading.Thread(target=stub.stop).start()
    return Fault(cut=True)


def str_meta(path):
    return path.with_name(path.name + ".meta.json")


def test_another_model_or_route_is_another_run(srlm: Srlm) -> None:
    write_rows(srlm.folder / "in.jsonl", PROMPTS)
    argv = ["sample", "--in", "in.jsonl", "--out", "out.jsonl", "--concurrency", "1"]
    with Stub(lambda asked: error(402, "no") if asked.at > 3 else None) as stub:
        assert srlm(*argv, *remote(stub)).code == 1
        refused = srlm(*argv, *remote(stub), "--model", "other")
        assert refused.code == 2 and "model 'stub-model' -> 'other'" in refused.err
        refused = srlm(*argv, *remote(stub), "--route", "chat")
        assert refused.code == 2 and "route" in refused.err


def test_ctrl_c_and_a_closed_pipe_end_it_at_once_and_without_noise(srlm: Srlm) -> None:
    with Stub(lambda asked: Fault(hang=True) if number_of(asked) else None) as stub:
        process = srlm.start("sample", *remote(stub), "--concurrency", "3")
        process.stdin.write(as_lines(PROMPTS).encode())
        process.stdin.close()
        assert json.loads(process.stdout.readline())["prompt"] == "Question 0?"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        said = process.stderr.read().decode()
        assert said.count("\n") == 1 and "interrupted" in said
    with Stub(delay=lambda asked: 0.02) as stub:
        process = srlm.start("sample", "--quiet", *remote(stub), "--concurrency", "2")
        process.stdin.write(as_lines(PROMPTS * 20).encode())
        process.stdin.close()
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(10) == 141 and process.stderr.read() == b""
        assert len(stub.posts()) < 100
