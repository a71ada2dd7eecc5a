"""Read the answers of an OpenAI-compatible server, from the chat and the completions route."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp
from typing import Any

from srlm_cli.engines.choice_probabilities import Step
from srlm_cli.records import ENDS

Json = dict[str, Any]

REASONING = ("reasoning", "reasoning_content")  # vLLM since 0.11 and OpenRouter; llama.cpp, SGLang, older vLLM
COLUMNS = ("tokens", "token_logprobs", "top_logprobs")  # in answers of the completions route


@dataclass(frozen=True)
class Reply:
    """One completion of an answer; `steps` are its tokens, None if the server returned no log-probabilities.

    `reasoning` is the thought where the server has divided it from the text.
    """

    text: str
    finish_reason: str
    steps: list[Step] | None
    reasoning: str = ""


@dataclass(frozen=True)
class Answer:
    """The replies to one request, with the number of tokens."""

    replies: list[Reply]
    tokens_in: int
    tokens_out: int


def read_answer(answer: Json, wanted: int) -> Answer:
    """Return an answer with at most `wanted` replies; raise ValueError if it cannot be read."""
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
    """Return one choice of a chat or of a completion; the finish reason of a complete text is `stop` or `length`.

    A missing reason counts as `stop`. Other reasons (a filter, a tool, an error, an unknown one) are not changed.
    """
    message = choice.get("message") or {}
    text = message.get("content") if "message" in choice else choice["text"]
    if isinstance(text, list):  # a list of parts
        text = "".join(part.get("text") or "" for part in text)
    reason = str(choice.get("finish_reason") or "stop")
    if not text and message.get("refusal"):
        reason = "refusal"
    reasoning = next((said for name in REASONING if isinstance(said := message.get(name), str) and said.strip()), "")
    return Reply(text or "", ENDS.get(reason.lower(), reason), read_steps(choice.get("logprobs") or {}), reasoning)


def read_steps(logprobs: Json) -> list[Step] | None:
    """Return the tokens of a reply, each with the most probable tokens at its position; reads both formats.

    The list is empty if the answer has no tokens. None means that the server returned no log-probabilities.
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
    """Return the most probable tokens of a step, or only the generated one if the server returned no others."""
    return step.get("top_logprobs") or [step]


def summed(logprobs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the probability of each text; tokens with equal text are added."""
    found: dict[str, float] = {}
    for token, logprob in logprobs:
        if token is None or logprob is None:
            continue
        found[token] = found.get(token, 0.0) + exp(logprob)
    return found
