"""Criteria of a judge template: their scales, the JSON answer that is asked for, and how it is read.

The answer is one object with an object per criterion: `{"accuracy": {"reason": "...", "value": "3"}}`. All values are
texts, so that one enum holds numbers, names and "n/a" in every implementation of JSON schemas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from statistics import fmean
from typing import Any

from srlm_cli import thoughts
from srlm_cli.records import is_number
from srlm_cli.templates.reading import REPEATED

NOT_APPLICABLE = "n/a"
ABSENT = {"n/a", "na", "not applicable", "none", "null"}
AGGREGATES = ("mean", "min", "all")
KEYS = {"name", "description", "scale", "weight", "not_applicable"}
PLAIN = re.compile(r'[^"\\\x00-\x1f]*[^"\\\x00-\x20][^"\\\x00-\x1f]*')  # no escapes: back ends differ in them
MOST = 100
MOST_WEIGHT = 1000
DECODER = json.JSONDecoder(strict=False)  # models write line breaks into strings


@dataclass(frozen=True)
class Criterion:
    """One criterion: what is judged, its values from the worst to the best, and its weight in the score."""

    name: str
    description: str
    values: tuple[str, ...]
    weight: float = 1.0
    not_applicable: bool = False

    @property
    def choices(self) -> tuple[str, ...]:
        """All values that the judge can give."""
        return (*self.values, NOT_APPLICABLE) if self.not_applicable else self.values

    @property
    def counts_up(self) -> bool:
        """Whether the values are the numbers from 0."""
        return self.values == tuple(map(str, range(len(self.values))))

    def place(self, value: str) -> float:
        """Return where a value is on the scale, from 0 (worst) to 1 (best)."""
        return self.values.index(value) / (len(self.values) - 1)

    def read(self, given: Any) -> str | None:
        """Return one of `choices` that a JSON value means, or None."""
        if isinstance(given, bool):
            given = "yes" if given else "no"
        elif isinstance(given, float) and given.is_integer():
            given = int(given)
        text = "null" if given is None else str(given).strip().casefold() if isinstance(given, str | int) else ""
        if found := next((value for value in self.values if value.casefold() == text), None):
            return found
        return NOT_APPLICABLE if self.not_applicable and text in ABSENT else None


@dataclass(frozen=True)
class Finding:
    """What the judge found for one criterion: the `value`, None if the criterion does not apply, and the `reason`.

    `score` is the place of the value on its scale, 0 to 1, or its expectation; None if the criterion does not apply.
    `best` is 1 for the best value and 0 for another one, or its probability. `probability` is that of the value, and
    `mass` that of all values together, if they are known.
    """

    value: str | None
    reason: str
    score: float | None
    best: float
    probability: float | None = None
    mass: float | None = None


Findings = Mapping[str, Finding]


def finding(criterion: Criterion, value: str, reason: str) -> Finding:
    """Return the finding of a value as it was written."""
    if value == NOT_APPLICABLE:
        return Finding(None, reason, None, 0.0)
    place = criterion.place(value)
    return Finding(value, reason, place, float(place == 1))


def expected(criterion: Criterion, value: str, reason: str, probabilities: list[float]) -> Finding:
    """Return the finding of a value with its expectation over the scale.

    The criterion does not apply if "n/a" has more than half of the probability; otherwise "n/a" is left out.
    """
    chances = dict(zip(criterion.choices, probabilities, strict=True))
    left = 1 - (absent := chances.get(NOT_APPLICABLE, 0.0))
    if absent > 0.5 or left <= 0:
        return Finding(None, reason, None, 0.0)
    score = sum(chances[value] * criterion.place(value) for value in criterion.values) / left
    if value == NOT_APPLICABLE:
        value = max(criterion.values, key=chances.__getitem__)
    return Finding(value, reason, score, chances[criterion.values[-1]] / left)


# --- what the judge is asked -----------------------------------------------------------------


def listed(criteria: Iterable[Criterion]) -> str:
    """Return the criteria as the judge is shown them, one a line."""
    lines = []
    for one in criteria:
        last = len(one.values) - 1
        scale = f"0 (worst) to {last} (best)" if one.counts_up and last > 1 else " or ".join(one.values)
        if not one.counts_up and last > 1:
            scale = f"{', '.join(one.values[:-1])} or {one.values[-1]}, from the worst to the best"
        absent = f', or "{NOT_APPLICABLE}" if it does not apply' if one.not_applicable else ""
        lines.append(f"- {one.name}: {one.description} ({scale}{absent})")
    return "\n".join(lines)


def form(criteria: Iterable[Criterion], direct: bool) -> str:
    """Return the form of the answer as the judge is shown it."""
    reason = {} if direct else {"reason": "..."}
    return json.dumps({one.name: {**reason, "value": "..."} for one in criteria}, ensure_ascii=False)


def schema(criteria: Iterable[Criterion], direct: bool) -> dict[str, Any]:
    """Return the JSON schema of the answer, of the few keywords that all implementations read alike."""
    reason = {} if direct else {"reason": {"type": "string"}}
    return _object(
        {one.name: _object({**reason, "value": {"type": "string", "enum": list(one.choices)}}) for one in criteria}
    )


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def begun(criteria: tuple[Criterion, ...], found: Findings, upto: Criterion, direct: bool) -> str:
    """Return the answer before the reason of a criterion, or before its value if `direct`.

    Criteria that come before it and were not found are left out.
    """
    before = criteria[: criteria.index(upto)]
    parts = [f"{_text(one.name)}: {entry(found[one.name], direct)}" for one in before if one.name in found]
    return "{" + ", ".join([*parts, f'{_text(upto.name)}: {{"{"value" if direct else "reason"}": "'])


def entry(found: Finding, direct: bool) -> str:
    """Return a finding as the judge writes it."""
    value = NOT_APPLICABLE if found.value is None else found.value
    return json.dumps({"value": value} if direct else {"reason": found.reason, "value": value}, ensure_ascii=False)


def before_value(reason: str) -> str:
    """Return what is between the quotation mark before a reason and the value."""
    return f'{_text(reason)[1:]}, "value": "'


def whole(criteria: Iterable[Criterion], found: Findings, direct: bool) -> str:
    """Return the answer that says these findings."""
    parts = [f"{_text(one.name)}: {entry(found[one.name], direct)}" for one in criteria if one.name in found]
    return "{" + ", ".join(parts) + "}"


def _text(text: Any) -> str:
    return json.dumps(text, ensure_ascii=False)


# --- what it answered ------------------------------------------------------------------------


def read(answer: str, criteria: Iterable[Criterion]) -> dict[str, Finding]:
    """Return the findings in an answer, by name, without the criteria whose value is missing or not on the scale.

    The first JSON object after the thought that names a criterion counts.
    """
    criteria = list(criteria)
    names = {plain(one.name) for one in criteria}
    given = next((one for one in objects(answer) if names & one.keys()), {})
    found = {}
    for one in criteria:
        said = given.get(plain(one.name))
        said = said if isinstance(said, dict) else {"value": said} if plain(one.name) in given else {}
        said = {plain(key): value for key, value in said.items()}
        if "value" in said and (value := one.read(said["value"])) is not None:
            reason = said.get("reason", "")
            found[one.name] = finding(one, value, reason if isinstance(reason, str) else _text(reason))
    return found


def objects(answer: str) -> Iterable[dict[str, Any]]:
    """Yield the JSON objects in the judge's own words, with plain keys."""
    own = thoughts.blanked(REPEATED.sub(lambda block: " " * len(block[0]), answer))
    at = own.find("{")
    while at >= 0:
        try:
            value, _ = DECODER.raw_decode(own, at)
            yield {plain(key): part for key, part in value.items()}
        except (ValueError, RecursionError):
            pass
        at = own.find("{", at + 1)  # the answer may be in another object


