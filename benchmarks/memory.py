"""What each command that reads a whole file keeps of it in memory: bytes a row and bytes a prompt, measured.

python benchmarks/memory.py [--prompts N] [--only NAME,NAME] [--folder FOLDER]

Runs each command on N prompts and on 3 N, with two and with four responses each (short ones: texts are not kept, as
the longer ones of `--texts` show), and takes the slopes of its peak memory, that of all its processes together. The
tables on disk have 1 MiB of cache here instead of 32, so that the slope is not that of a cache that fills, and
`length-control` makes 2 draws, one at a time, as it makes 2,000 of a million rows and more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from random import Random
from subprocess import Popen
from time import sleep

from paths import made_folder

PROGRAM = """
from srlm_cli.cli import main
from srlm_cli.evaluate import length_control
from srlm_cli.streams import spill
spill.CACHE_KIB = 1024
length_control.RESAMPLES, length_control.WEIGHTS_AT_ONCE = 2, 1
main()
"""
COMMANDS = {
    "make-pairs": ["make-pairs", "--in", "judged.jsonl"],
    "make-pairs --unsorted": ["make-pairs", "--unsorted", "--in", "judged.jsonl"],
    "make-pairs --rejected-pool": ["make-pairs", "--in", "judged.jsonl", "--rejected-pool", "earlier.jsonl"],
    "jury": ["jury", "--in", "judged.jsonl", "--in", "other.jsonl"],
    "jury of another order": ["jury", "--in", "judged.jsonl", "--in", "backwards.jsonl"],
    "eval health": ["eval", "health", "--in", "judged.jsonl"],
    "eval reward": ["eval", "reward", "--in", "judged.jsonl"],
    "eval reward --ranked": ["eval", "reward", "--in", "judged.jsonl", "--ranked", "ranked.jsonl"],
    "eval length-control": ["eval", "length-control", "--in", "compared.jsonl"],
    "eval head-to-head": ["eval", "head-to-head", "--engine", "echo", "--in", "one.jsonl", "--against", "judged.jsonl"],
}


def judged(prompts: int, n: int, text: str, seed: int = 0, backwards: bool = False) -> Iterator[dict]:
    """Yield judged rows with what people thought of them."""
    for prompt in reversed(range(prompts)) if backwards else range(prompts):
        draw = Random(f"{seed}/{prompt}")
        for k in range(n):
            scores = [float(draw.randint(0, 5)) for _ in range(3)]
            yield {
                "prompt": f"Question {prompt}?",
                "prompt_id": f"{prompt * 2654435761 % 2**64:016x}",
                "response": f"{k} {text}" + "x" * draw.randint(1, 40),
                "k": k,
                "human": draw.random(),
                "score": sum(scores) / 3,
                "scores": scores,
            }


def compared(prompts: int, n: int) -> Iterator[dict]:
    """Yield comparisons, n to a prompt, in which the longer reply wins more often."""
    draw = Random(0)
    for prompt in range(prompts):
        for _ in range(n):
            ours, theirs = draw.randint(1, 900), draw.randint(1, 900)
            won = 1.0 + (draw.random() < 0.3 + 0.4 * (ours > theirs))
            names = {"model": "M2", "baseline": "M1", "index": f"{prompt:016x}"}
            yield {
                **names,
                "len_model": ours,
                "len_baseline": theirs,
                "preference": won,
                "difficulty": draw.gauss(0, 1),
            }


def ranked(rows: Iterator[dict]) -> Iterator[dict]:
    """Yield ranked rows of the same replies."""
    for prompt, replies in groupby(rows, key=itemgetter("prompt")):
        yield {"prompt": prompt, "responses": [{"text": row["response"], "score": row["human"]} for row in replies]}


def write(folder: Path, wanted: set[str], prompts: int, n: int, text: str) -> None:
    """Write the files that the commands read."""
    files = {
        "judged.jsonl": judged(prompts, n, text),
        "earlier.jsonl": judged(prompts, n, text, seed=1),
        "ranked.jsonl": ranked(judged(prompts, n, text)),
        "other.jsonl": judged(prompts, n, text),
        "backwards.jsonl": judged(prompts, n, text, backwards=True),
        "one.jsonl": judged(prompts, n, text, seed=2),
        "compared.jsonl": compared(prompts, n),
    }
    for name in wanted & set(files):
        with open(folder / name, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in files[name])


def peak(command: list[str], folder: Path) -> int:
    """Return the most memory, in bytes, that a command holds."""
    with open(folder / "log", "w") as log:
        process = Popen([sys.executable, "-c", PROGRAM, *command], cwd=folder, stdout=log, stderr=log)
    most = 0
    while process.poll() is None:
        most = max(most, held(process.pid))
        sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: {(folder / 'log').read_text()[-500:]}")
    return most


def held(process: int) -> int:
    """Return what a process and all that come from it hold now, in bytes, shared pages counted once."""
    return sum(map(resident, tree(process)))


def tree(process: int) -> list[int]:
    """Return a process and all that come from it."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(one for child in children for one in tree(int(child)))]


def resident(process: int) -> int:
    """Return the proportional set size of a process, in bytes; 0 where it has gone."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main() -> None:
    """Print a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=50_000)
    parser.add_argument("--only", default=",".join(COMMANDS))
    parser.add_argument("--texts", type=int, default=0, help="characters more in each response")
    parser.add_argument("--folder", type=made_folder)
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(COMMANDS):
        parser.error(f"--only {','.join(sorted(unknown))}: it takes {', '.join(COMMANDS)}")
    few, many = options.prompts, 3 * options.prompts
    sizes = (few, 2), (many, 2), (many, 4)
    found: dict[str, list[int]] = {name: [] for name in options.only.split(",")}
    for prompts, n in sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            wanted = {word for name in found for word in COMMANDS[name]}
            write(Path(folder), wanted, prompts, n, "y" * options.texts)
            for name, peaks in found.items():
                peaks.append(peak(COMMANDS[name], Path(folder)))
    for name, (least, more, most) in found.items():
        a_row = (most - more) / (2 * many)
        a_prompt = (more - least) / (many - few) - 2 * a_row
        shown = " / ".join(f"{size / 2**20:.0f}" for size in (least, more, most))
        print(f"{name}: {a_row:.0f} bytes a row and {a_prompt:.0f} a prompt (peaks {shown} MiB)", flush=True)


if __name__ == "__main__":
    main()
