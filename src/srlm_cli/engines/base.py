"""The engine protocol: an engine takes requests and yields completions, in order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from srlm_cli.records import Message, Record
from srlm_cli.thoughts import MARKS, Marks, Thought

TEMPLATE_REFUSED = "template-refused"
SERVER_CLOSES = """vLLM: --extra-body '{"thinking_token_budget": 512}'"""  # closes a thought


@dataclass(frozen=True)
class EngineSpec:
    """Which engine to open, with which model, and how; the fields from `base_url` on are for a server.

    `today` is the date for chat templates that write it; None is the current date. `thinking` is `on`, `off` or `auto`;
    `template_kwargs` and `extra_body` (of requests to a server) are JSON objects. `think_markers` open and close a
    thought, if the marks of the model are not known. The fields from `max_model_len` to `engine_arg` are for vLLM;
    `engine_arg` has further ones, as `KEY=VALUE`. `revision` is that of a hub id, `attn_implementation` is for `hf`.
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
    thinking: str = "auto"
    template_kwargs: str | None = None
    extra_body: str | None = None
    think_markers: tuple[str, str] | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    quantization: str | None = None
    engine_arg: tuple[str, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. `temperature` 0 is greedy; a `stop` text ends a completion and is removed.

    A line that fully matches the pattern `last_line` also ends a completion, and is kept. Both count only in the
    answer. A thought that is open after `max_thinking_tokens` is closed for the model. `top_k` 0, `min_p` 0 and
    penalties of 1 and 0 change nothing. The order is: penalties, temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    last_line: str = ""
    max_thinking_tokens: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0

    @property
    def penalizes(self) -> bool:
        """Whether there is a penalty for tokens that are already in the text."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0


def end_of(text: str, sampling: Sampling, marks: Marks = MARKS, opened: bool = False) -> int | None:
    """Return where a completion ends: before its first stop text or after its last line; None if neither occurs.

    A line counts when it is complete, that is when the next line starts. Nothing counts inside the thought that comes
    first, which the prompt may have `opened`.
    """
    _, thought = marks.divide(text, opened)
    if thought and not thought.closed:
        return None
    first = len(thought.raw) if thought else 0
    ends = [at for stop in sampling.stop if (at := text.find(stop, first)) >= 0]
    if sampling.last_line:
        begin = first
        while (end := text.find("\n", begin)) >= 0:
            if re.fullmatch(sampling.last_line, text[begin:end]):
                ends.append(end)
                break
            begin = end + 1
    return min(ends, default=None)


@dataclass(frozen=True)
class Request:
    """A request for one completion per seed of a chat.

    `prefix` is the start of the assistant's turn and is not part of the completion. With `choices` the completion is
    one of these texts, drawn by its probability after the prefix (the most probable one at temperature 0). `thought` is
    a thought before the prefix, with its marks, as in `Thought.raw`. `template_kwargs` go to the chat template and
    take precedence over those of the engine. `schema` is the JSON schema of the answer; engines that cannot write by it
    ignore it, so the answer has to be checked. `continued` says that a later request continues this
    one after its choice: the engine may keep what it has read of it.

    `follow_up` returns a second request about each text. An engine that still has the text in its cache can answer it
    together with the completion.
    """

    messages: list[Message]
    sampling: Sampling
    seeds: tuple[int, ...]
    prefix: str = ""
    choices: tuple[str, ...] = ()
    follow_up: FollowUp | None = None
    thought: str = ""
    template_kwargs: dict[str, Any] | None = None
    schema: dict[str, Any] | None = None
    continued: bool = False


class FollowUp(Protocol):
    """A second request about a completion. It must be picklable, because some engines send it to other processes."""

    def __call__(self, place: int, text: str, thought: Thought | None) -> Request | None:
        """Return a request with `choices` that continues `text`, the completion of seed number `place`, or None."""
        ...


@dataclass(frozen=True)
class Completion:
    """The result of one request: a text and a finish reason per seed.

    A text is an answer without its thought; `thoughts` has the thoughts, None for a text without one, and is empty if
    no text has one. Finish reasons: `stop` (end of text, or a stop text), `length` (cut at `max_new_tokens`),
    `no-choice` (no choice has any probability), or the reason why there is no text: `prompt-too-long`,
    `unfinished-thought`, `content_filter`, `refused` (by a server), `template-refused` (by the chat template), `empty`,
    or the reason that a server gives. `why` is the error message of a refusal. `probabilities` has one number per
    choice, with a sum of 1, if choices were requested and the engine knows them. `mass` is the total probability of all
    choices before this normalization, 0 to 1. `tokens_in` counts the prompt once, `tokens_out` all texts and thoughts.
    `follow_ups` has one entry per seed, None for those that the engine did not answer; it is empty if the engine
    answers none.
    """

    texts: list[str]
    finish_reasons: list[str]
    tokens_in: int
    tokens_out: int
    probabilities: list[float] | None = None
    mass: float | None = None
    follow_ups: tuple[Completion | None, ...] = ()
    why: str = ""
    thoughts: tuple[Thought | None, ...] = ()

    def thought(self, place: int) -> Thought | None:
        """Return the thought before a text."""
        return self.thoughts[place] if self.thoughts else None


def no_text(request: Request, reason: str, tokens_in: int = 0, why: str = "") -> Completion:
    """Return a completion with empty texts and this finish reason."""
    size = len(request.seeds)
    return Completion([""] * size, [reason] * size, tokens_in, 0, why=why)


def template_refusal(completion: Completion) -> str:
    """Return why the chat template refused the messages of a request, or ""."""
    return completion.why if completion.finish_reasons[0] == TEMPLATE_REFUSED else ""


class Engine(Protocol):
    """The protocol of all engines."""

    name: str
    model: str

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield one completion per request, lazily and in input order; raise EngineError on failure."""
        ...


@dataclass(frozen=True)
class Scored:
    """The score of a reply, None if it is too long for the model; its tokens; or why its row is a bad one."""

    score: float | None = None
    tokens: int = 0
    bad: str = ""


class Scorer(Protocol):
    """What scores replies without words; `kind` is what `score_from` says of its scores."""

    kind: str

    def score(self, replies: list[Record]) -> list[Scored]:
        """Return the score of each response record, in order."""
        ...
