"""Judge health: metrics of a judge from the scores in a judged file, and limits that stop a collapsing loop."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, groupby
from math import ceil, floor, fsum, isnan, sqrt
from operator import attrgetter, itemgetter
from statistics import correlation
from typing import Any

from srlm_cli.errors import LimitExceeded
from srlm_cli.evaluate.reward import judge_name, ranks
from srlm_cli.records import Record, is_number
from srlm_cli.seeds import derive
from srlm_cli.stats.bootstrap import columns_of, interval, means, measured, resampled_sums

# The judge wrote this score or verdict itself, was asked for nothing but it, or is a program.
READ = ("text", "expected", "direct", "rules", "pairwise", "reward", "implicit")
USUAL_SCORES = range(6)
SAME = 1e-9


@dataclass(slots=True)
class Numbers:
    """The numbers of the judged responses of one prompt, without texts.

    Per response: `scores` (null: unreadable), `lengths` in characters, `spreads`, the standard deviation of its
    readable K scores (if there are two). Per judgement: `read`, `forced` and `cut_off`, if the records have them, and
    `singles`, the readable scores.
    """

    scores: list[float | None] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)
    read: list[bool] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    cut_off: list[bool] = field(default_factory=list)
    singles: list[float] = field(default_factory=list)

    def add(self, row: Record) -> None:
        """Add one judged record; missing fields are not counted."""
        self.scores.append(row["score"])
        self.lengths.append(len(row["response"] or ""))
        sources = listed(row, "score_from")
        reasons = listed(row, "judgement_finish_reasons")
        self.read += [source in READ for source in sources]
        self.forced += [source == "finish" for source in sources]
        self.cut_off += [reason == "length" for reason in reasons]
        single = [score for score in listed(row, "scores") or [row["score"]] if is_number(score)]
        self.singles += single
        if len(single) > 1:
            self.spreads.append(spread(single))

    def join(self, other: Numbers) -> None:
        """Add the numbers of more responses."""
        for name in self.__slots__:
            getattr(self, name).extend(getattr(other, name))

    def scored(self) -> list[tuple[float, int]]:
        """Return (score, length) of each response that has a score."""
        pairs = zip(self.scores, self.lengths, strict=True)
        return [(score, length) for score, length in pairs if score is not None]


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation of all values; statistics.pstdev takes thirty times as long."""
    mean = fsum(values) / len(values)
    return sqrt(fsum((value - mean) ** 2 for value in values) / len(values))


class ByPrompt:
    """Numbers by prompt, in memory, in the order of the prompt ids."""

    def __init__(self) -> None:
        self.prompts: dict[str, Numbers] = {}

    def add(self, prompt: str, numbers: Numbers) -> None:
        """Add the numbers of a prompt to those that are already there."""
        self.prompts.setdefault(prompt, Numbers()).join(numbers)

    def __iter__(self) -> Iterator[Numbers]:
        return (self.prompts[key] for key in sorted(self.prompts))


@dataclass
class Judged:
    """The numbers of a judged file by prompt, who judged, and (score, length) of each scored response."""

    prompts: Iterable[Numbers]
    judges: set[str | None] = field(default_factory=set)
    responses: int = 0
    scores: array = field(default_factory=lambda: array("d"))
    lengths: array = field(default_factory=lambda: array("q"))


@dataclass(frozen=True)
class Limits:
    """The limits of a healthy judge; all are shares, except `length_growth`, a ratio."""

    one_score: float = 0.95
    parse_rate: float = 0.5
    length_growth: float = 2.0
    accuracy_drop: float = 0.1


def numbers_of(judged: Iterable[Record], prompts: ByPrompt | None = None) -> Judged:
    """Return the numbers of judged records; the records of a prompt need not be consecutive.

    They are stored in `prompts`, by default in memory.
    """
    found = Judged(ByPrompt() if prompts is None else prompts)
    for prompt, rows in groupby(judged, key=itemgetter("prompt_id")):
        numbers = Numbers()
        for row in rows:
            numbers.add(row)
            found.judges.add(judge_name(row))
        found.prompts.add(prompt, numbers)
        found.responses += len(numbers.scores)
        for score, length in numbers.scored():
            found.scores.append(score)
            found.lengths.append(length)
    return found


def health_metrics(
    judged: Judged,
    before: Judged | None = None,
    accuracy: Record | None = None,
    accuracy_before: Record | None = None,
    seed: int = 0,
) -> list[Record]:
    """Return the metric rows of a judged file; `docs/metrics.md` defines each.

    `before` is the judged file of the previous round. The accuracies are the `pairwise_accuracy` metrics of the judges
    of both rounds on the same ranked replies.
    """
    rows = [*of_judgements(judged, seed), *of_responses(judged, seed)]
    rows += against_before(judged, before, seed) if before else []
    rows += against_people(accuracy, accuracy_before) if accuracy else []
    name = {"model": next(iter(judged.judges))} if len(judged.judges) == 1 else {}
    return [{**row, **name} for row in rows]


