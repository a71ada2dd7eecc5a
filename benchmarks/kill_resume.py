"""Kill sample, judge and gen-prompts with SIGKILL at random moments, run them again, compare the rows.

    python benchmarks/kill_resume.py                                    # the echo engine, slowed down
    python benchmarks/kill_resume.py --model smollm2-135m-instruct      # a real model

Prints, for each command: kills, rows, rows lost, rows doubled, and rows that equal those of an
uninterrupted run (all of them with echo; a real model's may differ by rounding, as batches differ).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SLOW_ECHO = """
import sys, time
from srlm_cli.engines.echo import EchoEngine
whole = EchoEngine.generate
def slow(self, requests):
    for completion in whole(self, requests):
        time.sleep(0.02)
        yield completion
EchoEngine.generate = slow
from srlm_cli.cli import main
main()
"""
QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"


def commands(folder: Path, model: str | None) -> dict[str, list[str]]:
    """Return the command lines to kill, by name."""
    engine = ["--model", model, "--batch-size", "8", "--dtype", "float32"] if model else ["--engine", "echo"]
    short = ["--max-new-tokens", "12"] if model else []
    responses = folder / "responses.jsonl"
    sample = ["sample", "--in", str(QUICKSTART / "ift.jsonl"), *engine, *short, "--limit", "60" if model else "150"]
    if not responses.exists():
        run([*sample, "--limit", "30", "-n", "2", "--out", str(responses), "--quiet"], slow=False)
    return {
        "sample": sample,
        "judge": ["judge", "--in", str(responses), *engine, *short, "--template", "score_only"],
        "gen-prompts": [
            "gen-prompts", "--in", str(QUICKSTART / "ift.jsonl"), *engine,
            "--prompt-batch-size", "8", "--max-new-tokens", "40", "--count", "16" if model else "120",
        ],
    }  # fmt: skip


def start(command: list[str], slow: bool) -> subprocess.Popen:
    """Start srlm, its echo engine slowed down where that is asked for."""
    program = ["-c", SLOW_ECHO] if slow else ["-m", "srlm_cli"]
    return subprocess.Popen([sys.executable, *program, *command], stderr=subprocess.PIPE, start_new_session=True)


def run(command: list[str], slow: bool) -> float:
    """Run srlm to its end and return the seconds it took."""
    started = time.monotonic()
    process = start(command, slow)
    complaint = process.communicate()[1].decode()
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit {process.returncode}: {complaint}")
    return time.monotonic() - started


def killed(command: list[str], out: Path, seconds: float, kills: int, slow: bool) -> int:
    """Kill a command at random moments within the time that it takes, then let it finish; return the kills."""
    done = 0
    while done < kills:
        process = start([*command, "--out", str(out)], slow)
        try:
            process.wait(random.uniform(0.05, max(seconds, 0.2)))
            if process.returncode == 0:
                out.with_name(out.name + ".part").unlink(missing_ok=True)
                out.unlink()  # it was quicker than the kill: begin again
                continue
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
    run([*command, "--out", str(out)], slow)
    return done


def rows(path: Path) -> list[dict]:
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    """Print one line a command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--only", choices=["sample", "judge", "gen-prompts"])
    options = parser.parse_args()
    random.seed(0)
    slow = options.model is None
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, command in commands(folder, options.model).items():
            if options.only not in (None, name):
                continue
            whole, out = folder / f"{name}-whole.jsonl", folder / f"{name}.jsonl"
            seconds = run([*command, "--out", str(whole), "--quiet"], slow)
            kills = killed(command, out, seconds, options.kills, slow)
            wanted, got = rows(whole), rows(out)
            ids = [row["id"] for row in got]
            doubled = len(ids) - len(set(ids))
            # What a real model writes may differ in rounding; then so may which prompts are kept.
            lost = len(wanted) - len(set(ids)) if name == "gen-prompts" else len({r["id"] for r in wanted} - set(ids))
            equal = sum(a == b for a, b in zip(wanted, got, strict=False))
            print(
                f"srlm {name}: {kills} kills, {len(wanted)} rows, {lost} lost, {doubled} doubled, {equal} equal",
                flush=True,
            )
            wrong += lost + doubled + (len(wanted) - equal if slow else 0)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
