"""What M3 answers right, by how often M1 was right: facts that M1 does not know, half knows, and knows.

    python unknown.py ../../runs/facts/seed-*
    python unknown.py ../../runs/facts/seed-* --file never.jsonl

Each run answers a question `k` times. A question that M1 answered wrong each time can be luck, so compare with the
control: it had the same questions, replies and pairs, with chosen and rejected dealt at random.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from own_replies import is_right, rows_of

MODELS = ("own/M1", "own/M3", "control/M3")


def shares(path: Path) -> dict[str, float]:
    """Return the share of right replies to each question of a file of replies."""
    found = defaultdict(list)
    for row in rows_of(path):
        found[row["prompt_id"]].append(is_right(row, row["response"]))
    return {prompt: fmean(right) for prompt, right in found.items()}


def kind(share: float) -> str:
    """Return whether M1 knows a fact of which this share of its replies is right."""
    return "none" if share == 0 else "some, up to half" if share <= 0.5 else "more than half"


def main() -> None:
    """Read the runs, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--file", default="eval-rule-responses.jsonl")
    options = parser.parse_args()
    found = defaultdict(list)
    for run in options.runs:
        first, *later = (shares(run / model / options.file) for model in MODELS)
        for prompt, share in first.items():
            found[kind(share)].append((share, *(model[prompt] for model in later)))
    print("| M1's right replies to a question | questions |", " | ".join(MODELS), "|")
    print("|---" * (len(MODELS) + 2) + "|")
    for name, rows in sorted(found.items(), key=lambda one: fmean(row[0] for row in one[1])):
        print(f"| {name} | {len(rows)} |", " | ".join(f"{fmean(model):.0%}" for model in zip(*rows, strict=True)), "|")


if __name__ == "__main__":
    main()
