"""How long commands take to begin.

    python benchmarks/startup.py [--runs N]
    python benchmarks/startup.py --against OTHER/.venv/bin/srlm [--runs N] [--stage NAME ...] [--model MODEL]

Without `--against`: `srlm --help` against an interpreter that only imports typer and rich. With it: every stage with a
model, from the command to its first row (of a training: to its first step), by this build and by another one in turn.
Processor time is that of the command and all its processes up to that row. Other work on the machine makes the wall
time longer, so compare processor times there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from paths import program

from srlm_cli.train.workdir import METRICS

HELP = [sys.executable, "-m", "srlm_cli", "--help"]
IMPORT = [sys.executable, "-c", "import typer, rich"]
OURS = Path(sys.executable).with_name("srlm")

QUESTION = "Why is the sky blue?"
LONG = (
    "Air scatters short waves of light more than long ones. Blue light has short waves, so it comes to our eyes from "
    "all over the sky, while red light goes straight on. At sunset the way through the air is longer."
)
SHORT = (
    "It is blue because it has always been so, and nobody has seen it in another colour for long. Some say that it has "
    "its colour from the sea; others say that the sea has it from the sky."
)
SEEDS = [
    "Write a short poem about a river that runs through a city.",
    "Explain to a child how a bicycle stays upright.",
    "List five things to check before a long walk in the mountains.",
    "Summarise the plot of a fairy tale in three sentences.",
    "What is the difference between a lake and a pond?",
    "Draft a polite letter to a neighbour about loud music.",
    "How does yeast make bread rise?",
    "Give me a recipe for soup with beans and carrots.",
]
ROWS = {
    "prompts": [{"prompt": QUESTION}],
    "seeds": [{"prompt": seed, "completion": "..."} for seed in SEEDS],
    "ift": [{"prompt": QUESTION, "completion": LONG}],
    "ranked": [{"prompt": QUESTION, "responses": [{"text": LONG, "rank": 0}, {"text": SHORT, "rank": 1}]}],
    "pairs": [{"prompt": QUESTION, "chosen": LONG, "rejected": SHORT}],
    "responses": [{"prompt_id": "a", "prompt": QUESTION, "response": LONG, "k": 0, "model": "one"}],
    "others": [{"prompt_id": "a", "prompt": QUESTION, "response": SHORT, "k": 0, "model": "another"}],
}
FEW = ["--max-new-tokens", "1"]
STAGES = {
    "sample": ["sample", "--in", "prompts.jsonl", "-n", "1", *FEW],
    "judge": ["judge", "--in", "responses.jsonl", "-k", "1", *FEW],
    "gen-prompts": ["gen-prompts", "--in", "seeds.jsonl", "--count", "1", "--together", "1", "--max-new-tokens", "32"],
    "make-eft": [
        "make-eft",
        "--in",
        "ranked.jsonl",
        "--finish-score",
        "--ties",
        "--samples",
        "1",
        "--max-share",
        "1",
        *FEW,
    ],
    "sft": ["sft", "--in", "ift.jsonl", "--out", "model", "--max-steps", "1"],
    "dpo": ["dpo", "--in", "pairs.jsonl", "--out", "model", "--max-steps", "1"],
    "eval head-to-head": ["eval", "head-to-head", "--in", "responses.jsonl", "--against", "others.jsonl", *FEW],
}
TRAINED = Path("model.part") / METRICS


def seconds(command: list[str]) -> float:
    """Return the wall time of one run."""
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def help_page(runs: int) -> None:
    """Time the help page and the imports in turn and print the ratio of each pair."""
    for command in (HELP, IMPORT):
        seconds(command)  # not counted: fills the caches
    pairs = [(seconds(HELP), seconds(IMPORT)) for _ in range(runs)]
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    print(f"{' '.join(HELP[1:])}  against  python -c 'import typer, rich'  ({runs} runs each, in turn)")
    ours, theirs = (statistics.median(pair[at] for pair in pairs) for at in (0, 1))
    print(f"median {ours:.3f} s against {theirs:.3f} s")
    print(f"ratio {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})")


def first_row(srlm: Path, stage: str, folder: Path, *, to_the_end: bool = False) -> tuple[float, float]:
    """Return processor and wall time of a stage up to its first row."""
    shutil.rmtree(folder / TRAINED.parent, ignore_errors=True)
    shutil.rmtree(folder / "model", ignore_errors=True)
    started = time.perf_counter()
    with subprocess.Popen(
        [srlm, *STAGES[stage], "--quiet"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        if stage in ("sft", "dpo"):
            while run.poll() is None and not (has_rows(folder / TRAINED) or has_rows(folder / "model" / METRICS)):
                time.sleep(0.005)
            found = run.poll() is None
        else:
            found = bool(run.stdout.readline())
        if not found:
            raise SystemExit(f"{srlm} {stage}: no row: {run.stderr.read()}")
        taken = processor_time(run.pid), time.perf_counter() - started
        if not to_the_end:
            run.kill()
        run.communicate()
    return taken


def has_rows(file: Path) -> bool:
    """Tell whether a file is there with something in it."""
    return file.exists() and file.stat().st_size > 0


def processor_time(pid: int) -> float:
    """Return the seconds that a process and all those it has started have computed."""
    total = 0.0
    command = psutil.Process(pid)
    for process in (command, *command.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])  # user, system, and both of those that have ended
        except psutil.NoSuchProcess:
            pass
    return total


def stages(names: list[str], other: Path, runs: int, model: str) -> None:
    """Time stages by both builds in turn and print their medians and the ratio of these."""
    os.environ["SRLM_MODEL"] = model
    print(f"from the command to the first row, this build against {other}, {model}, {runs} runs each, in turn")
    print("| stage | processor time, s | ratio | wall time, s | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, rows in ROWS.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for stage in names:
            for srlm in (other, OURS):
                first_row(srlm, stage, folder, to_the_end=True)  # not counted: fills the caches
            taken = [(first_row(other, stage, folder), first_row(OURS, stage, folder)) for _ in range(runs)]
            cells = []
            for kind in (0, 1):
                before, now = (statistics.median(pair[build][kind] for pair in taken) for build in (0, 1))
                ratios = sorted(ours[kind] / theirs[kind] for theirs, ours in taken)
                cells.append(f"{before:.2f} -> {now:.2f} | {now / before:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
            print(f"| {stage} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--against", type=program, metavar="SRLM", help="the srlm command of another build")
    parser.add_argument("--stage", action="append", choices=STAGES, help="only this one; repeatable")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    options = parser.parse_args()
    print(f"python {platform.python_version()}, {platform.machine()}")
    if options.against:
        stages(options.stage or list(STAGES), options.against, options.runs, options.model)
    else:
        help_page(options.runs)


if __name__ == "__main__":
    main()
