"""What an engine is: requests in, completions out, in order, its model loaded once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from srlm_cli.records import Message


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

    A line counts once it is complete, that is when the next one begins.
    """
    ends = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
    if sampling.last_line:
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

    `then`, given the place of a seed and the text that it made, returns a question with choices that goes
    on from this text, or None. An engine that still has the text at hand may answer it at once; some hand it
    to other processes, so it is one that pickle takes.
    """

    messages: list[Message]
    sampling: Sampling
    seeds: tuple[int, ...]
    prefix: str = ""
    choices: tuple[str, ...] = ()
    then: Callable[[int, str], Request | None] | None = None


@dataclass(frozen=True)
class Completion:
    """The answer to one request: a text and a finish reason for each of its seeds.

    `finish_reasons` are `stop` (the model ended, or a stop text came), `length` (cut at
    `max_new_tokens`), `prompt-too-long` (no text), `no-choice` (none of the choices can be told), or
    what else a server says, such as `content_filter`. `probabilities` has one number a choice, summing
    to 1, where choices were asked for and the engine can tell. Token counts are of the prompt (once)
    and of all texts. `then` has what the request's `then` asked for, one entry a seed where it was
    answered at once; the rest is left to the one who asked.
    """

    texts: list[str]
    finish_reasons: list[str]
    tokens_in: int
    tokens_out: int
    probabilities: list[float] | None = None
    then: tuple[Completion | None, ...] = ()


class Engine(Protocol):
    """The one protocol that every way of running a model follows."""

    name: str
    model: str

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield the completion of each request, lazily and in input order; raise EngineError when it cannot."""
        ...
