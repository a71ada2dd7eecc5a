"""Results of matches between models: win rates of each pair, also by category, and a rating per model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from srlm_cli.evaluate.columns import aligned, percent, printable, with_interval
from srlm_cli.records import Record
from srlm_cli.stats import bootstrap
from srlm_cli.stats.bradley_terry import SHARE, ratings

TASK = "head_to_head"


@dataclass(frozen=True)
class Where:
    """The matches that fit; can be iterated over several times."""

    matches: Iterable[Record]
    fits: Callable[[Record], bool]

    def __iter__(self) -> Iterator[Record]:
        return filter(self.fits, self.matches)


def metrics(matches: Iterable[Record], names: Sequence[str | None], seed: int = 0) -> list[Record]:
    """Return the metrics of judged matches for each pair of `names`, from the view of the first one.

    This iterates over the matches several times; each has its texts, or their lengths as `length_a` and `length_b`.
    Each metric has the pair as `model` and `baseline`. With three or more names, each also has a `bradley_terry`
    rating. Metrics of one category, which have the field `category`, come first, so the last one of a name is the
    metric over all prompts.
    """
    rows = []
    for a, b in combinations(names, 2):
        played = Where(matches, lambda match, pair=(a, b): (match["model_a"], match["model_b"]) == pair)
        found = [*by_category(played, seed), *win_rates(played, seed), *length_controlled(played, seed)]
        rows += [{**row, "model": a, "baseline": b} for row in found]
    return rows + (ratings(matches, names, seed) if len(names) > 2 else [])


def by_category(matches: Iterable[Record], seed: int = 0) -> list[Record]:
    """Return the win, tie, loss and win rates of one pair's matches for each `category`."""
    categories = {match["category"] for match in matches if "category" in match}
    return [
        {**row, "category": category}
        for category in sorted(categories)
        for row in bootstrap.measured(TASK, Where(matches, lambda m, c=category: m.get("category") == c), ENDS, seed)
    ]


def win_rates(matches: Iterable[Record], seed: int = 0) -> list[Record]:
    """Return metrics of one pair's matches from the view of A: win, tie and loss rates, order bias, mean lengths.

    `preference_rate` is the share of matches with a `probability` that A is better above one half; this is the mean
    over both orders, so it has no position bias. `first_position` is the share of readable verdicts for the reply that
    was shown first: 0.5 means no position bias. Lengths are in characters.
    """
    values = dict(ENDS)
    if any("probability" in match for match in matches):
        values["preference_rate"] = lambda match: [match["probability"] > 0.5] if "probability" in match else []
    values["first_position"] = lambda match: [v == "A" for v in match["verdicts"] if v in ("A", "B")]
    values["length"] = lambda match: [length(match, "a")]
    values["baseline_length"] = lambda match: [length(match, "b")]
    return bootstrap.measured(TASK, matches, values, seed)


# How a match ended for A; a tie is half a win in `win_rate`.
ENDS: dict[str, Callable[[Record], list[float]]] = {
    "win": lambda match: [match["winner"] == "A"],
    "tie": lambda match: [match["winner"] == "tie"],
    "loss": lambda match: [match["winner"] == "B"],
    "win_rate": lambda match: [SHARE[match["winner"]]],
}


def length(match: Record, side: str) -> int:
    """Return the length of a side's response in characters."""
    known = match.get(f"length_{side}")
    return len(match[f"response_{side}"]) if known is None else known


def length_controlled(matches: Iterable[Record], seed: int = 0) -> list[Record]:
    """Return the metric of the win rate at equal lengths, nothing if it cannot be estimated."""
    from srlm_cli.evaluate import length_control

    row = length_control.of_matches(matches, seed)
    return [row] if row else []


def table(rows: list[Record], names: Sequence[str]) -> list[str]:
    """Return a table of several models as lines: the win rates of the row against the column, and the rating."""
    rates: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["metric"] == "win_rate" and "category" not in row and row["value"] is not None:
            rates[row["model"], row["baseline"]] = row["value"]
            rates[row["baseline"], row["model"]] = 1 - row["value"]
    rated = {
        row["model"]: with_interval(row, lambda elo: f"{round(elo):+d}")
        for row in rows
        if row["metric"] == "bradley_terry"
    }
    labels = [f"{number} {printable(name)}" for number, name in enumerate(names, 1)]
    lines = [["", *(str(number) for number in range(1, len(names) + 1)), "rating"]]
    for label, name in zip(labels, names, strict=True):
        lines.append([label, *(percent(rates.get((name, other))) for other in names), rated.get(name, "-")])
    title = "win rate of line against column (a tie is half a win), Bradley-Terry rating [95% interval]"
    return [title, *aligned(lines)]