# --- the metrics -----------------------------------------------------------------------------


def of_judgements(judged: Judged, seed: int) -> list[Record]:
    """Return how the judgements were read, and the share of each score among the readable ones.

    There is one `share_of_score` per integer score, halves rounded up. `top_score_share` is the largest share of one
    score with one decimal. So for integer scores it equals the largest `share_of_score`, and the expectations of a
    judge that still distinguishes responses do not count as equal.
    """
    read = {
        "parse_rate": attrgetter("read"),
        "forced_score_rate": attrgetter("forced"),
        "cut_off": attrgetter("cut_off"),
    }
    tenths: Counter[float] = Counter()
    found = set(USUAL_SCORES)
    for one in judged.prompts:
        tenths.update(round(single, 1) for single in one.singles)
        found.update(map(whole, one.singles))
    scores = sorted(found)
    top = max(sorted(tenths), key=lambda score: tenths[score], default=None)
    shares = {score: lambda one, score=score: [whole(single) == score for single in one.singles] for score in scores}
    share = {"top_score_share": lambda one: [round(single, 1) == top for single in one.singles]}
    by_score = [
        row | {"metric": "share_of_score", "score": score}
        for score, row in zip(scores, measured("health", judged.prompts, shares, seed), strict=True)
    ]
    return [
        *measured("health", judged.prompts, read, seed),
        *by_score,
        *(row | {"score": top} for row in measured("health", judged.prompts, share, seed)),
    ]


def whole(score: float) -> int:
    """Return the nearest whole score, halves rounded up."""
    return floor(score + 0.5)


def of_responses(judged: Judged, seed: int) -> list[Record]:
    """Return how well the judge distinguishes the responses of a prompt, and how scores depend on length."""
    values = {
        "tie_rate": ties,
        "tied_prompts": all_tied,
        "score_std_within_k": lambda one: one.spreads,
        "gap": gap,
        "mean_score": lambda one: [score for score, _ in one.scored()],
        "length": lambda one: one.lengths,
        "longest_agreement": longer_scores_higher,
        "score_length_spearman": lambda one: spearman(one.scored()),
    }
    rows = measured("health", judged.prompts, values, seed)
    rho = overall(judged)
    return [*rows, plain("score_length_spearman_overall", *rho, n=len(judged.scores) if rho else 0)]


def overall(judged: Judged) -> list[float]:
    """Return Spearman's rho of score and length over all scored responses, or nothing if one of them is constant."""
    import numpy as np

    ranked = []
    for values in (judged.scores, judged.lengths):
        _, place, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        if len(count) < 2:
            return []
        mean_ranks = np.cumsum(count) - (count - 1) / 2
        ranked.append(mean_ranks[place])
    return [float(np.corrcoef(*ranked)[0, 1])]


def against_before(judged: Judged, before: Judged, seed: int) -> list[Record]:
    """Return the changes of length and gap since the previous round; both rounds are resampled independently."""
    import numpy as np

    compared = {"length": attrgetter("lengths"), "gap": gap}
    now, then = columns_of(judged.prompts, compared), columns_of(before.prompts, compared)
    drawn, drawn_then = means(resampled_sums(now, seed)), means(resampled_sums(then, derive(seed, "before")))
    (length, gap_), (length_then, gap_then) = means(now.sum(axis=0)).tolist(), means(then.sum(axis=0)).tolist()
    growth, change = plain("length_growth"), plain("gap_change")
    counts = now[:, 2:4].sum(axis=0).astype(int).tolist()
    fewest = np.minimum(*(np.count_nonzero(columns[:, 2:4], axis=0) for columns in (now, then))).tolist()  # prompts
    if length_then > 0 and not isnan(length):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = drawn[:, 0] / drawn_then[:, 0]
        growth |= {"value": length / length_then, "n": counts[0], **interval(ratios, fewest[0])}
    if not (isnan(gap_) or isnan(gap_then)):
        limits = interval(drawn[:, 1] - drawn_then[:, 1], fewest[1])
        change |= {"value": gap_ - gap_then, "n": counts[1], **limits}
    return [growth, change]


def against_people(accuracy: Record, before: Record | None) -> list[Record]:
    """Return the judge's pairwise accuracy on ranked replies, and its change since the previous round."""
    known = {key: accuracy.get(key) for key in ("value", "n", "ci_low", "ci_high")}
    rows = [plain("accuracy") | known]
    if before:
        both = None not in (accuracy["value"], before["value"])
        rows.append(plain("accuracy_change", *([accuracy["value"] - before["value"]] if both else []), n=known["n"]))
    return rows


