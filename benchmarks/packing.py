"""What packed rows and an embedding's gradient by row save a training on a CPU, by the tokens of a pass.

    python benchmarks/packing.py [--task sft|dpo] [--in ROWS.jsonl] [--rows N] [--batch N] [--tokens N]... [--repeats N]
    python benchmarks/packing.py --passes

Contenders, each in a process of its own and in turn: one row at a time with PyTorch's own gradient of the
embedding; the same with the gradient by row; and packed, up to so many tokens a pass. Without `--in` the rows are
those of `benchmarks/training.py`. `--passes` times a forward and backward pass of one row by its length instead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from paths import existing_file
from training import DATA, MODEL, completions, figures, pairs

from srlm_cli.models.load import load_model, quiet_libraries
from srlm_cli.train import packing, step_trainer
from srlm_cli.train.embedding_gradient import add_by_row
from srlm_cli.train.setup import keep_freed_memory

LENGTHS = (8, 32, 100, 300)


def contend(who: str, given: argparse.Namespace) -> dict[str, Any]:
    """Train as one contender, in this process, and return its figures."""
    if who.isdecimal():
        packing.TOKENS = int(who)
    else:
        packing.Packing.now = lambda self: False
    if who == "by row":
        step_trainer.add_by_row = lambda model: None
    if given.path:
        made = [json.loads(line) for line in given.path.read_text(encoding="utf-8").splitlines()[: given.rows]]
    else:
        made = (pairs if given.task == "dpo" else completions)(DATA, given.rows)
    with tempfile.TemporaryDirectory() as scratch:
        return figures(given.task, "srlm", made, given.batch, given.length, Path(scratch) / "m")


def race(given: argparse.Namespace) -> None:
    """Let the contenders train in turn, and print how much faster than the first each one is."""
    names = ["by row", "by row, embedding's gradient too", *map(str, given.tokens)]
    rates: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    for _ in range(given.repeats):
        for who in names:
            argv = [sys.executable, *sys.argv, "--contender", who]
            done = json.loads(subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
            rates[who].append(done["tokens"] / done["seconds"])
            losses[who] = done["last_loss"]
            print(f"  {who}: {rates[who][-1]:.0f} tokens/s, {done['tokens']} tokens, peak {done['peak_gb']:.2f} GB, "
                  f"last loss {done['last_loss']:.6f}", flush=True)  # fmt: skip
    for who in names[1:]:
        ratios = sorted(own / first for own, first in zip(rates[who], rates[names[0]], strict=True))
        apart = abs(losses[who] - losses[names[0]])
        print(f"{who}: {statistics.median(ratios):.2f} times the first ({ratios[0]:.2f} to {ratios[-1]:.2f}), "
              f"last losses {apart:.1e} apart")  # fmt: skip


def passes(repeats: int) -> None:
    """Print the milliseconds of a pass of one row, logits and targets of its last 8 tokens, by its length."""
    quiet_libraries()
    keep_freed_memory()
    print("tokens  PyTorch's gradient  by row  (ms, median)")
    found: dict[tuple[int, bool], list[float]] = {(length, own): [] for length in LENGTHS for own in (False, True)}
    for own in (False, True):
        net = load_model(MODEL, "float32").train()
        if own:
            add_by_row(net)
        for _ in range(repeats + 1):
            for length in LENGTHS:
                ids = torch.randint(0, 40_000, (1, length))
                started = time.perf_counter()
                logits = net(input_ids=ids, logits_to_keep=8, use_cache=False).logits
                torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, -7:]).backward()
                found[length, own].append(1000 * (time.perf_counter() - started))
    for length in LENGTHS:
        theirs, ours = (statistics.median(found[length, own][1:]) for own in (False, True))
        print(f"{length:6}  {theirs:18.0f}  {ours:6.0f}")


def main() -> None:
    """Measure, or be one of the contenders."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=["sft", "dpo"], default="sft")
    parser.add_argument("--in", dest="path", type=existing_file)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--tokens", type=int, action="append", help="default: 1024")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--passes", action="store_true")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not (given.path or given.passes or DATA.is_dir()):
        parser.error(f"{DATA} does not exist: --in takes rows to train on")
    given.tokens = given.tokens or [packing.TOKENS]
    if given.contender:
        print(json.dumps(contend(given.contender, given)))
        return
    print("python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]))
    print(f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, {MODEL}", flush=True)
    if given.passes:
        passes(max(3, given.repeats))
    else:
        race(given)


if __name__ == "__main__":
    main()
