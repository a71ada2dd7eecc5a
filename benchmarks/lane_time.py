"""Where the time of sampling or judging goes on a CPU: seconds of each lane, by what they were spent on.

    python benchmarks/lane_time.py judge --rows responses.jsonl --limit 200 --max-new-tokens 160
    python benchmarks/lane_time.py sample --rows prompts.jsonl --limit 64

The requests are those of the stages (N=4, K=3, temperature 0.7, top-p 0.9), written by the `hf` engine in its lanes.
Products and attention are timed where they are called, within reading (of prompts) and steps (a token of each row).
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

from race import hardware
from work import requests_of

from srlm_cli.engines import EngineSpec, open_engine
from srlm_cli.engines.inprocess import compiled_passes, halves, refill
from srlm_cli.engines.inprocess.packed import PackedModel

EACH = {"sample": 4, "judge": 3}
spent: Counter[str] = Counter()  # of this process: a lane has its own


def timed(what: str, function: Callable) -> Callable:
    """Return a function that notes how long each call of another takes."""

    def call(*arguments, **named):
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            spent[what] += time.perf_counter() - started

    return call


def watch(folder: str) -> None:
    """Note the time of the engine's parts, and put what a lane has noted into a file of the folder at each step."""
    compiled, advance = halves.compiled, refill.Writer.advance

    def timed_products(kind):
        pack, multiply = compiled(kind)
        return pack, timed("products", multiply)

    def noted(writer: refill.Writer) -> None:
        rows = len(writer.rows)
        timed("all", advance)(writer)
        spent.update({"steps": 1, "rows": rows})
        Path(folder, str(os.getpid())).write_text(json.dumps(spent))

    halves.compiled = timed_products
    compiled_passes._Paged.attend = timed("attention", compiled_passes._Paged.attend)
    PackedModel.read, PackedModel.step = timed("reading", PackedModel.read), timed("steps of", PackedModel.step)
    refill.draw, refill.Writer.advance = timed("draws", refill.draw), noted


def main() -> None:
    """Run a job, and print the seconds of each lane."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(EACH))
    parser.add_argument("--rows", type=Path, required=True, help="prompts, or replies of srlm sample; JSONL")
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
        for lane in Path(folder).iterdir():
            of = Counter(json.loads(lane.read_text()))
            inside = of["products"] + of["attention"]
            print(
                f"a lane of {of['all']:.1f} s: reading {of['reading']:.1f}, steps {of['steps of']:.1f}, draws "
                f"{of['draws']:.1f}, beside these {of['all'] - of['reading'] - of['steps of'] - of['draws']:.1f}; in "
                f"reading and steps: products {of['products']:.1f}, attention {of.get('attention', 0.0):.1f}, the rest "
                f"{of['reading'] + of['steps of'] - inside:.1f}; {of['rows'] / of['steps']:.0f} rows a step"
            )


if __name__ == "__main__":
    main()
