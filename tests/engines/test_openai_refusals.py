"""What servers say when they cannot or will not: each one's own words, and what is made of them."""

from __future__ import annotations

import itertools
import json

import pytest

from srlm_cli.engines import EngineSpec, open_engine
from srlm_cli.engines.base import Completion, Request, Sampling
from srlm_cli.engines.openai import room_told
from srlm_cli.errors import EngineError
from stub_server import MODEL, Asked, Fault, Stub, error, number_of, refuse, words

pytest.importorskip("openai")

SCORES = tuple("012345")


@pytest.fixture(autouse=True)
def _quick_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def answers(stub: Stub, requests: list[Request], **more) -> list[Completion]:
    spec = EngineSpec("openai", **{"model": MODEL, "base_url": stub.url, "retries": 3, "concurrency": 4, **more})
    return list(open_engine(spec).generate(requests))


def ask(text: str, *seeds: int, sampling: Sampling | None = None, **more) -> Request:
    return Request([{"role": "user", "content": text}], sampling or Sampling(), seeds or (1,), **more)


def one_of(fault: Fault, others: str = "") -> list[Completion]:
    """Return what becomes of three questions when the server answers the second one with a fault."""
    with Stub(lambda asked: fault if number_of(asked) == 1 else None) as stub:
        return answers(stub, [ask(f"Question {n}", n, n + 10) for n in range(3)])


# --- a prompt too long -------------------------------------------------------------------------

OPENAI = (
    "This model's maximum context length is 4097 tokens. However, you requested 4203 tokens (3703 in the messages, "
    "500 in the completion). Please reduce the length of the messages or completion."
)
TOO_LONG = {
    "openai": error(400, OPENAI, code="context_length_exceeded", param="messages"),
    "openai, new": error(400, "Your input exceeds the context window of this model. Please adjust your input."),
    "openai, limit": Fault(429, {"error": {"message": "Request too large for gpt-4o: Limit 30000, Requested 38212"}}),
    "code alone": error(400, "Bad request", code="context_length_exceeded"),
    "vllm": error(400, "This model's maximum context length is 64 tokens. However, your prompt contains at least 65 "
                  "input tokens, which exceeds this limit even without any output tokens.", param="input_tokens"),
    "vllm, engine": error(400, "The decoder prompt (length 90) is longer than the maximum model length of 64."),
    "vllm, old": error(400, "max_tokens must be at least 1, got -186.", param="max_tokens"),
    "sglang": Fault(400, {"object": "error", "message": "The input (617 tokens) is longer than the model's context "
                          "length (409 tokens).", "type": "BadRequestError", "code": 400}),
    "llama.cpp": Fault(400, {"error": {"code": 400, "message": "request (9412 tokens) exceeds the available context "
                             "size (8192 tokens), try increasing it", "type": "exceed_context_size_error"}}),
    "tgi": Fault(422, {"error": "Input validation error: `inputs` must have less than 1024 tokens. Given: 1168",
                       "error_type": "validation"}),
    "gemini": Fault(400, b'[{"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "The input token count '
                    b'(1200293) exceeds the maximum number of tokens allowed (1048576)."}}]'),
    "anthropic": error(400, "prompt is too long: 213462 tokens > 200000 maximum"),
    "mistral": error(400, "Prompt contains 40000 tokens, too large for model with 32768 maximum context length"),
    "xai": error(400, "This model's maximum prompt length is 131072 but the request contains 537812 tokens"),
    "413": Fault(413, "<html>413 Request Entity Too Large</html>"),
    "in a 200": Fault(200, {"error": {"message": OPENAI, "code": "context_length_exceeded"}}),
    "behind a proxy": Fault(500, {"error": {"message": f"ContextWindowExceededError: {OPENAI}"}}),
}  # fmt: skip


@pytest.mark.parametrize("fault", TOO_LONG.values(), ids=TOO_LONG)
def test_a_prompt_too_long_is_known_in_the_words_of_each_server(fault: Fault) -> None:
    made = one_of(fault)
    assert (made[1].texts, made[1].finish_reasons) == (["", ""], ["prompt-too-long"] * 2)
    assert made[1].why and [one.texts[0] for one in made[::2]] == [words("Question 0", 0), words("Question 2", 2)]


