"""A deterministic engine without a model: for tests, controls and dry runs of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from random import Random

from srlm_cli.engines.base import Completion, Request
from srlm_cli.seeds import derive

WORDS = """amber anchor autumn basket beacon bottle breeze bridge candle canyon carpet castle cedar
chapel circle clover cobalt copper cotton crystal daisy desert dragon ember engine fabric falcon feather
forest fossil garden garnet glacier granite hammer harbor hazel hollow island ivory jacket jasmine jungle
kettle ladder lantern lemon letter lily lizard magnet maple marble meadow mirror mosaic needle nickel oasis
ocean olive orchid paddle pebble pepper pillow planet pocket prairie quartz rabbit raven ribbon river saddle
saffron shadow signal silver spiral spring summit sunset temple thistle thunder timber tunnel valley velvet
violet walnut whistle willow window winter""".split()


class EchoEngine:
    """Answer with words drawn from the seed and the prompt, ending in a `Score: k` line.

    The same request gives the same completion on every machine. Every text ends with a readable
    score, so one engine serves every stage of the loop.
    """

    name = "echo"
    model = "echo"

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield a made-up completion for each request."""
        for request in requests:
            asked = " ".join(message["content"] for message in request.messages) + request.prefix
            texts, reasons = [], []
            for seed in request.seeds:
                draw = Random(derive(seed, asked))
                text, reason = self._choice(draw, request) if request.choices else self._text(draw, request)
                texts.append(text)
                reasons.append(reason)
            even = [1 / len(request.choices)] * len(request.choices) if request.choices else None
            words = sum(len(text.split()) for text in texts)
            yield Completion(texts, reasons, len(asked.split()), words, even)

    @staticmethod
    def _choice(draw: Random, request: Request) -> tuple[str, str]:
        return draw.choice(request.choices), "stop"

    @staticmethod
    def _text(draw: Random, request: Request) -> tuple[str, str]:
        words = [draw.choice(WORDS) for _ in range(draw.randint(6, 24))]
        text = " ".join(words).capitalize() + f".\nScore: {draw.randint(0, 5)}"
        for stop in request.sampling.stop:
            text = text.split(stop)[0]
        cut = text.split(" ")
        if len(cut) > request.sampling.max_new_tokens:
            return " ".join(cut[: request.sampling.max_new_tokens]), "length"
        return text, "stop"
