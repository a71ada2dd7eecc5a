"""Prompts under two rules that a program can check, and a table of how many of them each model keeps.

    python task.py prompts --in ift.jsonl --seed 1 > prompts.jsonl
    srlm sample --in prompts.jsonl --model M1 | srlm judge --engine echo --model rules > judged.jsonl
    srlm sample --in prompts.jsonl --model M1 | srlm eval rules > M1.jsonl
    python task.py table M1.jsonl M2.jsonl

A prompt asks a question of the seed data under two of the rules below, drawn by the seed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from paths import existing_file

Record = dict[str, Any]
# What the prompt asks for, and the rule of `srlm` that checks it.
RULES = [
    ("Use no commas.", "no-commas"),
    ("Use at most 30 words.", "words:..30"),
    ("Write in lower case only.", "lower-case"),
    ("Answer with exactly three bullet points, each on a line of its own that begins with a dash.", "bullets:3"),
    ("Write one paragraph, without a line break.", "lines:1"),
    ('End with the word "Done".', r"regex:\bDone\W*\Z"),
]
CLASH = {frozenset({"bullets:3", "lines:1"}), frozenset({"lower-case", r"regex:\bDone\W*\Z"})}


def prompts(seeds: Iterable[Record], seed: int) -> Iterator[Record]:
    """Yield each seed prompt under rules drawn for it."""
    pairs = [
        (first, second)
        for at, first in enumerate(RULES)
        for second in RULES[at + 1 :]
        if frozenset({first[1], second[1]}) not in CLASH
    ]
    for row in seeds:
        rules = random.Random(f"{seed} {row['prompt']}").choice(pairs)
        asked = " ".join([row["prompt"], *(text for text, _ in rules)])
        yield {"prompt": asked, "rules": [spec for _, spec in rules]}


def read(path: Path | str) -> list[Record]:
    """Return the rows of a JSONL file, or of stdin for `-`."""
    with sys.stdin if path == "-" else open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def table(paths: list[Path]) -> None:
    """Print the share of rules kept in each file of `srlm eval rules`, its change against the first, and each rule."""
    first = None
    for path in paths:
        rows = read(path)
        total = {row["metric"]: row for row in rows if "rule" not in row}
        kept = total["rules_kept"]
        first = kept["value"] if first is None else first
        interval = "" if kept["ci_low"] is None else f" [{kept['ci_low']:.1%}, {kept['ci_high']:.1%}]"
        each = ", ".join(f"{row['rule']} {row['value']:.0%}" for row in rows if "rule" in row)
        print(
            f"{path}: {kept['value']:.1%}{interval} of {kept['n']} rules kept, "
            f"{100 * (kept['value'] - first):+.1f} points, {total['length']['value']:.0f} characters; {each}"
        )


def existing_or_stdin(text: str) -> str:
    """Return the path of a file that exists, or `-`."""
    return text if text == "-" else str(existing_file(text))


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("prompts")
    asking.add_argument("--in", dest="path", type=existing_or_stdin, default="-")
    asking.add_argument("--seed", type=int, default=0)
    commands.add_parser("table").add_argument("paths", type=existing_file, nargs="+")
    options = parser.parse_args()
    if options.command == "table":
        return table(options.paths)
    for row in prompts(read(options.path), options.seed):
        print(json.dumps(row, ensure_ascii=False))
    return None


if __name__ == "__main__":
    main()
