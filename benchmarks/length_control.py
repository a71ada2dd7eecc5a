"""The published length-controlled win rates of AlpacaEval 2 against those that `srlm eval length-control` finds.

python benchmarks/length_control.py [--data FOLDER] [--inverse-penalty C]

FOLDER holds preferences.csv, published.csv and instructions_lc_features.csv, by default
../shared/data/alpaca_eval_lc beside the repository. The last column, the C of AlpacaEval's grid that comes nearest to
the published figure, is found with that figure in hand: it tells how exact the fit is, not how well C is chosen.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

import numpy as np
from paths import folder_with

from srlm_cli.evaluate.length_control import C, Comparisons, Variants, by_model, features_of, fit, preference_record

DATA = Path(__file__).parents[2] / "shared" / "data" / "alpaca_eval_lc"
FILES = ("preferences.csv", "published.csv", "instructions_lc_features.csv")
GRID = np.logspace(-4, 4, 10)
# Of the comparisons of the baseline with its own variants only these sums are published: of preference times length
# term, and of preference times difficulty, preferences from 0 to 1. The loss has no more of the labels than these.
SUMS = (-182.71, 412.88)


def table(name: str, folder: Path) -> list[dict[str, str]]:
    """Return the rows of one CSV file."""
    with open(folder / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def comparisons(folder: Path) -> dict[str, Comparisons]:
    """Return the rows of each model; the difficulty belongs to the place of a row, as when they were published."""
    numbers = ("len_baseline", "len_model", "preference")
    rows = [{**row, **{field: float(row[field]) for field in numbers}} for row in table("preferences.csv", folder)]
    difficulty = [float(row["instruction_difficulty"]) for row in table("instructions_lc_features.csv", folder)]
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["model"], []).append(row)
    return {
        model: Comparisons(
            preference_record({**row, "difficulty": value}) for row, value in zip(group, difficulty, strict=False)
        )
        for model, group in groups.items()
    }


def reference(folder: Path) -> Variants:
    """Return the baseline against its verbose and concise variants, with probabilities of the published sums."""
    rows = [
        {
            "model": variant,
            "baseline": None,
            "index": row["index"],
            "len_baseline": float(row["len_baseline_gpt4_1106_preview"]),
            "len_model": float(row[f"len_gamed_{variant}"]),
            "difficulty": float(row["instruction_difficulty"]),
            "preference": 1.5,  # for the time being
        }
        for variant in ("verbose", "concise")
        for row in table("instructions_lc_features.csv", folder)
    ]
    terms = np.vstack([features_of(group, True, 0.0)[:, :2] for group in by_model(rows).values()])
    coefficients = np.zeros(2)
    for _ in range(20):  # Newton's method for the logistic model whose probabilities have these sums
        labels = 1 / (1 + np.exp(-terms @ coefficients))
        curvature = terms.T @ (terms * (labels * (1 - labels))[:, None])
        coefficients += np.linalg.solve(curvature, SUMS - terms.T @ labels)
    preferences = (1 + labels).tolist()
    return by_model(
        preference_record({**row, "preference": value}) for row, value in zip(rows, preferences, strict=True)
    )


def published(folder: Path) -> dict[str, float]:
    """Return the published figures, in per cent."""
    return {row["model"]: float(row["length_controlled_winrate"]) for row in table("published.csv", folder)}


def misses(folder: Path, c: float = C, models: list[str] | None = None) -> dict[str, tuple[int, float, float]]:
    """Return for each model its rows, our figure in per cent, and how far it is above the published one."""
    groups, variants, theirs = comparisons(folder), reference(folder), published(folder)
    ours = {model: 100 * fit(groups[model], variants, c).win_rate for model in models or groups}
    return {model: (len(groups[model]), value, value - theirs[model]) for model, value in ours.items()}


def main() -> None:
    """Print the table, and the largest and the median difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=folder_with(*FILES), default=str(DATA))
    parser.add_argument("--inverse-penalty", type=float, default=C)
    options = parser.parse_args()
    found = misses(options.data, options.inverse_penalty)
    of_grid = [misses(options.data, c) for c in GRID[4:]]
    nearest = {model: min((of[model][2] for of in of_grid), key=abs) for model in found}
    print(f"{'model':32}{'rows':>5}{'ours':>9}{'published':>11}{'difference':>12}{'nearest C':>11}")
    for model, (n, ours, miss) in found.items():
        print(f"{model:32}{n:5}{ours:9.3f}{ours - miss:11.3f}{miss:+12.4f}{nearest[model]:+11.4f}")
    most = max(n for n, _, _ in found.values())
    for name, kept in (("all", found), (f"with {most} rows", [model for model in found if found[model][0] == most])):
        for what, of in ((f"C {options.inverse_penalty:g}", {m: found[m][2] for m in kept}), ("nearest C", nearest)):
            sizes = [abs(of[model]) for model in kept]
            print(f"{len(sizes)} models {name}, {what}: worst {max(sizes):.4f}, median {statistics.median(sizes):.4f}")


if __name__ == "__main__":
    main()
