"""Whether a server draws its texts: equal ones under different seeds are looked into, once.

Equal texts alone prove nothing: a short answer, or one that the model is sure of, comes out the same again and again.
So the check asks for something else, which no model that draws writes twice: the beginning of a story at temperature 2
without a nucleus. Only a server that repeats that, in texts long enough to be sure, is stopped.
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
LONG = 40  # characters, about ten tokens: at temperature 2 each of them differs more often than not


class Draws:
    """What is known of how a server draws: nothing at first, then whether the choices of one request share a draw.

    `write` asks for texts, one for each seed or fewer, in one request.
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
        """Return whether the choices of a request share one draw, after `equal` texts that should differ.

        Raise EngineError where the server does not draw at all: whatever seed and temperature say.
        """
        async with self.lock:
            if not self.known:
                try:
                    await self._find_out(equal)
                except openai.OpenAIError:  # a temperature that is refused has been read
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
            apart = together if len(together) == 1 else []  # a server that takes no n
            rest = await asyncio.gather(*(self.write(STORY, (seed,)) for seed in SEEDS[len(apart) :]))
            apart = [*apart, *(texts[0] for texts in rest)]
        except EngineError:  # temperature 2 is refused: so it has been read
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
    """Return whether texts differ, or may: those that are equal and short prove nothing."""
    return len(set(texts)) > 1 or len(texts[0].strip()) < LONG
