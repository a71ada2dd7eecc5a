"""Where the time of sampling or judging goes on a CPU: seconds of each worker, by what they were spent on.

    python benchmarks/worker_time.py judge --rows responses.jsonl --limit 200 --max-new-tokens 160
    python benchmarks/worker_time.py sample --rows prompts.jsonl --limit 64

The requests are those of the stages (N=4, K=3, temperature 0.7, top-p 0.9), written by the `hf` engine in its workers.
Products, attention, and the storing of keys and values are timed where they are called, within reading (of prompts)
and steps (a token of each row; completions that are alike so far are one row).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "engines"))

from paths import existing_file
from race import hardware
from work import requests_of

from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec
from srlm_cli.engines.hf import scheduler
from srlm_cli.forward.cpu import linear, paged_attention
from srlm_cli.forward.packed import PackedModel
from srlm_cli.forward.prefix import CachedPrefix

EACH = {"sample": 4, "judge": 3}
spent: Counter[str] = Counter()  # of this process: a worker has its own
within: list[str] = []


def timed(what: str, function: Callable) -> Callable:
    """Return a function that notes how long each call of another takes, by what it is called within."""

    def call(*arguments, **named):
        started = time.perf_counter()
        within.append(what)
        try:
            return function(*arguments, **named)
        finally:
            spent[" ".join(within)] += time.perf_counter() - started
            within.pop()

    return call


def counted(read: Callable) -> Callable:
    """Return a function that notes how many tokens it reads."""

    def call(model: PackedModel, texts: list[CachedPrefix], *more):
        spent["tokens read"] += sum(len(text.fresh) for text in texts)
        return read(model, texts, *more)

    return call


def watch(folder: str) -> None:
    """Note the time of the engine's parts, and put what a worker has noted into a file of the folder at each step."""
    compiled, advance = linear.compiled, scheduler.Scheduler.advance

    def timed_products(kind):
        return compiled(kind)._replace(multiply=timed("products", compiled(kind).multiply))

    def noted(writer: scheduler.Scheduler) -> None:
        rows = len(writer.sequences)
        timed("all", advance)(writer)
        spent.update({"passes": 1, "rows": rows})
        Path(folder, str(os.getpid())).write_text(json.dumps(spent))

    linear.compiled = timed_products
    paged_attention._Paged.gather = timed("attention", paged_attention._Paged.gather)
    paged_attention._Paged.store = timed("storing", paged_attention._Paged.store)
    PackedModel.read, PackedModel.step = timed("reading", counted(PackedModel.read)), timed("steps", PackedModel.step)
    scheduler.draw, scheduler.Scheduler.advance = timed("draws", scheduler.draw), noted


def main() -> None:
    """Run a job, and print the seconds of each worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(EACH))
    parser.add_argument("--rows", type=existing_file, required=True, help="prompts, or replies of srlm sample; JSONL")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-size", type=int, default=256)
    given = parser.parse_args()
    print("python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]))
    print(hardware())
    sampling = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": given.max_new_tokens}
    asked = requests_of(given.task, str(given.rows), EACH[given.task], sampling)[: given.limit]
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(EngineSpec("hf", given.model, dtype=given.dtype, batch_size=given.batch_size))
        list(engine.generate(asked[:4]))  # compiled code is read or made here
        watch(folder)
        started = time.perf_counter()
        done = list(engine.generate(asked))
        seconds = time.perf_counter() - started
        tokens, rows = sum(one.tokens_out for one in done), sum(len(one.texts) for one in done)
        print(f"{seconds:.1f} s: {tokens / seconds:.0f} tokens/s, {rows / seconds:.2f} rows/s, {rows} rows")
        for worker in Path(folder).iterdir():
            of = Counter(json.loads(worker.read_text()))
            rows, seconds_of = of["rows"] / of["passes"], f"{of['all']:.1f} s, draws {of['all draws']:.1f}"
            print(f"a worker of {seconds_of}; {rows:.0f} rows a step, {of['tokens read']} tokens read")
            for part in ("reading", "steps"):
                inside = {name: of[f"all {part} {name}"] for name in ("products", "attention", "storing")}
                inside["the rest"] = of[f"all {part}"] - sum(inside.values())
                seconds_of = ", ".join(f"{name} {spent_on:.1f}" for name, spent_on in inside.items())
                print(f"  {part} {of[f'all {part}']:.1f}: {seconds_of}")


if __name__ == "__main__":
    main()