def plain(key: str) -> str:
    """Return a name as names are compared: without case, and with one space for spaces, dashes and underscores."""
    return " ".join(re.split(r"[\s_-]+", key.casefold().strip()))


def share(found: Findings, criteria: Iterable[Criterion], aggregate: str) -> float | None:
    """Return the score of an answer from 0 to 1; None if a criterion is missing, or if none applies.

    `mean` is the mean by weight, `min` the lowest score, `all` 1 if all values are the best ones: with expectations the
    product of the probabilities of these. What does not apply is left out, and so is a weight of 0.
    """
    criteria = list(criteria)
    if any(one.name not in found for one in criteria):
        return None
    known = [(found[one.name], one.weight) for one in criteria if one.weight and found[one.name].score is not None]
    if not known:
        return None
    if aggregate == "min":
        return min(one.score for one, _ in known)
    if aggregate == "all":
        return prod(one.best for one, _ in known)
    return sum(one.score * weight for one, weight in known) / sum(weight for _, weight in known)


# --- in a record -----------------------------------------------------------------------------


def written(found: Findings, criteria: Iterable[Criterion]) -> dict[str, Any] | None:
    """Return the findings of one judgement for a record, null for a criterion without one; None if there are none."""
    return {one.name: _written(one, found.get(one.name)) for one in criteria} if found else None


def _written(criterion: Criterion, found: Finding | None) -> dict[str, Any] | None:
    if found is None:
        return None
    value = int(found.value) if found.value is not None and criterion.counts_up else found.value
    return {"value": value, "reason": found.reason, "score": found.score, "probability": found.probability}


