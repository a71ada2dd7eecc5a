"""A task whose judge is a program: replies under rules that can be checked, and their score from 0 to 5.

    python task.py prompts --in ift.jsonl --seed 1 > prompts.jsonl
    srlm sample --in prompts.jsonl --model M1 | python task.py score > judged.jsonl
    python task.py score --shuffle 1 < responses.jsonl     # the control: scores dealt anew among the replies
    python task.py mean M1.jsonl M2.jsonl                  # mean score of judged files, intervals over prompts

A prompt asks a question of the seed data under two of the rules below, drawn by the seed; a reply's score is 5 x the
share of its rules that it keeps.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from srlm_cli.stats.bootstrap import metrics

Record = dict[str, Any]
RULES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "no commas": ("Use no commas.", lambda text: "," not in text),
    "short": ("Use at most 30 words.", lambda text: len(text.split()) <= 30),
    "lower case": ("Write in lower case only.", lambda text: text == text.lower()),
    "three bullets": (
        "Answer with exactly three bullet points, each on a line of its own that begins with a dash.",
        lambda text: [line[0] for line in text.splitlines() if line.strip()] == ["-"] * 3,
    ),
    "one paragraph": ("Write one paragraph, without a line break.", lambda text: "\n" not in text.strip()),
    "ends with done": ('End with the word "Done".', lambda text: bool(re.search(r"\bDone\W*$", text))),
}
CLASH = {frozenset({"three bullets", "one paragraph"}), frozenset({"lower case", "ends with done"})}
RULES_A_PROMPT = 2


def prompts(seeds: Iterable[Record], seed: int) -> Iterator[Record]:
    """Yield each seed prompt under rules drawn for it."""
    pairs = [
        (first, second)
        for at, first in enumerate(RULES)
        for second in list(RULES)[at + 1 :]
        if frozenset({first, second}) not in CLASH
    ]
    for row in seeds:
        rules = random.Random(f"{seed} {row['prompt']}").choice(pairs)
        asked = " ".join([row["prompt"], *(RULES[rule][0] for rule in rules)])
        yield {"prompt": asked, "rules": list(rules)}


def score(row: Record) -> float:
    """Return 5 x the share of its rules that a reply keeps; an empty reply keeps none."""
    text = row["response"].strip()
    return 5.0 * sum(bool(text) and RULES[rule][1](text) for rule in row["rules"]) / len(row["rules"])


def scored(rows: Iterable[Record], shuffle: int | None) -> Iterator[Record]:
    """Yield responses with their score; with `shuffle` the scores of a prompt's replies are dealt anew."""
    for group in by_prompt(rows):
        scores = [score(row) for row in group]
        if shuffle is not None:
            random.Random(f"{shuffle} {group[0]['prompt_id']}").shuffle(scores)
        for row, value in zip(group, scores, strict=True):
            yield {**row, "score": value}


def by_prompt(rows: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield the replies of each prompt, which stand together."""
    group: list[Record] = []
    for row in rows:
        if group and row["prompt_id"] != group[0]["prompt_id"]:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def read(path: str) -> list[Record]:
    """Return the rows of a JSONL file, or of stdin for `-`."""
    with sys.stdin if path == "-" else open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def mean(paths: list[str]) -> None:
    """Print the mean score of each file, its change against the first, and the share that keeps each rule."""
    first = None
    for path in paths:
        groups = list(by_prompt(read(path)))
        found = metrics("learns", {"score": [[row["score"] for row in group] for group in groups]})[0]
        value, low, high = found["value"], found["ci_low"], found["ci_high"]
        first = value if first is None else first
        kept = {rule: [] for rule in RULES}
        for row in (row for group in groups for row in group):
            for rule in row["rules"]:
                kept[rule].append(RULES[rule][1](row["response"].strip()))
        words = [len(row["response"].split()) for group in groups for row in group]
        rules = ", ".join(f"{rule} {sum(all_) / len(all_):.0%}" for rule, all_ in kept.items() if all_)
        print(
            f"{path}: {value:.3f} [{low:.3f}, {high:.3f}] of 5, {value / first - 1:+.0%}, {len(groups)} prompts, "
            f"{sum(words) / len(words):.0f} words; {rules}"
        )


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("prompts")
    asking.add_argument("--in", dest="path", default="-")
    asking.add_argument("--seed", type=int, default=0)
    scoring = commands.add_parser("score")
    scoring.add_argument("--in", dest="path", default="-")
    scoring.add_argument("--shuffle", type=int)
    commands.add_parser("mean").add_argument("paths", nargs="+")
    options = parser.parse_args()
    if options.command == "mean":
        return mean(options.paths)
    rows = read(options.path)
    made = prompts(rows, options.seed) if options.command == "prompts" else scored(rows, options.shuffle)
    for row in made:
        print(json.dumps(row, ensure_ascii=False))
    return None


if __name__ == "__main__":
    main()