@pytest.mark.parametrize(
    ("said", "room"),
    [
        (OPENAI, 394),
        ("Requested token count exceeds the model's maximum context length of 640 tokens. You requested a total of 718 "
         "tokens: 78 tokens from the input messages and 640 tokens for the completion.", 562),
        ("`inputs` tokens + `max_new_tokens` must be <= 2048. Given: 1244 `inputs` tokens and 900 ...", 804),
        ("max_tokens is too large: 32768. This model supports at most 16384 completion tokens, whereas you", 16384),
        ("Input validation error: `max_new_tokens` must be <= 192. Given: 512", 192),
        ("maximum context length is 64 tokens, and your prompt contains at least 65 in the messages", None),
        ("the prompt is too long", None),
    ],
)  # fmt: skip
def test_a_completion_gets_what_a_server_says_is_left(said: str, room: int | None) -> None:
    def behave(asked: Asked) -> Fault | None:
        return error(400, said) if asked.body.get("max_tokens") == 900 else None

    assert room_told(said) == room
    with Stub(behave) as stub:
        [completion] = answers(stub, [ask("Why?", 3, sampling=Sampling(max_new_tokens=900))])
        assert [asked.body.get("max_tokens") for asked in stub.asked] == [900, room]
    assert completion.texts == [words("Why?", 3)]


def test_where_what_is_left_is_refused_too_there_is_no_limit() -> None:
    with Stub(lambda asked: error(400, OPENAI) if "max_tokens" in asked.body else None) as stub:
        [completion] = answers(stub, [ask("Why?", 3)])
        assert [asked.body.get("max_tokens") for asked in stub.asked] == [512, 394, None]
    assert completion.texts == [words("Why?", 3)]


def test_a_full_server_is_tried_again() -> None:
    """llama.cpp ends all requests in its slots when their contexts together are full; alone each may fit."""
    seen = itertools.count()
    full = error(500, "Context size has been exceeded.", type="server_error")
    with Stub(lambda asked: full if next(seen) < 2 else None) as stub:
        assert answers(stub, [ask("Why?", 3)])[0].texts == [words("Why?", 3)]


# --- a filter, and what else is no answer ------------------------------------------------------

FILTERED = {
    "azure": error(400, "The response was filtered due to Azure OpenAI's content management policy.",
                   code="content_filter"),
    "openai": error(400, "Your request was rejected", code="content_policy_violation"),
    "deepseek": error(400, "Content Exists Risk", code="invalid_request_error"),
    "dashscope": error(400, "Input data may contain inappropriate content.", code="data_inspection_failed"),
    "openrouter": error(403, "Your chosen model requires moderation and your input was flagged"),
    "in a 200": Fault(200, {"error": {"message": "blocked: PROHIBITED_CONTENT"}}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FILTERED.values(), ids=FILTERED)
def test_a_filter_is_known_in_the_words_of_each_server(fault: Fault) -> None:
    made = one_of(fault)
    assert (made[1].texts, made[1].finish_reasons) == (["", ""], ["content_filter"] * 2)
    assert made[0].texts[0] and made[2].texts[0]


def choices(*contents: object, **more: object) -> Fault:
    made = [
        {"index": k, "message": {"role": "assistant", "content": content}, "finish_reason": "stop", **more}
        for k, content in enumerate(contents)
    ]
    return Fault(body={"choices": made, "usage": {"prompt_tokens": 3, "completion_tokens": 5}})


PASSING = {
    "error": choices("Half a", finish_reason="error", native_finish_reason="network_error"),
    "abort": choices("", finish_reason="abort"),
    "deepseek": choices("Half a", finish_reason="insufficient_system_resource"),
    "choice": choices("Half a", error={"code": 502, "message": "upstream"}),
    "nothing": choices(None, finish_reason=None),
    "object": Fault(body={"error": {"message": "Provider returned error"}, "user_id": "u"}),
    "code": Fault(body={"error": {"message": "Overloaded", "code": 529}}),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_an_upstream_that_failed_is_tried_again_like_a_502(fault: Fault) -> None:
    seen = itertools.count()
    with Stub(lambda asked: fault if next(seen) == 0 else None) as stub:
        assert answers(stub, [ask("Why?", 3)])[0].texts == [words("Why?", 3)]
        assert len(stub.posts()) == 2
    with Stub(lambda asked: fault) as stub, pytest.raises(EngineError, match="failed 3 times: 5[02][29] "):
        answers(stub, [ask("Why?", 3)], retries=2)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (choices("", None, " \n"), "empty"),
        (choices("", "", "", finish_reason="length"), "empty"),
        (choices("Half a", "b", "c", finish_reason="content_filter"), "content_filter"),
        (choices("Half a", "b", "c", finish_reason="SAFETY"), "SAFETY"),
        (choices(None, None, None, finish_reason="tool_calls"), "tool_calls"),
    ],
)
def test_what_is_no_reply_is_none_and_is_not_tried_again(fault: Fault, reason: str) -> None:
    with Stub(lambda asked: fault) as stub:
        [completion] = answers(stub, [ask("Why?", 1, 2, 3)])
        assert [asked.text for asked in stub.posts()][:2] in (
            ["Why?"],
            ["Why?", "Write a story about anything you like."],
        )
    assert (completion.texts, completion.finish_reasons) == (["", "", ""], [reason] * 3)