def plain(name: str, value: float | None = None, *, n: int = 0) -> Record:
    """Return a metric record without an interval; `n` is 0 without a value."""
    return {"task": "health", "metric": name, "value": value, "n": n, "ci_low": None, "ci_high": None}


# --- one prompt: each returns the values of one metric -----------------------------------------


def ties(one: Numbers) -> list[bool]:
    """Return for each pair of scored responses whether their scores are equal."""
    return [a == b for (a, _), (b, _) in combinations(one.scored(), 2)]


def all_tied(one: Numbers) -> list[bool]:
    """Return whether all scores are equal, if there are at least two; then there is no pair."""
    scores = [score for score, _ in one.scored()]
    return [len(set(scores)) == 1] if len(scores) > 1 else []


def gap(one: Numbers) -> list[float]:
    """Return the best score minus the worst, if there are at least two."""
    scores = [score for score, _ in one.scored()]
    return [max(scores) - min(scores)] if len(scores) > 1 else []


def longer_scores_higher(one: Numbers) -> list[bool]:
    """Return for each pair that differs in score and in length whether the longer response has the higher score."""
    pairs = combinations(one.scored(), 2)
    return [
        (score > other) == (length > size)
        for (score, length), (other, size) in pairs
        if score != other and length != size
    ]


def spearman(pairs: list[tuple[float, int]]) -> list[float]:
    """Return Spearman's rho of (x, y) pairs as a list of one value; the list is empty if x or y is constant."""
    x, y = (ranks(values) for values in zip(*pairs, strict=True)) if pairs else ([], [])
    return [correlation(x, y)] if len(set(x)) > 1 and len(set(y)) > 1 else []


def listed(row: Record, key: str) -> list[Any]:
    """Return a list field of a record, or [] if it is missing."""
    return row[key] if isinstance(row.get(key), list) else []


# --- the guards ------------------------------------------------------------------------------


def over_limits(rows: list[Record], limits: Limits) -> LimitExceeded | None:
    """Return an error that names each exceeded limit, why it matters and how to continue; None if there is none.

    A limit whose metric is missing or null is not checked.
    """
    found = {row["metric"]: row for row in rows if row["value"] is not None}
    faults = [
        fault for check in (one_score, parse_rate, length_growth, accuracy_drop) if (fault := check(found, limits))
    ]
    if not faults:
        return None
    what, why, settings = zip(*faults, strict=True)
    overrule = f'set {" and ".join(settings)} under ["eval health"] in srlm.toml to continue anyway'
    return LimitExceeded("; ".join(what), "; ".join([*why, overrule]))


Fault = tuple[str, str, str]  # what is wrong, why it matters, the setting that overrules it


def one_score(found: dict[str, Record], limits: Limits) -> Fault | None:
    """Return the fault of a judge that gives nearly always the same score."""
    top = found.get("top_score_share")
    if not top or top["value"] <= limits.one_score + SAME:
        return None
    return (
        f"{top['value']:.1%} of the scores are {top['score']:g}, over --max-one-score {limits.one_score}",
        "the judge no longer tells responses apart",
        "max-one-score = 1.0",
    )


def parse_rate(found: dict[str, Record], limits: Limits) -> Fault | None:
    """Return the fault of a judge that does not write scores."""
    rate = found.get("parse_rate")
    if not rate or rate["value"] >= limits.parse_rate - SAME:
        return None
    return (
        f"{rate['value']:.1%} of the judgements hold a score, under --min-parse-rate {limits.parse_rate}",
        "the judge does not write scores that can be read",
        "min-parse-rate = 0.0",
    )


def length_growth(found: dict[str, Record], limits: Limits) -> Fault | None:
    """Return the fault of responses whose length grew too much in one round."""
    growth = found.get("length_growth")
    if not growth or growth["value"] <= limits.length_growth + SAME:
        return None
    return (
        f"responses are {growth['value']:.2f} times as long as in the round before, "
        f"over --max-length-growth {limits.length_growth}",
        "the loop may be rewarding length alone",
        f"max-length-growth = {ceil(10 * growth['value']) / 10}",
    )


def accuracy_drop(found: dict[str, Record], limits: Limits) -> Fault | None:
    """Return the fault of a judge that agrees less with people than in the previous round."""
    change = found.get("accuracy_change")
    if not change or -change["value"] <= limits.accuracy_drop + SAME:
        return None
    return (
        f"the judge orders {found['accuracy']['value']:.1%} of the ranked pairs as people did, "
        f"{-100 * change['value']:.1f} points fewer than in the round before, "
        f"over --max-accuracy-drop {limits.accuracy_drop}",
        "the judge is getting worse",
        "max-accuracy-drop = 1.0",
    )
