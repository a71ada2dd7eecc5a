"""Estimate the win rate at equal lengths with the length-controlled model of AlpacaEval 2 (arXiv 2404.04475)."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import isnan, nan
from typing import TYPE_CHECKING, Any

from srlm_cli.errors import BadRow
from srlm_cli.records import Record, is_number
from srlm_cli.stats import bootstrap
from srlm_cli.stats.bootstrap import RESAMPLES, in_order
from srlm_cli.stats.logistic import probability, solve

if TYPE_CHECKING:
    from numpy import ndarray

# AlpacaEval chooses C for each model by cross-validation, nearly always 2.8 or 21.5. The held-out losses of all C
# from 2.8 on differ by millionths, so the random folds decide, and a new cross-validation misses the published figures
# by up to 0.14 points. This single C misses none of them by more than 0.085 (benchmarks/length_control.py).
C = 25.0
TASK = "length_control"
FEWEST_ROWS = 10
REFERENCE_WEIGHT = 0.2  # of a row, shared by the variants: 0.1 with a verbose and a concise one
FIELDS = ("model", "baseline", "index", "len_baseline", "len_model", "preference", "difficulty")
WEIGHTS_AT_ONCE = 1 << 20  # 8 MB of float64, several times over


@dataclass(frozen=True)
class Fit:
    """A fitted model: the features (n, k) of its rows, then those of the reference, and the coefficients (1, k).

    `prompts` has the prompt number of each of the model's own rows; `terms` are the names of the fitted terms.
    """

    features: ndarray
    labels: ndarray
    weights: ndarray
    prompts: ndarray
    terms: list[str]
    c: float
    best: ndarray

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficients by name: length, difficulty if it is a term, intercept."""
        names = [*(term for term in self.terms if term != "reference"), "intercept"]
        return dict(zip(names, self.best[0].tolist(), strict=True))

    @property
    def win_rate(self) -> float:
        """The share that the model would win at equal lengths, 0 to 1."""
        return float(self.at_equal_length(self.best).mean())

    def at_equal_length(self, coefficients: ndarray) -> ndarray:
        """Return P(model wins) for replies of equal length, (R, rows)."""
        own = self.features[: len(self.prompts)].copy()
        own[:, 0] = 0
        return probability(coefficients, own)

    def drawn(self, seed: int) -> ndarray:
        """Return the win rate in RESAMPLES bootstrap draws of the prompts; `c`, std d and the reference stay."""
        import numpy as np

        random = np.random.default_rng(seed)
        own, size = len(self.prompts), int(self.prompts.max()) + 1
        block = max(1, WEIGHTS_AT_ONCE // len(self.labels))
        rates = []
        for at in range(0, RESAMPLES, block):
            draws = random.multinomial(size, np.full(size, 1 / size), size=min(block, RESAMPLES - at))
            weights = np.tile(self.weights, (len(draws), 1))
            weights[:, :own] = draws[:, self.prompts]
            wins = self.at_equal_length(solve(self.features, self.labels, weights, self.c, self.best))
            rates.append((weights[:, :own] * wins).sum(1) / weights[:, :own].sum(1))
        return np.concatenate(rates)


# --- rows ------------------------------------------------------------------------------------


def preference_record(row: Record) -> Record:
    """Return a comparison `{model, baseline, index, len_baseline, len_model, preference, difficulty}`.

    `preference` is from 1 (the baseline is better) to 2; 0 is read as 1.5. A match of `srlm eval head-to-head` is
    accepted too: A against B, lengths in characters (of its texts, or `length_a` and `length_b`), a tie as 1.5. Its
    `probability` is used if it has one, else its `winner`.
    """
    if "preference" not in row and "winner" in row:
        row = _of_match(row)
    preference = row.get("preference")
    if not is_number(preference) or not (preference == 0 or 1 <= preference <= 2):
        raise BadRow(
            f"expected `preference`, a number from 1 (the baseline is better) to 2, or a match with its `winner`, "
            f"got {row.get('preference', 'none')!r}"
        )
    for field in ("len_baseline", "len_model"):
        if not is_number(row.get(field)) or row[field] < 0:
            raise BadRow(f"expected `{field}`, a length in characters, got {row.get(field, 'none')!r}")
    if not (row.get("difficulty") is None or is_number(row["difficulty"])):
        raise BadRow(f"expected `difficulty` to be a number, got {row['difficulty']!r}")
    for field in ("model", "baseline", "index"):
        if isinstance(row.get(field), dict | list):
            raise BadRow(f"expected `{field}` to be a name or a number, got {row[field]!r}")
    return {**{field: row.get(field) for field in FIELDS}, "preference": preference or 1.5}


def _of_match(match: Record) -> Record:
    """Return a match as a comparison; it has its texts or, among matches just played, their lengths."""
    won = {"A": 2.0, "tie": 1.5, "B": 1.0}.get(str(match["winner"]))
    if won is None:
        raise BadRow(f"expected `winner` to be A, B or tie, got {match['winner']!r}")
    for field in ("response_a", "response_b") if "length_a" not in match else ():
        if not isinstance(match.get(field), str):
            raise BadRow(f"expected `{field}`, the text of a reply, beside `winner`")
    probability = match.get("probability")
    if probability is not None and not (is_number(probability) and 0 <= probability <= 1):
        raise BadRow(f"expected `probability` to be from 0 to 1, got {probability!r}")
    return {
        "model": match.get("model_a"),
        "baseline": match.get("model_b"),
        "index": match.get("prompt_id", match.get("id")),
        "len_baseline": match["length_b"] if "length_b" in match else len(match["response_b"]),
        "len_model": match["length_a"] if "length_a" in match else len(match["response_a"]),
        "preference": won if probability is None else 1 + probability,
        "difficulty": match.get("difficulty"),
    }


class Comparisons:
    """The comparisons of one model with a baseline, as columns: 40 bytes per row, no texts.

    A missing `difficulty` is NaN. `prompts` are hashes of `index`; a row without one is a prompt of its own.
    """

    def __init__(self, rows: Iterable[Record] = ()) -> None:
        self.preference, self.len_model, self.len_baseline, self.difficulty = (array("d") for _ in range(4))
        self.prompts = array("q")
        for row in rows:
            self.add(row)

    def __len__(self) -> int:
        return len(self.prompts)

    def add(self, row: Record) -> None:
        """Append a comparison (see `preference_record`)."""
        self.preference.append(row["preference"])
        self.len_model.append(row["len_model"])
        self.len_baseline.append(row["len_baseline"])
        self.difficulty.append(nan if row["difficulty"] is None else row["difficulty"])
        self.prompts.append(hash(("row", len(self)) if row["index"] is None else as_key(row["index"])))

    @property
    def has_difficulty(self) -> bool:
        """Whether there are rows and all of them have a `difficulty`."""
        return len(self) > 0 and not any(map(isnan, self.difficulty))

    @property
    def differences(self) -> ndarray:
        """len_baseline - len_model, (n,)."""
        import numpy as np

        return np.array(self.len_baseline) - np.array(self.len_model)

    def by_prompt(self) -> Iterator[list[tuple[float, float, float]]]:
        """Yield (win, length, length of the baseline) of each row, one list per prompt, in the order of the prompts."""
        import numpy as np

        numbers = in_order(self.prompts)
        at = np.argsort(numbers, kind="stable").tolist()
        for _, same in groupby(at, key=numbers.tolist().__getitem__):
            yield [(self.preference[row] - 1, self.len_model[row], self.len_baseline[row]) for row in same]


def as_key(index: Any) -> tuple[str, str]:
    """Return the name or number of a prompt so that equal ones, such as 1 and 1.0, have the same hash."""
    if isinstance(index, float) and index.is_integer():
        index = int(index)
    return ("name", index) if isinstance(index, str) else ("number", repr(index))


# --- metrics ---------------------------------------------------------------------------------


def length_control(
    models: Variants, variants: Variants | None = None, c: float = C, seed: int = 0
) -> tuple[list[Record], str]:
    """Return the metrics of comparisons, model by model, and a message for each model that could not be fitted.

    The metrics are `win_rate`, the mean lengths in characters, and `length_controlled_win_rate`, with the fitted
    `terms`, their `coefficients` and `c`.
    """
    models = models or {(None, None): Comparisons()}
    made: list[Record] = []
    notes: Counter[str] = Counter()
    for (model, baseline), group in models.items():
        names = {key: name for key, name in (("model", model), ("baseline", baseline)) if name is not None}
        values = {name: partial(column, at) for at, name in enumerate(("win_rate", "length", "baseline_length"))}
        win_rate, *lengths = bootstrap.measured(TASK, group.by_prompt(), values, seed)
        made += [{**row, **names} for row in (win_rate, controlled(group, variants, c, seed), *lengths)]
        notes.update(left_out(group, variants))
    few = {note: f" for {count} of {len(models)} models" for note, count in notes.items() if count < len(models)}
    return made, "; ".join(note + few.get(note, "") for note in notes)


def column(at: int, rows: list[tuple[float, ...]]) -> list[float]:
    """Return one value of each row."""
    return [row[at] for row in rows]


def of_matches(matches: Iterable[Record], seed: int = 0) -> Record | None:
    """Return the length-controlled win rate of A from the head-to-head matches of two models, as a metric.

    Its `win_rate` is the plain one of the same preferences, from the probabilities if matches have them. Returns None
    if the length effect cannot be estimated: too few matches, or all length differences are equal.
    """
    rows, names = Comparisons(), {}
    for match in matches:
        row = preference_record(match)
        names = names or {"model": row["model"], "baseline": row["baseline"]}
        rows.add(row)
    row = controlled(rows, seed=seed)
    if row["value"] is None:
        return None
    plain = sum(preference - 1 for preference in rows.preference) / len(rows)
    return {**row, "task": "head_to_head", "win_rate": plain, **names}


def controlled(rows: Comparisons, variants: Variants | None = None, c: float = C, seed: int = 0) -> Record:
    """Return the metric of the length-controlled win rate; `value` is null if the model cannot be fitted."""
    row = {"task": TASK, "metric": "length_controlled_win_rate", "value": None, "n": len(rows)}
    if cannot_fit(rows):
        return row | {"ci_low": None, "ci_high": None, "terms": []}
    fitted = fit(rows, variants, c)
    return row | {
        "value": fitted.win_rate,
        **bootstrap.interval(fitted.drawn(seed), int(fitted.prompts.max()) + 1),
        "terms": fitted.terms,
        "coefficients": fitted.coefficients,
        "c": c,
    }


def by_model(rows: Iterable[Record]) -> Variants:
    """Return the comparisons of each (model, baseline), in the order in which they first appear."""
    models: Variants = {}
    for row in rows:
        models.setdefault((row["model"], row["baseline"]), Comparisons()).add(row)
    return models


# --- what can be fitted ----------------------------------------------------------------------


def cannot_fit(rows: Comparisons) -> str:
    """Return why the effect of length cannot be estimated from these rows, or ""."""
    if len(rows) < FEWEST_ROWS:
        return f"fewer than {FEWEST_ROWS} rows"
    differences = rows.differences
    if (differences == differences[0]).all():
        return "the two lengths differ by as much in every row"
    return ""


def uses_reference(rows: Comparisons, variants: Variants | None) -> bool:
    """Return whether the reference can be used: if the rows have a difficulty, it needs one too."""
    if not variants:
        return False
    return all(variant.has_difficulty for variant in variants.values()) or not rows.has_difficulty


def left_out(rows: Comparisons, variants: Variants | None) -> list[str]:
    """Return a message that says what could not be fitted for one model."""
    if why := cannot_fit(rows):
        return [f"no length-controlled win rate ({why})"]
    notes = [] if rows.has_difficulty else ["no difficulty term (not every row has a `difficulty`)"]
    if not uses_reference(rows, variants):
        why = "its rows have no `difficulty`" if variants else "no reference rows"
        notes.append(f"no reference term ({why})")
    return notes


# --- the model -------------------------------------------------------------------------------


def fit(rows: Comparisons, variants: Variants | None = None, c: float = C) -> Fit:
    """Fit logit P(model wins) = a tanh(d / std d) + b difficulty + intercept to one model's comparisons.

    d is len_baseline - len_model. The loss is logistic regression with soft labels, plus the sum of the absolute
    coefficients over `c`. `variants` are comparisons of the baseline with a verbose and a concise variant of itself:
    they share a and b, have no intercept, and have little weight.
    """
    import numpy as np

    difficulty = rows.has_difficulty
    others = list(variants.values()) if uses_reference(rows, variants) else []
    features = np.vstack([features_of(group, difficulty, float(group is rows)) for group in (rows, *others)])
    labels = np.concatenate([np.array(group.preference) - 1 for group in (rows, *others)])
    weights = np.ones(len(labels))
    weights[len(rows) :] = REFERENCE_WEIGHT / max(len(others), 1)
    prompts = in_order(rows.prompts)
    terms = ["length", *(["difficulty"] if difficulty else []), *(["reference"] if others else [])]
    return Fit(features, labels, weights, prompts, terms, c, solve(features, labels, weights[None], c))


def features_of(rows: Comparisons, difficulty: bool, intercept: float) -> ndarray:
    """Return tanh(d / std d), the difficulty if it is a term, and the intercept: (n, 2 or 3)."""
    import numpy as np

    d = rows.differences
    spread = d.std(ddof=1) if len(d) > 1 else 0.0
    columns = [np.tanh(d / spread) if spread else 0 * d]
    columns += [np.array(rows.difficulty)] if difficulty else []
    return np.column_stack([*columns, np.full(len(d), intercept)])


Variants = dict[tuple[Any, Any], Comparisons]
