"""How several models stand after their matches: rates of every two, by category too, and a rating of each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from srlm_cli.evaluate import bootstrap
from srlm_cli.evaluate.bradley_terry import SHARE, ratings
from srlm_cli.records import Row

TASK = "head_to_head"


def metrics(matches: list[Row], names: Sequence[str | None], seed: int = 0) -> list[Row]:
    """Return the metric rows of judged matches: of every two of `names`, seen from the one that stands first.

    Each row has the pair as `model` and `baseline`. With three or more names there is one row more
    for each: its `bradley_terry` rating. Rows of one category, which have a field `category`, come
    first: a reader that keeps the last row of a name has the one over all prompts.
    """
    games: dict[tuple[str | None, str | None], list[Row]] = {pair: [] for pair in combinations(names, 2)}
    for match in matches:
        games[match["model_a"], match["model_b"]].append(match)
    rows = [
        {**row, "model": a, "baseline": b}
        for (a, b), played in games.items()
        for row in [*by_category(played, seed), *win_rates(played, seed), *length_controlled(played, seed)]
    ]
    return rows + (ratings(matches, names, seed) if len(names) > 2 else [])


def by_category(matches: list[Row], seed: int = 0) -> list[Row]:
    """Return the win, tie, loss and win rates of one pair's matches for each `category` that they carry."""
    groups: dict[str, list[Row]] = {}
    for match in matches:
        if "category" in match:
            groups.setdefault(match["category"], []).append(match)
    return [
        {**row, "category": category}
        for category, played in sorted(groups.items())
        for row in bootstrap.metrics(TASK, outcomes(played), seed)
    ]


def win_rates(matches: list[Row], seed: int = 0) -> list[Row]:
    """Return metric rows of one pair's matches, seen from A: win, tie and loss rates, order bias, mean lengths.

    `lean` is the share of matches whose `probability` that A is better, the mean over both orders and
    so free of position bias, is above one half. `first_position` is the share of readable verdicts
    for the reply that stood first: 0.5 is a judge without position bias. Lengths are in characters.
    """
    values = outcomes(matches)
    if any("probability" in row for row in matches):
        values["lean"] = [[row["probability"] > 0.5] if "probability" in row else [] for row in matches]
    values["first_position"] = [[v == "A" for v in row["verdicts"] if v in ("A", "B")] for row in matches]
    values["length"] = [[len(row["response_a"])] for row in matches]
    values["baseline_length"] = [[len(row["response_b"])] for row in matches]
    return bootstrap.metrics(TASK, values, seed)


def outcomes(matches: list[Row]) -> dict[str, list[list[float]]]:
    """Return how matches ended for A, one value a match; a tie is half a win in `win_rate`."""
    won = [row["winner"] for row in matches]
    ends = {name: [[float(w == end)] for w in won] for name, end in (("win", "A"), ("tie", "tie"), ("loss", "B"))}
    return ends | {"win_rate": [[SHARE[w]] for w in won]}


def length_controlled(matches: list[Row], seed: int = 0) -> list[Row]:
    """Return the metric row of the win rate at equal lengths, none where it cannot be told."""
    from srlm_cli.evaluate import length_control

    row = length_control.of_matches(matches, seed) if matches else None
    return [row] if row else []


def table(rows: list[Row], names: Sequence[str]) -> list[str]:
    """Return lines that show metric rows of several models: win rates of line against column, and the rating."""
    rates: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["metric"] == "win_rate" and "category" not in row and row["value"] is not None:
            rates[row["model"], row["baseline"]] = row["value"]
            rates[row["baseline"], row["model"]] = 1 - row["value"]
    rated = {row["model"]: _rating(row) for row in rows if row["metric"] == "bradley_terry"}
    labels = [f"{number} {_printable(name)}" for number, name in enumerate(names, 1)]
    lines = [["", *(str(number) for number in range(1, len(names) + 1)), "rating"]]
    for label, name in zip(labels, names, strict=True):
        lines.append([label, *(_percent(rates.get((name, other))) for other in names), rated.get(name, "-")])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "win rate of line against column (a tie is half a win), Bradley-Terry rating [95% interval]",
        *("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines),
    ]


def _printable(text: str) -> str:
    """Return a foreign text without what could move the cursor of a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f}%"


def _rating(row: Row) -> str:
    if row["value"] is None:
        return "-"
    value, low, high = (f"{round(row[key]):+d}" for key in ("value", "ci_low", "ci_high"))
    return f"{value} [{low}, {high}]"