def test_a_refusal_of_the_model_is_no_reply() -> None:
    message = {"role": "assistant", "content": None, "refusal": "I'm sorry, I cannot."}
    with Stub(lambda asked: Fault(body={"choices": [{"message": message, "finish_reason": "stop"}]})) as stub:
        [completion] = answers(stub, [ask("Why?")])
    assert (completion.texts, completion.finish_reasons) == ([""], ["refusal"])


@pytest.mark.parametrize(
    ("told", "kept"),
    [("eos_token", "stop"), ("end_turn", "stop"), ("MAX_TOKENS", "length"), ("model_length", "length")],
)
def test_other_names_of_an_end_are_an_end(told: str, kept: str) -> None:
    with Stub(reason=told, write=lambda *_: "So.") as stub:
        [completion] = answers(stub, [ask("Why?")])
    assert (completion.texts, completion.finish_reasons) == (["So."], [kept])


def test_texts_that_speak_of_errors_are_texts() -> None:
    text = 'It says {"error": {"code": 500}} and "finish_reason": "error".'
    with Stub(write=lambda *_: text) as stub:
        assert answers(stub, [ask("Why?")])[0].texts == [text]
        assert len(stub.posts()) == 1
    body = json.loads(json.dumps(choices("So.").body)) | {"error": None}
    with Stub(lambda asked: Fault(body=body)) as stub:
        assert answers(stub, [ask("Why?")])[0].texts == ["So."]


@pytest.mark.parametrize("status", [400, 422])
def test_a_refusal_of_one_row_is_that_rows(status: int) -> None:
    made = one_of(error(status, "System role not supported"))
    assert (made[1].finish_reasons, made[1].why) == (["refused"] * 2, f"{status} System role not supported")
    assert made[0].texts[0] and made[2].texts[0]


def test_a_refusal_of_every_row_is_the_runs() -> None:
    with Stub(lambda asked: error(400, "No `user` given")) as stub:
        with pytest.raises(EngineError, match="rejected a request: 400 No `user` given"):
            answers(stub, [ask(f"Question {n}") for n in range(9)])
        assert [asked.text for asked in stub.posts()].count("Hello!") == 1


@pytest.mark.parametrize("body", [b"data: x", b"[]", b'{"choices": []}'])
def test_where_the_second_opinion_is_no_answer_the_refusal_is_the_runs(body: bytes) -> None:
    garbled = Stub(lambda asked: Fault(body=body) if asked.text == "Hello!" else error(400, "No"))
    with garbled as stub, pytest.raises(EngineError, match="rejected a request: 400 No"):
        answers(stub, [ask("Why?")])


