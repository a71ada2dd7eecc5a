"""Equal questions that have one answer are asked once: replies to a prompt are often the same text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from srlm_cli.engines.base import Completion, Request

WINDOW = 1024  # requests that may wait for one before them, and questions that are remembered

Generate = Callable[[Iterable[Request]], Iterator[Completion]]


def asked_once(requests: Iterable[Request], generate: Generate) -> Iterator[Completion]:
    """Yield one completion per request, in order, from `generate`, which gets no question a second time.

    Only the most probable of some choices is such a question: other texts are drawn by their seeds. So equal replies
    get equal expected scores, whose last digits differ between two batches.
    """
    answers: dict[str, list[Completion]] = {}  # of a question: its answer, as soon as there is one
    waiting: deque[list[Completion]] = deque()

    def new() -> Iterator[Request]:
        for request in requests:
            question = question_of(request)
            if question in answers and len(waiting) < WINDOW:
                waiting.append(answers[question])
                continue
            waiting.append([])
            if question:
                answers[question] = waiting[-1]
            if len(answers) > WINDOW:
                del answers[next(iter(answers))]
            yield request

    def answered() -> Iterator[Completion]:
        while waiting and waiting[0]:
            yield waiting.popleft()[0]

    for completion in generate(new()):
        yield from answered()  # those that were read after the completion before this one
        waiting[0].append(completion)
        yield from answered()
    yield from answered()


def question_of(request: Request) -> str:
    """Return what the answer to a request depends on, or "" if that is also its seeds."""
    drawn = not request.choices or request.sampling.temperature > 0
    return "" if drawn or request.follow_up else repr(replace(request, seeds=request.seeds[1:]))
