"""Requests in progress: the prompt in tokens, and the completions so far; and the queue of waiting requests."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from srlm_cli.engines.base import Completion, Request, no_text
from srlm_cli.engines.hf.stopping import Stops, Written

TAIL = 200  # characters at the end of a prompt, in which the mark of an opened thought is looked for


@dataclass(eq=False)
class Task:
    """A request in progress; `left` are the indices of the seeds that have not started.

    `tail` is the end of the prompt as text; `opened` is true if the prompt ends inside a thought.
    """

    request: Request
    prompt: list[int]
    budget: int
    left: deque[int] = field(default_factory=deque)
    done: dict[int, Written] = field(default_factory=dict)
    follow_ups: dict[int, Completion] = field(default_factory=dict)
    answer: Completion | None = None
    tail: str = ""
    opened: bool = False

    def finish(self, place: int, written: Written, follow_up: Completion | None = None) -> None:
        """Store one completion and the answer to its follow-up; with the last one the task is answered."""
        self.done[place] = written
        if follow_up:
            self.follow_ups[place] = follow_up
        if len(self.done) == len(self.request.seeds):
            texts, reasons, thoughts, counts = zip(*(self.done[at] for at in sorted(self.done)), strict=True)
            answers = tuple(map(self.follow_ups.get, sorted(self.done))) if self.follow_ups else ()
            self.answer = Completion(
                list(texts), list(reasons), len(self.prompt), sum(counts), follow_ups=answers,
                thoughts=thoughts if any(thoughts) else (),
            )  # fmt: skip

    def refuse(self, reason: str, why: str = "") -> None:
        """Answer with empty texts."""
        self.answer = no_text(self.request, reason, len(self.prompt), why)


class BaseScheduler:
    """The base of all schedulers: at most `limit` completions at a time, and a queue of tasks."""

    def __init__(self, stops: Stops, limit: int) -> None:
        self.stops, self.limit = stops, limit
        self.waiting: deque[Task] = deque()

    def add(self, task: Task) -> None:
        """Append a task to the queue."""
        task.left = deque(range(len(task.request.seeds)))
        self.waiting.append(task)

    @property
    def backlog(self) -> int:
        """The number of completions that have not started."""
        return sum(len(task.left) for task in self.waiting)

    def close(self) -> None:
        """Stop worker processes; does nothing for schedulers without them."""
