"""Print the length of replies by round: `python benchmarks/drift/table.py runs/drift/plain runs/drift/rho-0.3`."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from paths import existing

from srlm_cli.evaluate.columns import with_interval
from srlm_cli.stats.bootstrap import metrics

Record = dict[str, Any]


def rows_of(path: Path) -> list[Record]:
    """Return the rows of a file, none where it is not there."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def mean(rows: list[Record], number: Callable[[Record], float], digits: int = 0) -> str:
    """Return the mean over rows with its 95% interval, a bootstrap over prompts."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(number(row))
    if not groups:
        return "-"
    [found] = metrics("drift", {"mean": list(groups.values())})
    return with_interval(found, f"{{:.{digits}f}}".format)


def line(run: Path, model: Path) -> list[str]:
    """Return the cells of one model: its replies to held-out prompts, its judge's scores, what the next one learns."""
    replies, judged, pairs = (rows_of(model / f"{name}.jsonl") for name in ("eval-responses", "judged", "pairs"))
    accuracy = [row for row in rows_of(model / "eval-reward.jsonl") if row["metric"] == "pairwise_accuracy"]
    overall = [row for row in accuracy if "replies" not in row]
    return [
        run.name,
        model.name,
        mean(replies, lambda row: len(row["response"])),
        f"{100 * sum(row['finish_reason'] == 'length' for row in replies) / len(replies):.0f}%",
        mean(judged, lambda row: row["score"], 2),
        mean(pairs, lambda row: len(row["chosen"][0]["content"])),
        mean(pairs, lambda row: len(row["rejected"][0]["content"])),
        f"{100 * overall[0]['value']:.0f}%" if overall else "-",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=existing, nargs="+")
    runs = parser.parse_args().runs
    print("| pairs | model | held-out reply | cut off | mean score | chosen | rejected | judge against people |")
    print("|---|---|---|---|---|---|---|---|")
    for run in runs:
        for model in sorted(run.glob("M[1-9]")):
            print("|", " | ".join(line(run, model)), "|")
    print("\nLengths in characters; 95% intervals by bootstrap over prompts.")


if __name__ == "__main__":
    main()