# --- one choice, temperatures ------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        error(500, "Only one completion choice is allowed", code=500),
        error(400, "Only one completion choice is allowed"),
        error(400, "n_cmpl cannot be greater than the number of slots, please increase -np"),
        error(400, "multiple completions are not supported"),
        error(422, "n must be 1 for this model"),
    ],
    ids=lambda fault: fault.body["error"]["message"].partition(" ")[0],
)
def test_a_server_of_one_choice_is_asked_for_each(fault: Fault) -> None:
    with Stub(lambda asked: fault if "n" in asked.body else None) as stub:
        made = answers(stub, [ask(f"Question {n}", 21, 31, 41) for n in range(3)], concurrency=1)
        assert len(stub.posts()) == 1 + 9
        assert sorted(asked.body["seed"] for asked in stub.posts()[1:]) == [21, 21, 21, 31, 31, 31, 41, 41, 41]
    assert [one.texts for one in made] == [[words(f"Question {n}", seed) for seed in (21, 31, 41)] for n in range(3)]


def no_zero(asked: Asked) -> Fault | None:
    wrong = {"error": "Input validation error: `temperature` must be strictly positive", "error_type": "validation"}
    return Fault(422, wrong) if asked.body.get("temperature") == 0 else None


def test_where_temperature_0_is_refused_the_least_one_is_asked_for(capsys: pytest.CaptureFixture) -> None:
    greedy, drawn = Sampling(temperature=0.0), Sampling(temperature=0.7)
    requests = [ask(f"Question {n}", 1, 2, sampling=(greedy, drawn)[n % 2]) for n in range(8)]
    with Stub(no_zero) as stub:
        made = answers(stub, requests, concurrency=8)
        taken = [(number_of(asked) % 2, asked.body["temperature"]) for asked in stub.posts() if not no_zero(asked)]
    assert sorted(taken) == [(0, 0.01)] * 4 + [(1, 0.7)] * 4
    assert made[0].texts == [words("Question 0", 1)] * 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "rejects a temperature of 0" in said


def test_where_temperature_0_is_refused_probabilities_are_read_at_1() -> None:
    """A server may tell the log-probabilities that it drew by: near 0 they are no longer the model's."""
    with Stub(no_zero, steps=lambda asked: [{"4": 0.6, "3": 0.4}]) as stub:
        [completion] = answers(stub, [ask("Judge", prefix="Score: ", choices=SCORES)])
        assert [(asked.body["temperature"], asked.body["top_p"]) for asked in stub.posts()] == [(0, 1), (1, 1)]
    assert completion.probabilities == pytest.approx([0, 0, 0, 0.4, 0.6, 0])


def test_a_temperature_that_is_refused_ends_the_run() -> None:
    """The server's own would be another distribution."""

    def only_1(asked: Asked) -> Fault | None:
        said = "'temperature' does not support {} with this model. Only the default (1) value is supported."
        value = asked.body.get("temperature", 1)
        return error(400, said.format(value), param="temperature") if value != 1 else None

    for temperature, said in ((0.7, "refuses --temperature 0.7: "), (0.0, "refuses --temperature 0.01: ")):
        with Stub(only_1) as stub, pytest.raises(EngineError, match=said):
            answers(stub, [ask("Why?", 1, 2, sampling=Sampling(temperature))])
    with Stub(only_1) as stub:
        answers(stub, [ask("Why?", 1, 2, sampling=Sampling(1.0))])
    vllm = error(400, "temperature must be in [0, 2], got 3.0.", param="temperature")
    with (
        Stub(lambda asked: vllm) as stub,
        pytest.raises(EngineError, match="refuses --temperature 3: temperature must"),
    ):
        answers(stub, [ask("Why?", sampling=Sampling(3.0))])


