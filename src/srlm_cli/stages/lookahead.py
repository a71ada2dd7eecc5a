"""Pair what goes into an engine with what comes out of it, lazily."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from srlm_cli.engines.base import Completion, Engine, Request

T = TypeVar("T")


def generate_for(items: Iterable[T], ask: Callable[[T], Request], engine: Engine) -> Iterator[tuple[T, Completion]]:
    """Yield (item, its completion) in order; the engine may read ahead as far as it likes."""
    waiting: deque[T] = deque()

    def requests() -> Iterator[Request]:
        for item in items:
            waiting.append(item)
            yield ask(item)

    for completion in engine.generate(requests()):
        yield waiting.popleft(), completion
