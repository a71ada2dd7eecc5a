"""Print the arms that were measured as a table: `python benchmarks/judge/table.py runs/judge m0 score-only`."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from paths import existing

NAMES = {
    "m0": "M0, untrained",
    "ift": "SFT on IFT only",
    "accept": "M1, accepted judgements",
    "hindsight": "M1, hindsight with reasons",
    "score-only-25": "M1, scores only, 25 prompts",
    "score-only-50": "M1, scores only, 50 prompts",
    "score-only-100": "M1, scores only, 100 prompts",
    "score-only": "M1, scores only, all 406 prompts",
    "both": "M1, IFT + scores only",
}
METRICS = {
    "pairwise_accuracy": "pairwise",
    "pairwise_accuracy_without_ties": "without ties",
    "pairwise_accuracy_matched_length": "matched length",
    "5_best": "5-best",
    "exact_match": "exact",
    "spearman": "Spearman",
    "kendall_tau": "Kendall",
}
BASELINES = ("longest_wins", "shortest_wins", "random", "longest_wins_matched_length")


def rows_of(path: Path) -> list[dict]:
    """Return the rows of a file, none where it is not there."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def metrics_of(path: Path) -> dict[str, dict]:
    """Return the metrics over all prompts, by name."""
    return {row["metric"]: row for row in rows_of(path) if "replies" not in row}


def shown(row: dict | None) -> str:
    """Return a value with its interval: shares in per cent, correlations as they are."""
    if not row or row["value"] is None:
        return "-"
    scale, digits = (1, 3) if row["metric"] in ("spearman", "kendall_tau") else (100, 1)
    value = f"{scale * row['value']:.{digits}f}"
    if row["ci_low"] is None:
        return value
    return f"{value} [{', '.join(f'{scale * row[end]:.{digits - 1}f}' for end in ('ci_low', 'ci_high'))}]"


def parse_rate(folder: Path) -> str:
    """Return the share of judgements that ended with a score of their own."""
    scores = [score for row in rows_of(folder / "written.jsonl") for score in row["scores"]]
    return f"{100 * sum(score is not None for score in scores) / len(scores):.1f}%" if scores else "-"


def training(folder: Path) -> str:
    """Return what a model was trained on, and how long that took."""
    path = folder / "model" / "provenance.json"
    if not path.exists():
        return "-"
    made = json.loads(path.read_text("utf-8"))
    return f"{made['data']['rows']} rows, {made['steps']} steps, {made['seconds'] / 60:.0f} min"


def main() -> None:
    """Print the table, the baselines, and what it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=existing)
    parser.add_argument("arms", nargs="+", choices=NAMES)
    options = parser.parse_args()
    out, arms = options.out, options.arms
    print("| arm | trained on | read as | parse rate | pairs |", " | ".join(METRICS.values()), "|")
    print("|" + "---|" * (5 + len(METRICS)))
    baselines: dict[str, dict] = {}
    for arm in arms:
        for reading in ("text", "expected"):
            found = metrics_of(out / arm / f"{reading}.jsonl")
            if found:
                cells = [NAMES[arm], training(out / arm), reading, parse_rate(out / arm) if reading == "text" else ""]
                cells += [str(found["pairwise_accuracy"]["n"]), *(shown(found.get(name)) for name in METRICS)]
                print("|", " | ".join(cells), "|")
                if found["pairwise_accuracy"]["n"] >= baselines.get("longest_wins", {"n": 0})["n"]:
                    baselines = {name: found[name] for name in BASELINES if name in found}
    print()
    for name, row in baselines.items():
        print(f"{name.replace('_', ' ')}: {shown(row)} of {row['n']} pairs")
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    print(f"\n{machine}; intervals: 95%, bootstrap over prompts")


if __name__ == "__main__":
    main()