@pytest.mark.parametrize(("field", "at"), [("temperature", Sampling(1.0, 0.9)), ("top_p", Sampling(0.7, 1.0))])
def test_a_field_is_left_out_at_the_value_of_leaving_it_out(field: str, at: Sampling) -> None:
    with Stub(lambda asked: refuse(asked, field)) as stub:
        made = answers(stub, [ask(f"Question {n}", 1, 2, sampling=at) for n in range(3)], concurrency=1)
        assert sum(field in asked.body for asked in stub.posts()) == 1
        with pytest.raises(EngineError, match=f"refuses --{field.replace('_', '-')} 0.5: "):
            answers(stub, [ask("Why?", sampling=Sampling(0.5, 0.5))])
    assert [len(one.texts) for one in made] == [2, 2, 2]


def test_of_two_fields_that_exclude_each_other_the_one_that_says_nothing_goes() -> None:
    def one_of_both(asked: Asked) -> Fault | None:
        both = "temperature" in asked.body and "top_p" in asked.body
        return error(400, "`temperature` and `top_p` cannot both be specified for this model.") if both else None

    with Stub(one_of_both) as stub:
        answers(stub, [ask("Why?", sampling=Sampling(0.7, 1.0))])
        assert stub.posts()[-1].body["temperature"] == 0.7 and "top_p" not in stub.posts()[-1].body
    with Stub(one_of_both) as stub, pytest.raises(EngineError, match=r"cannot both .*--temperature 1 sends none"):
        answers(stub, [ask("Why?", sampling=Sampling(0.7, 0.9))])


# --- servers that draw otherwise than asked ----------------------------------------------------


def neutral(penalty: str = "repetition_penalty") -> dict[str, float]:
    return {"top_k": -1, "min_p": 0, penalty: 1, "presence_penalty": 0, "frequency_penalty": 0}


SPECIAL = {"skip_special_tokens": False}  # the marks of a thought can be special tokens


@pytest.mark.parametrize(
    ("owner", "sent"),
    [
        ("vllm", {**neutral(), **SPECIAL}), ("sglang", {**neutral(), **SPECIAL}),
        ("llamacpp", neutral("repeat_penalty")), ("me", {}), (None, {}),
    ],
)  # fmt: skip
def test_servers_with_a_sampling_of_their_own_are_told_otherwise(owner: str | None, sent: dict) -> None:
    with Stub(owner=owner) as stub:
        answers(stub, [ask("Why?"), ask("How?", sampling=Sampling(0.0))])
        asked = ["model", "messages", "temperature", "top_p", "max_tokens", "seed"]
        assert [{k: v for k, v in post.body.items() if k not in asked} for post in stub.posts()] == [sent] * 2


def test_what_such_a_server_refuses_of_it_is_left_out() -> None:
    with Stub(lambda asked: refuse(asked, "min_p"), owner="vllm") as stub:
        assert answers(stub, [ask("Why?", 3)])[0].texts == [words("Why?", 3)]


LONG = "Once upon a time there was a fox who lived in a wood, and every evening it counted the stars."


def drawn(asked_text: str, seed: int) -> str:
    return f"{words(asked_text, seed)} {words(asked_text, seed + 10**6)}"


def stories(stub: Stub) -> list[Asked]:
    return [asked for asked in stub.posts() if asked.text.startswith("Write a story")]


@pytest.mark.parametrize("takes_n", [True, False])
def test_a_server_that_does_not_draw_is_found_out(takes_n: bool) -> None:
    with Stub(write=lambda text, seed: LONG, takes_n=takes_n) as stub:
        with pytest.raises(EngineError, match="does not draw: 3 replies to one prompt are equal.*--no-check-sampling"):
            answers(stub, [ask(f"Question {n}", 1, 2, 3) for n in range(6)])
        assert len(stories(stub)) == (4 if takes_n else 3)
        assert all((post.body["temperature"], post.body["top_p"]) == (2, 1) for post in stories(stub))


def test_equal_replies_are_right_where_the_server_draws() -> None:
    """Short answers, and long ones that a model is sure of."""
    for sure in ("Paris.", LONG):
        with Stub(write=lambda text, seed, sure=sure: drawn(text, seed) if "story" in text else sure) as stub:
            made = answers(stub, [ask(f"Question {n}", 1, 2, 3) for n in range(6)])
            assert len(stories(stub)) == 1
        assert [one.texts for one in made] == [[sure] * 3] * 6


