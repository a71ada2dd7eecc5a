"""A judge whose scores are the reply's quality and noise, and how well scores order replies of known quality."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations, groupby
from random import Random
from statistics import fmean
from typing import Any

from srlm_cli.engines.base import Completion, Request
from srlm_cli.records import response_record

Record = dict[str, Any]


class SimulatedJudge:
    """A judge of the template `additive`, whose scores are rounded; a quality of None cannot be read."""

    name = "list"
    model = "fake"

    def __init__(self, quality: dict[str, float | None], noise: float = 1.0) -> None:
        self.quality, self.noise = quality, noise
        self.rounds: list[int] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        self.rounds.append(0)
        for request in requests:
            self.rounds[-1] += 1
            asked = "\n".join(turn["content"] for turn in request.messages)
            quality = self.quality[asked.split("<reply>\n")[1].split("\n</reply")[0]]
            drawn = [0.0 if quality is None else quality + Random(seed).gauss(0, self.noise) for seed in request.seeds]
            said = ["?" if quality is None else f"Score: {min(5, max(0, round(score)))}" for score in drawn]
            yield Completion(said, ["stop"] * len(said), 10, len(said))


def rows_of(quality: dict[str, float | None], prompt: str = "Why?") -> list[Record]:
    """Return the response records of one prompt."""
    return [response_record({"prompt": prompt, "response": text, "k": k}) for k, text in enumerate(quality)]


def replies(prompts: int, spread: float, each: int = 4) -> tuple[list[Record], dict[str, float | None]]:
    """Return the response records of prompts with `each` replies, and the quality of each reply."""
    random = Random(1)
    rows, quality = [], {}
    for n in range(prompts):
        middle = random.uniform(1.5, 3.5)
        own = {f"r{n}.{k}": middle + random.gauss(0, spread) for k in range(each)}
        quality |= own
        rows += rows_of(own, prompt=f"Ask {n}?")
    return rows, quality


def prompts_of(rows: list[Record]) -> list[list[Record]]:
    """Return the rows by prompt."""
    return [list(group) for _, group in groupby(rows, key=lambda row: row["prompt_id"])]


def accuracy(rows: list[Record], quality: dict[str, float | None]) -> float:
    """Return the share of pairs of replies to one prompt that the scores order as the qualities do."""
    pairs = [pair for group in prompts_of(rows) for pair in combinations(group, 2)]
    gaps = [quality[one["response"]] - quality[other["response"]] for one, other in pairs]
    return fmean((one["score"] - other["score"]) * gap > 0 for (one, other), gap in zip(pairs, gaps, strict=True))


def ends(rows: list[Record]) -> list[tuple[int, int]]:
    """Return the places of the best and the worst reply to each prompt."""
    scores = [[row["score"] for row in group] for group in prompts_of(rows)]
    return [(some.index(max(some)), some.index(min(some))) for some in scores]
