"""What an engine is: requests in, completions out, in order, its model loaded once; and how one is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from srlm_cli import thoughts
from srlm_cli.records import Message

TEMPLATE_REFUSED = "template-refused"


@dataclass(frozen=True)
class EngineSpec:
    """Which engine to open, with which model and on what; the fields from `base_url` on are for a server.

    `today` is the moment that a chat template writes which asks for the date; None is now.
    """

    engine: str = "hf"
    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 256
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    base_url: str | None = None
    route: str = "auto"
    tokenizer: str | None = None
    concurrency: int = 64
    retries: int = 8
    timeout: float = 600.0
    today: str | None = None
    check_sampling: bool = True


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `stop` texts end a completion and are cut off.

    A line that the pattern `last_line` matches whole ends a completion, too, and is its last one.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    last_line: str = ""


def end_of(text: str, sampling: Sampling) -> int | None:
    """Return where a completion is cut off: before its first stop text or behind its last line; None where nowhere.

    A line counts once it is complete, that is when the next one begins, and where it is outside of a thought.
    """
    ends = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
    if sampling.last_line:
        text = thoughts.blanked(text)
        begin = 0
        while (end := text.find("\n", begin)) >= 0:
            if re.fullmatch(sampling.last_line, text[begin:end]):
                ends.append(end)
                break
            begin = end + 1
    return min(ends, default=None)


@dataclass(frozen=True)
class Request:
    """Ask for one completion a seed of a chat.

    `prefix` begins the assistant's turn and is not part of the completion. With `choices` the
    completion is one of these texts, drawn by their probability behind the prefix (the most
    probable one at temperature 0).

    `follow_up` says what to ask about each text once it is written. An engine that still has the text in its
    cache may answer it immediately, with the completion.
    """

    messages: list[Message]
    sampling: Sampling
    seeds: tuple[int, ...]
    prefix: str = ""
    choices: tuple[str, ...] = ()
    follow_up: FollowUp | None = None


class FollowUp(Protocol):
    """A question about a text that a request produced. Some engines send it to other processes: pickle must take it."""

    def __call__(self, place: int, text: str) -> Request | None:
        """Return a request with `choices` that continues `text`, of the seed at `place`, or None for no question."""
        ...


@dataclass(frozen=True)
class Completion:
    """The answer to one request: a text and a finish reason for each of its seeds.

    `finish_reasons` are `stop` (the model ended, or a stop text came), `length` (cut at
    `max_new_tokens`), `no-choice` (none of the choices can be told), or a reason why no text came, which is then
    empty: `prompt-too-long`, `content_filter`, `refused` (by a server), `template-refused` (by the chat template),
    `empty`, or what a server calls it. `why` has the words of what refused the request. `probabilities` has one number
    a choice, summing to 1, where choices were asked for and the engine can tell. `mass` is the probability that any of
    the choices comes next, 0 to 1, before it was shared among them. Token counts are of the prompt (once)
    and of all texts. `follow_ups` has one entry per seed where the engine answered the request's `follow_up`,
    None where it did not; it is empty from an engine that leaves all of them to the caller.
    """

    texts: list[str]
    finish_reasons: list[str]
    tokens_in: int
    tokens_out: int
    probabilities: list[float] | None = None
    mass: float | None = None
    follow_ups: tuple[Completion | None, ...] = ()
    why: str = ""


def no_text(request: Request, reason: str, tokens_in: int = 0, why: str = "") -> Completion:
    """Return the answer to a request that has no text, for this reason."""
    size = len(request.seeds)
    return Completion([""] * size, [reason] * size, tokens_in, 0, why=why)


def template_refusal(completion: Completion) -> str:
    """Return why the chat template refused the messages of a request, an empty string where it did not."""
    return completion.why if completion.finish_reasons[0] == TEMPLATE_REFUSED else ""


class Engine(Protocol):
    """The one protocol that every way of running a model follows."""

    name: str
    model: str

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield the completion of each request, lazily and in input order; raise EngineError when it cannot."""
        ...
