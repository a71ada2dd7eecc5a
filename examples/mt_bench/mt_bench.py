"""Read the questions of MT-Bench (arXiv 2306.05685), and show the ratings of the answers as a table.

    python mt_bench.py questions --questions mt_bench.jsonl --out questions.jsonl   # or a dataset of the model hub
    python mt_bench.py table --in judged.jsonl

The table has the mean rating by category and by turn, and the groups of categories of arXiv 2401.10020. The interval
is a bootstrap over questions, since the two turns of one question belong together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from srlm_cli.stats.bootstrap import metrics

Record = dict[str, Any]
GROUPS = {
    "Math, Code & Reasoning": ("math", "coding", "reasoning"),
    "Humanities, Extraction, STEM, Roleplay & Writing": ("humanities", "extraction", "stem", "roleplay", "writing"),
}


def questions(source: str) -> Iterator[Record]:
    """Yield the questions of a file, or of a dataset of the hub: `id`, `turns`, `category`, and `reference` if any."""
    for row in load(source):
        turns = row.get("turns") or row.get("prompt")
        if not isinstance(turns, list) or not isinstance(row.get("category"), str):
            raise SystemExit(f"{source}: expected `turns` and `category` in each row, got {', '.join(row)}")
        name = next((row[key] for key in ("question_id", "prompt_id", "id") if row.get(key) not in (None, "")), None)
        reference = {"reference": row["reference"]} if row.get("reference") else {}
        yield {
            **({"id": str(name)} if name is not None else {}),
            "turns": turns,
            "category": row["category"],
            **reference,
        }


def load(source: str) -> Iterable[Record]:
    """Return the rows of a JSONL file, or of the dataset with this id."""
    if Path(source).suffix == ".jsonl" or Path(source).exists():
        try:
            return [json.loads(line) for line in Path(source).read_text(encoding="utf-8").split("\n") if line.strip()]
        except OSError as error:
            raise SystemExit(f"{source}: {error.strerror}") from None
    from datasets import load_dataset

    return load_dataset(source, split="train")


def table(rows: list[Record]) -> str:
    """Return the mean ratings by category and turn as a Markdown table."""
    turns = sorted({row["turn"] for row in rows})
    categories = {name: (name,) for name in sorted({row["category"] for row in rows})}
    everything = {"all": tuple(categories)}
    lines = [
        "| category | " + " | ".join(f"turn {turn}" for turn in turns) + " | both | questions |",
        "|---|" + "---:|" * (len(turns) + 2),
    ]
    for name, members in {**categories, **GROUPS, **everything}.items():
        some = [row for row in rows if row["category"] in members]
        if not some:
            continue
        by_turn = [shown([row for row in some if row["turn"] == turn]) for turn in turns]
        count = len({question(row) for row in some})
        lines.append(f"| {name} | {' | '.join(by_turn)} | {shown(some, whole=True)} | {count} |")
    unrated = sum(row["score"] is None for row in rows)
    return "\n".join([*lines, "", f"{len(rows)} answers, {unrated} without a rating."])


def shown(rows: list[Record], *, whole: bool = False) -> str:
    """Return the mean of the ratings, with `whole` also its interval over questions; "-" without a rating."""
    ratings: dict[str, list[float]] = {}
    for row in rows:
        if row["score"] is not None:
            ratings.setdefault(question(row), []).append(row["score"])
    if not ratings:
        return "-"
    mean = fmean(rating for some in ratings.values() for rating in some)
    if not whole or len(ratings) < 2:
        return f"{mean:.2f}"
    [found] = metrics("mt_bench", {"rating": list(ratings.values())})
    return f"{mean:.2f} ({found['ci_low']:.2f} to {found['ci_high']:.2f})"


def question(row: Record) -> str:
    """Return the id of the question that a row answers a turn of."""
    return row["prompt_id"].rpartition("/turn-")[0]


def main() -> None:
    """Write the questions, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("questions")
    reading.add_argument("--questions", required=True, help="JSONL file with `turns` and `category`, or a hub id")
    reading.add_argument("--limit", type=int, default=80, help="the first N questions")
    reading.add_argument("--out", type=Path, required=True)
    showing = commands.add_parser("table")
    showing.add_argument("--in", dest="judged", type=Path, required=True, help="what `srlm judge` wrote")
    given = parser.parse_args()
    if given.command == "table":
        print(table([json.loads(line) for line in given.judged.read_text(encoding="utf-8").split("\n") if line]))
        return
    rows = list(questions(given.questions))[: given.limit]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
