"""Judge the replies to a prompt together: in rounds, where each round can depend on the answers before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Protocol, TypeVar

from srlm_cli.engines.base import Completion, Engine, Request, template_refusal
from srlm_cli.errors import BadRow
from srlm_cli.records import Record, is_reply, refuse_two_prompts, refuse_two_replies
from srlm_cli.stages import Outcome

PROMPTS_TOGETHER = 64
IsNew = Callable[[int], bool]


@dataclass
class Prompt:
    """The responses to one prompt in their order; `bad` is why they cannot be judged together.

    `at_end` marks those that are all of them only because the input has ended. `tokens_in` and `tokens_out` are spent
    on them so far.
    """

    rows: list[Record]
    at_end: bool
    bad: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    replies: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.replies = [] if self.bad else [at for at, row in enumerate(self.rows) if is_reply(row)]

    def outcomes(self, rows: list[Record], counts: dict[str, int]) -> Iterator[Outcome]:
        """Yield the outcome of the responses; if they are bad, each is a bad row."""
        if self.bad:
            yield from (Outcome(bad=self.bad, at_end=self.at_end) for _ in self.rows)
            return
        without = len(self.rows) - len(self.replies)
        yield Outcome(
            rows=rows,
            read=len(self.rows),
            counts=counts | ({"no reply": without} if without else {}),
            tokens_in=self.tokens_in,
            tokens_out=self.tokens_out,
            at_end=self.at_end,
        )


class Judging(Protocol):
    """The judging of one prompt in rounds."""

    prompt: Prompt

    def ask(self) -> list[Request]:
        """Return the requests of the next round, none if there is nothing to ask any more."""
        ...

    def take(self, answers: list[Completion]) -> None:
        """Take the answers to the last requests, in their order."""
        ...


S = TypeVar("S", bound=Judging)


def prompts_of(rows: Iterable[Record], is_new: IsNew) -> Iterator[Prompt]:
    """Yield each prompt with its consecutive responses; `is_new` remembers earlier prompts.

    Bad are the responses of a prompt that comes back, of two prompts with one id, and of two replies with one id.
    """
    waiting: tuple[list[Record], str] | None = None
    for name, group in groupby(rows, key=lambda row: row["prompt_id"]):
        if waiting:
            yield Prompt(waiting[0], False, waiting[1])
        new, found = is_new(hash(name)), list(group)
        waiting = found, fault_of(found) if new else f"the responses of prompt {name} are not grouped: sort the rows"
    if waiting:
        yield Prompt(waiting[0], True, waiting[1])


def fault_of(rows: list[Record]) -> str:
    """Return why responses with one prompt_id cannot be judged together, or ""."""
    try:
        refuse_two_prompts(rows)
        refuse_two_replies(rows)
    except BadRow as error:
        return str(error)
    return ""


def at_once(judgings: Iterable[S], engine: Engine) -> Iterator[S]:
    """Yield the prompts' judgings in order, each after its only round; the engine may read ahead as far as it likes.

    If the chat template refuses a request, the prompt is bad.
    """
    waiting: deque[tuple[S, int]] = deque()

    def requests() -> Iterator[Request]:
        for judging in judgings:
            asked = [] if judging.prompt.bad else judging.ask()
            waiting.append((judging, len(asked)))
            yield from asked

    answers: list[Completion] = []
    for answer in engine.generate(requests()):
        while not waiting[0][1]:
            yield waiting.popleft()[0]
        answers.append(answer)
        if len(answers) == waiting[0][1]:
            judging, _ = waiting.popleft()
            take(judging, answers)
            answers = []
            yield judging
    while waiting:
        yield waiting.popleft()[0]


def in_rounds(judgings: Iterable[S], engine: Engine, together: int = PROMPTS_TOGETHER) -> Iterator[S]:
    """Yield the prompts' judgings in order, each when it has nothing to ask any more; those of many prompts take turns.

    If the chat template refuses a request, the prompt is bad.
    """
    judgings = iter(judgings)
    while started := list(islice(judgings, together)):
        left = [judging for judging in started if not judging.prompt.bad]
        while asked := [(judging, requests) for judging in left if (requests := judging.ask())]:
            answers = engine.generate(request for _, requests in asked for request in requests)
            for judging, requests in asked:
                take(judging, list(islice(answers, len(requests))))
            left = [judging for judging, _ in asked if not judging.prompt.bad]
        yield from started


def take(judging: Judging, answers: list[Completion]) -> None:
    """Give the judging of a prompt its answers, and count their tokens."""
    prompt = judging.prompt
    prompt.tokens_in += sum(answer.tokens_in for answer in answers)
    prompt.tokens_out += sum(answer.tokens_out for answer in answers)
    prompt.bad = next(filter(None, map(template_refusal, answers)), "")
    if not prompt.bad:
        judging.take(answers)