def test_equal_short_stories_prove_nothing() -> None:
    with Stub(write=lambda text, seed: "4") as stub:
        assert [one.texts for one in answers(stub, [ask("Judge", 1, 2), ask("Judge", 3, 4)])] == [["4", "4"]] * 2
        assert len(stories(stub)) == 1


def test_nothing_is_looked_into_where_replies_differ_or_are_greedy_or_alone() -> None:
    with Stub(write=lambda text, seed: drawn(text, seed)) as stub:
        answers(stub, [ask("Why?", 1, 2), ask("How?", 7)])
        assert not stories(stub)
    with Stub(write=lambda text, seed: LONG) as stub:
        answers(stub, [ask("Why?", 1, 2, sampling=Sampling(0.0)), ask("How?", 7)])
        assert not stories(stub)


def test_the_check_can_be_left_out() -> None:
    with Stub(write=lambda text, seed: LONG) as stub:
        assert answers(stub, [ask("Why?", 1, 2)], check_sampling=False)[0].texts == [LONG] * 2
        assert not stories(stub)


def test_a_temperature_that_the_check_may_not_ask_for_has_been_read() -> None:
    def at_most_1(asked: Asked) -> Fault | None:
        return error(400, "temperature must be within 0 and 1") if asked.body["temperature"] > 1 else None

    with Stub(at_most_1, write=lambda text, seed: LONG) as stub:
        assert answers(stub, [ask("Why?", 1, 2)])[0].texts == [LONG] * 2


def test_choices_that_share_one_draw_are_asked_for_one_by_one(capsys: pytest.CaptureFixture) -> None:
    """The server draws by its seed, and gives every choice of a request the same text."""
    stub = Stub(write=drawn)
    stub.same_seed = True
    with stub:
        made = answers(stub, [ask(f"Question {n}", 11, 21, 31) for n in range(4)])
        assert len(stories(stub)) == 4
    assert [one.texts for one in made] == [[drawn(f"Question {n}", seed) for seed in (11, 21, 31)] for n in range(4)]
    assert capsys.readouterr().err.count("draws the same text for all choices") == 1


@pytest.mark.parametrize("status", [404, 500])
def test_a_list_of_models_that_fails_is_asked_for_once(status: int) -> None:
    """As `transformers serve` 5.23 has it on a machine without a hub cache."""
    with Stub() as stub:
        stub.models_status = status
        assert [done.texts[0] != "" for done in answers(stub, [ask("Why?"), ask("How?")])] == [True] * 2
        assert stub.listed == 1


# --- a JSON schema -----------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "enum": ["x"]}}, "required": ["a"]}


def test_a_schema_is_sent_as_the_format_of_the_response() -> None:
    with Stub() as stub:
        answers(stub, [ask("Why?", 1, schema=SCHEMA), ask("Why not?", 2)])
    first, second = sorted((asked.body for asked in stub.posts()), key=lambda body: "response_format" not in body)
    assert first["response_format"] == {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    assert "response_format" not in second


@pytest.mark.parametrize(
    "said",
    [
        "Unknown parameter: 'response_format'.",
        "This response_format type is unavailable now",
        "json_schema is not supported by this model",
        "Failed to compile the grammar",
    ],
)
def test_a_server_that_refuses_a_schema_is_sent_none_and_says_so_once(
    capsys: pytest.CaptureFixture[str], said: str
) -> None:
    with Stub(lambda asked: error(400, said) if "response_format" in asked.body else None) as stub:
        made = answers(stub, [ask(f"Question {n}", n, schema=SCHEMA) for n in range(3)], concurrency=1)
    assert [completion.finish_reasons for completion in made] == [["stop"]] * 3
    assert ["response_format" in asked.body for asked in stub.posts()].count(True) == 1
    assert capsys.readouterr().err.count("rejects `response_format`") == 1
