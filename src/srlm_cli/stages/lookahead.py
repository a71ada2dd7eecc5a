"""Pair the inputs of an engine with its outputs, lazily."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from srlm_cli.engines.base import Completion, Engine, Request

T = TypeVar("T")


def generate_for(
    items: Iterable[T], ask: Callable[[T], Request | None], engine: Engine
) -> Iterator[tuple[T, Completion | None]]:
    """Yield (item, its completion) in order; the engine may read ahead as far as it likes.

    An item that there is nothing to `ask` about has None.
    """
    waiting: deque[tuple[T, bool]] = deque()

    def requests() -> Iterator[Request]:
        for item in items:
            request = ask(item)
            waiting.append((item, request is not None))
            if request is not None:
                yield request

    def unasked() -> Iterator[tuple[T, None]]:
        while waiting and not waiting[0][1]:
            yield waiting.popleft()[0], None

    for completion in engine.generate(requests()):
        yield from unasked()
        yield waiting.popleft()[0], completion
    yield from unasked()
