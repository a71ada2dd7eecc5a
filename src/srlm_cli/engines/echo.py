"""A deterministic engine without a model: for tests, dry runs of a pipeline, and judges to compare with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path
from random import Random

from srlm_cli.engines.base import Completion, Request
from srlm_cli.errors import OptionError
from srlm_cli.seeds import derive

WORDS = """amber anchor autumn basket beacon bottle breeze bridge candle canyon carpet castle cedar
chapel circle clover cobalt copper cotton crystal daisy desert dragon ember engine fabric falcon feather
forest fossil garden garnet glacier granite hammer harbor hazel hollow island ivory jacket jasmine jungle
kettle ladder lantern lemon letter lily lizard magnet maple marble meadow mirror mosaic needle nickel oasis
ocean olive orchid paddle pebble pepper pillow planet pocket prairie quartz rabbit raven ribbon river saddle
saffron shadow signal silver spiral spring summit sunset temple thistle thunder timber tunnel valley velvet
violet walnut whistle willow window winter""".split()
BEST = 5
JUDGES = ("rules", "random", "longest", "shortest", "constant:N")


class EchoEngine:
    """Answer with words drawn from the seed and the prompt, ending in a `Score: k` line.

    The same request gives the same completion on every machine. Every text ends with a readable
    score, so one engine serves every stage of the loop. As one of `JUDGES` it writes nothing but a
    score of 0 to 5: a whole number at random, more for a longer (or shorter) request, or always N. `rules`
    is none of the engine: `srlm judge` checks the rules itself.
    """

    name = "echo"
    model = "echo"

    def __init__(self, judge: str | None = None) -> None:
        """Take one of `JUDGES`, or a model's name, which does not matter; raise OptionError for another word."""
        self.model = echo_name(judge)
        if self.model == "echo:rules":
            raise OptionError("the echo judge `rules` is for srlm judge", f"--model one of {', '.join(JUDGES[1:])}")

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield a made-up completion for each request."""
        for request in requests:
            asked = " ".join(message["content"] for message in request.messages) + request.prefix
            score = self._score(request)
            likely = probabilities(request.choices, score) if request.choices else None
            texts, reasons = [], []
            for seed in request.seeds:
                draw = Random(derive(seed, asked))
                if likely and max(likely) > min(likely):
                    text, reason = request.choices[likely.index(max(likely))], "stop"
                elif request.choices:
                    text, reason = draw.choice(request.choices), "stop"
                else:
                    text, reason = self._text(draw, request, score)
                texts.append(text)
                reasons.append(reason)
            words = sum(len(text.split()) for text in texts)
            yield Completion(texts, reasons, len(asked.split()), words, likely, 1.0 if likely else None)

    def _score(self, request: Request) -> float | None:
        """Return the score of a judge that draws nothing, or None.

        One prompt's requests differ in the reply only, so the longer request has the longer reply.
        """
        if self.model.startswith("echo:constant:"):
            return float(self.model.rpartition(":")[2])
        shortness = 1 / (1 + sum(len(message["content"]) for message in request.messages) / 1000)
        return {"echo:longest": BEST * (1 - shortness), "echo:shortest": BEST * shortness}.get(self.model)

    def _text(self, draw: Random, request: Request, score: float | None) -> tuple[str, str]:
        if score is not None:
            text = f"Score: {score:.9f}".rstrip("0").rstrip(".")
        elif self.model == "echo:random":
            text = f"Score: {draw.randint(0, BEST)}"
        else:
            words = [draw.choice(WORDS) for _ in range(draw.randint(6, 24))]
            text = " ".join(words).capitalize() + f".\nScore: {draw.randint(0, BEST)}"
        for stop in request.sampling.stop:
            text = text.split(stop)[0]
        cut = text.split(" ")
        if len(cut) > request.sampling.max_new_tokens:
            return " ".join(cut[: request.sampling.max_new_tokens]), "length"
        return text, "stop"


def echo_name(model: str | None) -> str:
    """Return the name of the engine in rows: `echo`, or for instance `echo:longest` for one of `JUDGES`.

    A folder, a file, a hub id or the embedded model is ignored, so that a recipe runs unchanged with this engine.
    Another word raises OptionError.
    """
    from srlm_cli.models.embedded import EMBEDDED  # late: most commands never ask

    kind, _, number = (model or "").partition(":")
    if model in JUDGES[:-1] or (kind == "constant" and _is_number(number)):
        return f"echo:{model}"
    if not model or "/" in model or model in EMBEDDED or Path(model).exists():
        return "echo"
    raise OptionError(f"the echo engine has no model {model!r}", f"--model one of {', '.join(JUDGES)}, or none")


def probabilities(choices: tuple[str, ...], score: float | None) -> list[float]:
    """Return a probability per choice: the mean of numeric choices is the score; others are equally probable."""
    if score is None or not all(map(_is_number, choices)):
        return [1 / len(choices)] * len(choices)
    values = [float(choice) for choice in choices]
    score = min(max(score, min(values)), max(values))
    below = max(value for value in values if value <= score)
    above = min(value for value in values if value >= score)
    share = (score - below) / (above - below) if above > below else 0.0
    return [1 - share if value == below else share if value == above else 0.0 for value in values]


def _is_number(text: str) -> bool:
    try:
        return isfinite(float(text))
    except ValueError:
        return False
