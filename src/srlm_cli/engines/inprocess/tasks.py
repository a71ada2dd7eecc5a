"""A request under way: its prompt in tokens, and the completions that it has so far."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from srlm_cli.engines.base import Completion, Request


@dataclass(eq=False)
class Task:
    """A request whose completions are being written; `left` are the places of the seeds not yet begun."""

    request: Request
    prompt: list[int]
    budget: int
    left: deque[int] = field(default_factory=deque)
    done: dict[int, tuple[str, str, int]] = field(default_factory=dict)
    answer: Completion | None = None

    def finish(self, place: int, text: str, reason: str, tokens: int) -> None:
        """Note one completion; the last one makes the answer."""
        self.done[place] = text, reason, tokens
        if len(self.done) == len(self.request.seeds):
            texts, reasons, counts = map(list, zip(*(self.done[at] for at in sorted(self.done)), strict=True))
            self.answer = Completion(texts, reasons, len(self.prompt), sum(counts))

    def refuse(self, reason: str) -> None:
        """Answer with empty texts."""
        size = len(self.request.seeds)
        self.answer = Completion([""] * size, [reason] * size, len(self.prompt), 0)