def is_written(value: Any) -> bool:
    """Return whether a field `criteria` is from `srlm judge`, and not a field of the user's own."""
    return isinstance(value, list) and bool(value) and all(part is None or _is_judgement(part) for part in value)


def _is_judgement(part: Any) -> bool:
    return isinstance(part, dict) and all(
        one is None or (isinstance(one, dict) and {"value", "score"} <= one.keys() and _is_share(one["score"]))
        for one in part.values()
    )


def _is_share(score: Any) -> bool:
    return score is None or (is_number(score) and isfinite(score))


# --- in a template ---------------------------------------------------------------------------


def as_toml(criterion: Criterion) -> str:
    """Return a criterion as a table of a template file."""
    numbers = "yes/no" if criterion.values == ("no", "yes") else list(criterion.values)
    table = {
        "name": criterion.name,
        "description": criterion.description,
        "scale": len(criterion.values) - 1 if criterion.counts_up else numbers,
        **({"weight": criterion.weight} if criterion.weight != 1 else {}),
        **({"not_applicable": True} if criterion.not_applicable else {}),
    }
    # A JSON text, number, list or truth value is one of TOML, too, except for the one character that TOML escapes.
    lines = [f"{key} = {_text(value)}".replace("\x7f", "\\u007f") for key, value in table.items()]
    return "\n".join(["[[criteria]]", *lines]) + "\n"


def of_template(tables: Iterable[Any]) -> tuple[Criterion, ...]:
    """Return the criteria of a template file; raise ValueError for a wrong one."""
    made = tuple(_criterion(number, table) for number, table in enumerate(tables, 1))
    names = [plain(one.name) for one in made]
    if twice := next((one.name for one, name in zip(made, names, strict=True) if names.count(name) > 1), None):
        raise ValueError(f"it has two criteria named {twice!r}")
    if made and not any(one.weight for one in made):
        raise ValueError("one of its criteria needs a weight above 0")
    return made


def _criterion(number: int, table: Any) -> Criterion:
    where = f"its criterion {number}"
    if not isinstance(table, dict) or (
        wrong := (table.keys() - KEYS) | ({"name", "description", "scale"} - table.keys())
    ):
        named = f": unknown or missing `{min(wrong)}`" if isinstance(table, dict) else ""
        raise ValueError(f"{where} has to be a table of name, description, scale, weight and not_applicable{named}")
    name, description, weight = table["name"], table["description"], table.get("weight", 1.0)
    absent = table.get("not_applicable", False)
    if not isinstance(name, str) or not PLAIN.fullmatch(name):
        raise ValueError(f"{where}: its `name` has to be a text without quotation marks and backslashes")
    where = f"its criterion {name!r}"
    if not isinstance(description, str) or not description.strip():
        raise ValueError(f"{where}: its `description` has to be a text")
    if not is_number(weight) or not 0 <= weight <= MOST_WEIGHT:
        raise ValueError(f"{where}: its `weight` has to be a number from 0 to {MOST_WEIGHT}")
    if not isinstance(absent, bool):
        raise ValueError(f"{where}: its `not_applicable` has to be true or false")
    values = _values(table["scale"])
    if values is None or (absent and ABSENT & {value.casefold() for value in values}):
        raise ValueError(
            f'{where}: its `scale` has to be a number from 1 to {MOST} (0 to this number), "yes/no", '
            "or a list of different names from the worst to the best"
        )
    return Criterion(name.strip(), " ".join(description.split()), values, float(weight), absent)


def _values(scale: Any) -> tuple[str, ...] | None:
    """Return the values of a scale from the worst to the best, or None for a wrong one."""
    if scale == "yes/no":
        return "no", "yes"
    if isinstance(scale, int) and not isinstance(scale, bool):
        return tuple(map(str, range(scale + 1))) if 1 <= scale <= MOST else None
    if not isinstance(scale, list | tuple) or not all(
        isinstance(name, str) and PLAIN.fullmatch(name) for name in scale
    ):
        return None
    names = tuple(name.strip() for name in scale)
    return names if len(names) > 1 and len({name.casefold() for name in names}) == len(names) else None


def scores_in(row: Mapping[str, Any]) -> dict[str, float | None] | None:
    """Return the mean score of each criterion over the judgements of a record, 0 to 1, by name.

    A score is None if it cannot be read in any judgement, and all is None if nothing can be read. A criterion that
    applies in no judgement is left out.
    """
    given = row.get("criteria")
    if not is_written(given):
        return {}
    found: dict[str, float | None] = {}
    judgements = [part for part in given if part]
    if not judgements:
        return None
    for name in dict.fromkeys(name for part in judgements for name in part):
        entries = [one for part in judgements if (one := part.get(name))]
        known = [one["score"] for one in entries if one["score"] is not None]
        if known or not entries:
            found[name] = fmean(known) if known else None
    return found
