"""What two models at once on one CPU cost: tokens a second of both together, against one process alone.

    python benchmarks/sharing.py [--model MODEL] [--rows N] [--tokens N] [--repeats N]

Each process draws `--rows` completions of at most `--tokens` tokens, as many at a time as srlm does. Measured in
turn: one process alone; two at once as srlm shares the cores; with half of the threads each from the start
(OMP_NUM_THREADS); and with as many threads each as there are cores, as torch leaves it. The load and a warm-up are
left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import torch

from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling


def draw(model: str, rows: int, tokens: int) -> None:
    """Load a model, say so, wait for a line, draw completions, and print the tokens and the threads at the end."""
    engine = open_engine(EngineSpec("hf", model))
    asked = [{"role": "user", "content": "Count on from one, in words, without an end."}]

    def run(count: int, length: int) -> int:
        sampling = Sampling(1.0, 1.0, length)
        requests = (Request(asked, sampling, (4 * at, 4 * at + 1, 4 * at + 2, 4 * at + 3)) for at in range(count // 4))
        return sum(done.tokens_out for done in engine.generate(requests))

    run(8, 4)
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps({"tokens": run(rows, tokens), "threads": torch.get_num_threads()}), flush=True)


def together(given: argparse.Namespace, count: int, threads: int | None) -> tuple[float, list[int]]:
    """Return the tokens a second of `count` processes together, and each one's threads at its end."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, __file__, "--model", given.model, "--rows", str(given.rows), "--tokens"]
    processes = [
        subprocess.Popen(
            [*command, str(given.tokens), "--draw"], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    started = time.perf_counter()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    done = [json.loads(process.stdout.readline()) for process in processes]
    seconds = time.perf_counter() - started
    for process in processes:
        process.communicate()
    return sum(one["tokens"] for one in done) / seconds, [one["threads"] for one in done]


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--draw", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rows < 4 or given.rows % 4:
        parser.error("--rows takes a multiple of 4: there are four completions per prompt")
    if given.draw:
        draw(given.model, given.rows, given.tokens)
    else:
        measure(given)


def measure(given: argparse.Namespace) -> None:
    """Measure in turn and print a table."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ways = {
        "one alone": (1, None),
        "two, shared by srlm": (2, None),
        f"two, {cores // 2} threads each": (2, cores // 2),
        f"two, {cores} threads each": (2, cores),
    }
    print("python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]))
    print(f"{cores} cores, {platform.machine()}, torch {torch.__version__}, {given.model}, {given.rows} rows")
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.repeats):
        for name, (count, threads) in ways.items():
            rate, had = together(given, count, threads)
            rates[name].append(rate)
            print(f"  {name}: {rate:.0f} tokens/s, threads at the end {had}", flush=True)
    alone = rates["one alone"]
    for name, found in rates.items():
        ratios = sorted(rate / base for rate, base in zip(found, alone, strict=True))
        print(
            f"{name:24} {statistics.median(found):6.0f} tokens/s, of one alone {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
