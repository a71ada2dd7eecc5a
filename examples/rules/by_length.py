"""How much of a gain is length: the share of replies that keep the rule, by the length of the reply.

    python by_length.py runs/rules/seed-0/own/M1 runs/rules/seed-0/own/M3

The last column is the share if the replies had the lengths of the first model.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_right
from pathlib import Path

from srlm_cli.rules import check_reply, rules_of_row

EDGES = (15, 40, 100)  # characters


def kept_by_class(folder: Path) -> list[list[bool]]:
    """Return for each class of lengths whether each reply to a held-out prompt keeps its rule."""
    classes: list[list[bool]] = [[] for _ in range(len(EDGES) + 1)]
    for line in (folder / "eval-rule-responses.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        reply = row["response"] or ""
        kept = bool(reply) and all(check_reply(row, rules_of_row(row)).values())
        classes[bisect_right(EDGES, len(reply))].append(kept)
    return classes


def main() -> None:
    """Print one line per model."""
    names = [f"under {EDGES[0]}", *(f"from {edge}" for edge in EDGES), "all", "lengths of the first"]
    print("  ".join(names))
    first: list[int] = []
    for folder in map(Path, sys.argv[1:]):
        classes = kept_by_class(folder)
        first = first or [len(some) for some in classes]
        shares = [sum(some) / len(some) if some else 0.0 for some in classes]
        everything = sum(map(sum, classes)) / sum(map(len, classes))
        alike = sum(share * count for share, count in zip(shares, first, strict=True)) / sum(first)
        cells = [f"{share:.0%} of {len(some)}" for share, some in zip(shares, classes, strict=True)]
        print(f"{folder}: " + "  ".join([*cells, f"{everything:.1%}", f"{alike:.1%}"]))


if __name__ == "__main__":
    main()
