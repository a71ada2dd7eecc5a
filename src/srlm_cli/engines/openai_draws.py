"""Check once whether a server samples, after it returned equal texts for different seeds.

Equal texts alone prove nothing: a short answer, or one that the model is sure of, is the same in every sample. So the
check requests a text that no sampling model writes twice: the start of a story at temperature 2 and top-p 1. Only a
server that repeats this text, and at sufficient length, is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import openai

from srlm_cli.engines.base import Request, Sampling
from srlm_cli.errors import EngineError
from srlm_cli.streams.console import say

SEEDS = (1, 2, 3)
STORY = Request(
    [{"role": "user", "content": "Write a story about anything you like."}],
    Sampling(temperature=2.0, top_p=1.0, max_new_tokens=32),
    SEEDS,
)
LONG = 40  # characters, about ten tokens; at temperature 2 each is more likely to differ than not


class Draws:
    """Finds out whether the choices of one request share a sample.

    `write` requests texts in one request, one per seed or fewer.
    """

    def __init__(
        self, write: Callable[[Request, tuple[int, ...]], Awaitable[list[str]]], url: str, wanted: bool = True
    ) -> None:
        self.write = write
        self.url = url
        self.known = not wanted
        self.one_draw = False
        self.failed: EngineError | None = None
        self.lock = asyncio.Lock()

    async def shared(self, equal: int) -> bool:
        """Return whether the choices of a request share one sample, after `equal` texts that should differ.

        Raise EngineError if the server does not sample at all, whatever the seed and the temperature.
        """
        async with self.lock:
            if not self.known:
                try:
                    await self._find_out(equal)
                except openai.OpenAIError:  # a server that refuses the temperature has read it
                    pass
                self.known = True
        if self.failed:
            raise self.failed
        return self.one_draw

    async def _find_out(self, equal: int) -> None:
        try:
            together = await self.write(STORY, SEEDS)
            if differ(together):
                return
            apart = together if len(together) == 1 else []  # a server that ignores n
            rest = await asyncio.gather(*(self.write(STORY, (seed,)) for seed in SEEDS[len(apart) :]))
            apart = [*apart, *(texts[0] for texts in rest)]
        except EngineError:  # a server that refuses temperature 2 has read it
            return
        if not differ(apart):
            self.failed = EngineError(
                f"{self.url} does not draw: {equal} replies to one prompt are equal, and {len(SEEDS)} stories at "
                f"temperature 2 are, too: {apart[0][:LONG]!r}",
                "`transformers serve` draws where generation_config.json has do_sample; --temperature 0 asks for one "
                "text; --no-check-sampling continues",
            )
        elif len(together) > 1:
            self.one_draw = True
            say(f"srlm: {self.url} draws the same text for all choices of a request: each is asked for by itself")


def differ(texts: list[str]) -> bool:
    """Return whether texts differ, or are too short to prove that they do not."""
    return len(set(texts)) > 1 or len(texts[0].strip()) < LONG
