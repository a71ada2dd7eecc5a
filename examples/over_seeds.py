"""Print the rules that each model kept, by run and in the mean: a Markdown table.

    python examples/over_seeds.py runs/facts/seed-*
    python examples/over_seeds.py runs/facts/seed-* --file eval-rules-never.jsonl

A run is a folder made by examples/rules or examples/facts. The interval of the mean (95%) is made from those of the
runs, which are over prompts; the runs are taken as independent of each other.
"""

from __future__ import annotations

import argparse
import json
from math import sqrt
from pathlib import Path
from statistics import fmean

Share = tuple[float, float | None, float | None]  # the value, and the ends of its interval, None over one prompt
ARMS = [("own", at) for at in range(4)] + [("control", at) for at in (2, 3)]


def share(path: Path) -> Share:
    """Return the share of all rules that one model kept."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    whole = next(row for row in rows if row["metric"] == "rules_kept" and "rule" not in row)
    return whole["value"], whole["ci_low"], whole["ci_high"]


def mean(shares: list[Share]) -> Share:
    """Return the mean of independent shares, with its interval if all of them have one."""
    value = fmean(share[0] for share in shares)
    if any(low is None for _, low, _ in shares):
        return value, None, None
    half = sqrt(sum(((high - low) / 2) ** 2 for _, low, high in shares)) / len(shares)
    return value, value - half, value + half


def main() -> None:
    """Read the runs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--file", default="eval-rules.jsonl")
    options = parser.parse_args()
    print("| |", " | ".join([*(run.name for run in options.runs), "mean"]), "|")
    print("|---" * (len(options.runs) + 2) + "|")
    for arm, at in ARMS:
        found = [share(run / arm / f"M{at}" / options.file) for run in options.runs]
        cells = [f"{value:.1%}" for value, _, _ in found]
        value, low, high = mean(found)
        interval = "" if low is None else f" [{100 * low:.1f}–{100 * high:.1f}]"
        print(f"| M{at}, {arm} |", " | ".join(cells), f"| {value:.1%}{interval} |")


if __name__ == "__main__":
    main()
