"""What it saves to ask for a judgement's score while its text is at hand, against reading prompt and text again.

    python benchmarks/finish.py --in ranked_eval.jsonl [--limit N] [--max-new-tokens N] [--repeats N]

K=3 judgements of each reply with the additive rubric, `--force-score --score expected`, both ways in turn in
one process. Printed are judgements a second, their ratio with its spread, how many texts had their score at once
(the others needed too many tokens more), and the largest difference of a score.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from paths import existing_file

from srlm_cli import templates
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import Completion, Engine, EngineSpec, Request, Sampling
from srlm_cli.records import ranked_record, responses_of
from srlm_cli.stages.judge import JudgeOptions, judge


class Counting:
    """An engine, and how many of its completions brought an answer to what was asked behind them."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.name, self.model = engine, engine.name, engine.model
        self.texts = self.answered = 0

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield the engine's completions."""
        for done in self.engine.generate(requests):
            self.texts += len(done.texts)
            self.answered += sum(answer is not None for answer in done.follow_ups)
            yield done


class Forgetful:
    """An engine that answers nothing behind a text at once, as those of other makers do."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.name, self.model = engine, engine.name, engine.model

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield the engine's completions."""
        return self.engine.generate(replace(request, follow_up=None) for request in requests)


def main() -> None:
    """Judge both ways in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--in", dest="path", type=existing_file, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--limit", type=int, default=16, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    with open(given.path, encoding="utf-8") as file:
        ranked = [json.loads(line) for line, _ in zip(file, range(given.limit), strict=False)]
    replies = [reply for row in ranked for reply in responses_of(ranked_record(row))]
    form = templates.load("additive", fields={"prompt", "response"}, reads=True)
    sampling = Sampling(max_new_tokens=given.max_new_tokens)
    options = JudgeOptions(form, 3, sampling, seed=0, force_score=True, score="expected")
    at_once = Counting(open_engine(EngineSpec("hf", given.model)))
    print("python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]))
    print(f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, {given.model}")
    print(f"{len(ranked)} prompts, {len(replies)} replies, {3 * len(replies)} judgements", flush=True)
    rates: dict[str, list[float]] = {"at once": [], "read again": []}
    scores: dict[str, list[float]] = {}
    for _ in range(given.repeats):
        for name, engine in (("at once", at_once), ("read again", Forgetful(at_once.engine))):
            started = time.perf_counter()
            judged = [row for outcome in judge(replies, engine, options) for row in outcome.rows]
            rates[name].append(3 * len(replies) / (time.perf_counter() - started))
            scores[name] = [score for row in judged for score in row["scores"]]
            print(f"  {name}: {rates[name][-1]:.2f} judgements/s", flush=True)
    ratios = sorted(new / old for new, old in zip(*rates.values(), strict=True))
    print(f"{at_once.answered / at_once.texts:.1%} of the texts had their score at once")
    both = list(zip(*scores.values(), strict=True))
    apart = max((abs(one - other) for one, other in both if None not in (one, other)), default=0.0)
    unlike = sum((one is None) != (other is None) for one, other in both)
    print(
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); scores differ by {apart:.1e}, "
        f"{unlike} are missing one way only"
    )


if __name__ == "__main__":
    main()
