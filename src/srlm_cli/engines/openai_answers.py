"""The answers of an OpenAI-compatible server, of either route, as replies with their tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp
from typing import Any

from srlm_cli.engines.choice_probabilities import Step
from srlm_cli.records import ENDS

Json = dict[str, Any]

REASONING = ("reasoning", "reasoning_content")  # vLLM since 0.11 and OpenRouter; llama.cpp, SGLang, older vLLM
COLUMNS = ("tokens", "token_logprobs", "top_logprobs")  # of the completions route


@dataclass(frozen=True)
class Reply:
    """One completion of an answer; `steps` are its tokens, None where the server gave no log-probabilities.

    `reasoning` is the thought where the server has divided it from the text.
    """

    text: str
    finish_reason: str
    steps: list[Step] | None
    reasoning: str = ""


@dataclass(frozen=True)
class Answer:
    """The replies to one request, and what they cost."""

    replies: list[Reply]
    tokens_in: int
    tokens_out: int


def read_answer(answer: Json, wanted: int) -> Answer:
    """Return an answer of either route, `wanted` replies at most; raise ValueError where it is none."""
    try:
        made = sorted(answer["choices"], key=lambda choice: choice.get("index") or 0)[:wanted]
        replies = [read_reply(choice) for choice in made]
        usage = answer.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{str(answer)[:200]!r}") from error
    if not replies:
        raise ValueError(f"{str(answer)[:200]!r}")
    return Answer(replies, *tokens)


def read_reply(choice: Json) -> Reply:
    """Return one choice of a chat or of a completion; its finish reason is `stop` or `length` where it has ended.

    A server that gives no reason is taken to have ended. One of a text that nobody wrote (a filter, a tool, an
    error) stays as the server calls it; so does one that is not known.
    """
    message = choice.get("message") or {}
    text = message.get("content") if "message" in choice else choice["text"]
    if isinstance(text, list):  # of parts, the text among them
        text = "".join(part.get("text") or "" for part in text)
    reason = str(choice.get("finish_reason") or "stop")
    if not text and message.get("refusal"):
        reason = "refusal"
    reasoning = next((said for name in REASONING if isinstance(said := message.get(name), str) and said.strip()), "")
    return Reply(text or "", ENDS.get(reason.lower(), reason), read_steps(choice.get("logprobs") or {}), reasoning)


def read_steps(logprobs: Json) -> list[Step] | None:
    """Return the tokens of a reply with the most probable ones at their places, in either route's shape.

    An answer without any token has none; None is a server that tells nothing.
    """
    if (tokens := logprobs.get("content")) is not None:
        return [
            Step(step["token"], exp(step["logprob"]), summed((top["token"], top["logprob"]) for top in tops(step)))
            for step in tokens
        ]
    if logprobs.get("tokens") is None:
        return None
    return [
        Step(token, exp(logprob or 0.0), summed((top or {}).items()))
        for token, logprob, top in zip(*(logprobs.get(name) or [] for name in COLUMNS), strict=False)
    ]


def tops(step: Json) -> list[Json]:
    """Return the most probable tokens of a step, the written one if the server tells of no other."""
    return step.get("top_logprobs") or [step]


def summed(logprobs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return probabilities by text; tokens of the same text add up."""
    found: dict[str, float] = {}
    for token, logprob in logprobs:
        if token is None or logprob is None:
            continue
        found[token] = found.get(token, 0.0) + exp(logprob)
    return found
