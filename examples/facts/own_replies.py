"""How a judge orders the model's own replies, and what its pairs are, by the facts.

python own_replies.py ../../runs/facts/seed-0/own/M1 ../../runs/facts/seed-0/own/M2
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path
from typing import Any

from srlm_cli.rules import check_reply, rules_of_row

Record = dict[str, Any]


def is_right(row: Record, text: str | None) -> bool:
    """Return whether a text is right by the rules of its row."""
    checked = {**row, "response": text or ""}
    return bool(text) and all(check_reply(checked, rules_of_row(checked)).values())


def rows_of(path: Path) -> list[Record]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Print one line per model."""
    for folder in map(Path, sys.argv[1:]):
        scores: dict[str, dict[bool, list[float]]] = defaultdict(lambda: {True: [], False: []})
        for row in rows_of(folder / "judged.jsonl"):
            if row["score"] is not None:
                scores[row["prompt_id"]][is_right(row, row["response"])].append(row["score"])
        ordered = [right > wrong for one in scores.values() for right, wrong in product(one[True], one[False])]
        kinds = Counter(
            tuple(is_right(row, row[side][-1]["content"]) for side in ("chosen", "rejected"))
            for row in rows_of(folder / "pairs.jsonl")
        )
        share = f"{sum(ordered) / len(ordered):.1%}" if ordered else "none"
        print(
            f"{folder}: of {len(ordered)} right and wrong replies to one question the judge orders {share} right; "
            f"{sum(kinds.values())} pairs: right is the chosen reply in {kinds[True, False]}, the rejected one in "
            f"{kinds[False, True]}, both in {kinds[True, True]}, none in {kinds[False, False]}"
        )


if __name__ == "__main__":
    main()
