"""How well a judge's scores agree with people: the paper's five metrics (arXiv 2401.10020, section 3.2, table 4)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import sqrt
from statistics import correlation
from typing import TYPE_CHECKING

from srlm_cli.evaluate import calibration, self_preference, tied_answers
from srlm_cli.records import Record
from srlm_cli.seeds import derive
from srlm_cli.stats.bootstrap import columns_of, measured, of_sums
from srlm_cli.templates.criteria import scores_in

if TYPE_CHECKING:
    import numpy as np

BEST = 5.0
MATCHED_LENGTH = 0.25


@dataclass(frozen=True)
class Replies:
    """The replies to one prompt, one value per reply; a larger `human` or `scores` value is better.

    A score is null if it is unreadable. `perfect` is whether the judge gave the best score; `lengths` are in
    characters; `draws` are the scores of a random judge. `categories` and `ties` are texts of the rows or None; see
    `by_category` and `tied_answers`. `criteria` has the scores by criterion, see `by_criterion`; for `own` see
    `self_preference`.
    """

    human: list[float]
    scores: list[float | None]
    perfect: list[bool]
    lengths: list[int]
    draws: list[float]
    categories: list[str | None] = field(default_factory=list)
    ties: list[str | None] = field(default_factory=list)
    criteria: list[dict[str, float | None] | None] = field(default_factory=list)
    own: list[bool | None] = field(default_factory=list)


def judge_metrics(
    prompts: Iterable[list[Record]],
    seed: int = 0,
    best: float = BEST,
    matched_length: float = MATCHED_LENGTH,
    by: str = "category",
) -> list[Record]:
    """Return the metrics of judged records with `human`, one list per prompt; `docs/metrics.md` defines each.

    Metrics by criterion, which have `criterion`, by the value of the field `by`, which have `category`, and
    by number of replies, which have `replies`, come first, so the last one of a name is the metric over all prompts.
    Prompts with one reply have no order.
    """
    prompts = list(prompts)
    judges = {judge_name(row) for group in prompts for row in group}
    return metric_rows([replies_of(group, seed, best, by) for group in prompts], judges, seed, matched_length)


def metric_rows(
    prompts: Iterable[Replies], judges: set[str | None], seed: int = 0, matched_length: float = MATCHED_LENGTH
) -> list[Record]:
    """Return the metrics of `judge_metrics` from the numbers alone; iterates over `prompts` several times."""
    several = Where(prompts, lambda one: len(one.human) > 1)
    name = {"model": next(iter(judges))} if len(judges) == 1 else {}
    rows = [
        *by_criterion(several, seed),
        *by_category(several, seed),
        *by_number_of_replies(several, seed),
        *calibration.metrics(prompts, seed),
        *reward_metrics(several, seed),
    ]
    rows += [*baselines(several, seed), *at_matched_length(several, seed, matched_length)]
    rows += [
        *weighted_kappa(prompts, seed),
        *tied_answers.metrics(several, seed),
        *self_preference.metrics(several, seed),
    ]
    return [{**row, **name} for row in rows]


@dataclass(frozen=True)
class Where:
    """The prompts that match; can be iterated over several times."""

    prompts: Iterable[Replies]
    fits: Callable[[Replies], bool]

    def __iter__(self) -> Iterator[Replies]:
        return filter(self.fits, self.prompts)


def replies_of(group: list[Record], seed: int, best: float, by: str = "category") -> Replies:
    """Return the judged rows of one prompt as numbers, with their values of the field `by` if these are texts."""
    texts = lambda field: [value if isinstance(value := row.get(field), str) else None for row in group]  # noqa: E731
    return Replies(
        human=[row["human"] for row in group],
        scores=[row["score"] for row in group],
        perfect=[is_perfect(row, best) for row in group],
        lengths=[len(row["response"] or "") for row in group],
        draws=[float(derive(seed, "random", row["id"])) for row in group],
        categories=texts(by),
        ties=texts(tied_answers.FIELD),
        criteria=[scores_in(row) for row in group],
        own=[self_preference.is_own(row, judge_name(row)) for row in group],
    )


def is_perfect(row: Record, best: float) -> bool:
    """Return whether a judged record has the best score, given by all K judgements.

    An expectation never fully reaches the best score, so it counts from half a point below.
    """
    if row["score"] is None:
        return False
    return best - 0.5 <= row["score"] < best + 0.5 if is_expectation(row) else row["score"] == best


def is_expectation(row: Record) -> bool:
    """Return whether a judged record's scores are expectations, or those of comparisons: hardly ever whole numbers."""
    sources, scores = row.get("score_from"), row.get("scores")
    if not isinstance(sources, list) or not isinstance(scores, list):
        return False
    chosen = [score for source, score in zip(sources, scores, strict=False) if source == "finish"]
    return bool({"expected", "direct", "pairwise"} & set(sources)) or any(
        isinstance(score, float) and score % 1 for score in chosen
    )


def judge_name(row: Record) -> str | None:
    """Return the name of the model that judged a record, or None if the record has none."""
    judge = row.get("judge")
    name = judge.get("model") if isinstance(judge, dict) else judge
    return name if isinstance(name, str) else None


# --- the metrics -----------------------------------------------------------------------------


def reward_metrics(prompts: Iterable[Replies], seed: int = 0) -> list[Record]:
    """Return the paper's five metrics, the ways to count ties, best-of-n, and the share of replies with a score.

    A reply with a null score counts as a disagreement: its pairs are misses and its prompt is not an exact match. It is
    left out of the correlations.
    """
    ends = lambda one: outcomes(ordered_pairs(one.human), one.scores)  # noqa: E731
    values = {
        "pairwise_accuracy": lambda one: ties_as_misses(ends(one)),
        "pairwise_accuracy_without_ties": lambda one: ties_left_out(ends(one)),
        "pairwise_accuracy_ties_half": lambda one: [0.5 if o is None else float(o) for o in ends(one)],
        "tie_rate": lambda one: [outcome is None for outcome in ends(one)],
        "best_of_n": lambda one: best_of_n(one.human, one.scores),
        "5_best": lambda one: tops_among_perfect(one.human, one.perfect),
        "exact_match": lambda one: [exact_match(one.human, one.scores)],
        "spearman": lambda one: spearman(one.human, one.scores),
        "kendall_tau": lambda one: kendall_tau(one.human, one.scores),
        "scored_rate": lambda one: [score is not None for score in one.scores],
    }
    return measured("reward", prompts, values, seed)


def baselines(prompts: Iterable[Replies], seed: int = 0) -> list[Record]:
    """Return the pairwise accuracy of three baselines: the longer, the shorter or a random reply wins.

    Replies of equal length are a tie, that is a miss. `random` is one draw with the seed; its interval shows the
    deviation from one half by chance on these pairs.
    """
    values = {
        "longest_wins": lambda one: agreement(one.human, one.lengths),
        "shortest_wins": lambda one: agreement(one.human, [-length for length in one.lengths]),
        "random": lambda one: agreement(one.human, one.draws),
    }
    return measured("reward", prompts, values, seed)


def at_matched_length(prompts: Iterable[Replies], seed: int = 0, longer: float = MATCHED_LENGTH) -> list[Record]:
    """Return the accuracies on the pairs whose longer reply is at most a share `longer` longer than the other."""
    pairs = lambda one: [pair for pair in ordered_pairs(one.human) if near(one.lengths, pair, longer)]  # noqa: E731
    values = {
        "pairwise_accuracy_matched_length": lambda one: ties_as_misses(outcomes(pairs(one), one.scores)),
        "pairwise_accuracy_matched_length_without_ties": lambda one: ties_left_out(outcomes(pairs(one), one.scores)),
        "longest_wins_matched_length": lambda one: ties_as_misses(outcomes(pairs(one), one.lengths)),
    }
    return [row | {"matched_length": longer} for row in measured("reward", prompts, values, seed)]


def by_number_of_replies(prompts: Iterable[Replies], seed: int = 0) -> list[Record]:
    """Return pairwise accuracy and exact match for the prompts with 2 replies, with 3, and so on, as `replies`."""
    rows = []
    values = {
        "pairwise_accuracy": lambda one: agreement(one.human, one.scores),
        "exact_match": lambda one: [exact_match(one.human, one.scores)],
    }
    for count in sorted({len(one.human) for one in prompts}):
        some = Where(prompts, lambda one, count=count: len(one.human) == count)
        rows += [row | {"replies": count} for row in measured("reward", some, values, seed)]
    return rows


def by_category(prompts: Iterable[Replies], seed: int = 0) -> list[Record]:
    """Return pairwise accuracy and best-of-n of the prompts of each category, as `category`."""
    rows = []
    values = {
        "pairwise_accuracy": lambda one: agreement(one.human, one.scores),
        "best_of_n": lambda one: best_of_n(one.human, one.scores),
    }
    for name in sorted({name for one in prompts for name in one.categories[:1] if name is not None}):
        some = Where(prompts, lambda one, name=name: one.categories[:1] == [name])
        rows += [row | {"category": name} for row in measured("reward", some, values, seed)]
    return rows


def by_criterion(prompts: Iterable[Replies], seed: int = 0) -> list[Record]:
    """Return the agreement of each criterion of the judge with people, as `criterion`.

    A reply to which a criterion does not apply is left out. One without a readable value has a null score.
    """
    rows = []
    values = {
        "pairwise_accuracy": lambda one: agreement(one.human, one.scores),
        "pairwise_accuracy_without_ties": lambda one: ties_left_out(outcomes(ordered_pairs(one.human), one.scores)),
        "spearman": lambda one: spearman(one.human, one.scores),
        "scored_rate": lambda one: [score is not None for score in one.scores],
    }
    for name in sorted({name for one in prompts for found in one.criteria for name in found or ()}):
        rows += [row | {"criterion": name} for row in measured("reward", OfCriterion(prompts, name), values, seed)]
    return rows


@dataclass(frozen=True)
class OfCriterion:
    """The prompts with the scores of one criterion in place of the judge's; can be iterated over several times."""

    prompts: Iterable[Replies]
    name: str

    def __iter__(self) -> Iterator[Replies]:
        for one in self.prompts:
            known = [found if found is not None else {self.name: None} for found in one.criteria]
            places = [at for at, found in enumerate(known) if self.name in found]
            human, scores = [one.human[at] for at in places], [known[at][self.name] for at in places]
            yield Replies(human, scores, [], [], [])


def weighted_kappa(prompts: Iterable[Replies], seed: int = 0) -> Iterator[Record]:
    """Yield the kappa with quadratic weights of the judge's scores and people's scores (Cohen, 1968).

    There is none if people gave ranks, which are 0 and less in `human`. Null scores are left out.
    """
    if all(h <= 0 for one in prompts for h in one.human):
        return
    scored = lambda one: [(h, s) for h, s in zip(one.human, one.scores, strict=True) if s is not None]  # noqa: E731
    sums = {
        "people": lambda one: [h for h, _ in scored(one)],
        "judge": lambda one: [s for _, s in scored(one)],
        "squares": lambda one: [h * h + s * s for h, s in scored(one)],
        "apart": lambda one: [(h - s) * (h - s) for h, s in scored(one)],
    }
    columns = columns_of(prompts, sums)[:, : len(sums) + 1]  # and the count

    def kappa(total: np.ndarray) -> np.ndarray:
        people, judge, squares, apart, n = (total[..., at] for at in range(len(sums) + 1))
        return 1 - apart / (squares - 2 * people * judge / n)

    yield of_sums("reward", "weighted_kappa", columns, kappa, int(columns[:, -1].sum()), seed)


# --- one prompt ------------------------------------------------------------------------------


def ordered_pairs(human: list[float]) -> list[tuple[int, int]]:
    """Return the pairs of replies that people ordered, the better one first, without human ties."""
    pairs = combinations(range(len(human)), 2)
    return [(a, b) if human[a] > human[b] else (b, a) for a, b in pairs if human[a] != human[b]]


def outcomes(pairs: list[tuple[int, int]], scores: list[float | None] | list[int]) -> list[bool | None]:
    """Return per pair (better, worse): True if the scores agree, False if they disagree or are null, None for a tie."""
    found: list[bool | None] = []
    for better, worse in pairs:
        if scores[better] is None or scores[worse] is None:
            found.append(False)
        else:
            found.append(None if scores[better] == scores[worse] else scores[better] > scores[worse])
    return found


def agreement(human: list[float], scores: list[float | None] | list[int]) -> list[bool]:
    """Return for each pair that people ordered whether the scores agree; a tie does not."""
    return ties_as_misses(outcomes(ordered_pairs(human), scores))


def ties_as_misses(pairs: list[bool | None]) -> list[bool]:
    """Return whether each pair is right; a tie is a miss, as the 26.6% of the paper's saturated judge imply."""
    return [outcome is True for outcome in pairs]


def ties_left_out(pairs: list[bool | None]) -> list[bool]:
    """Return whether each pair that the judge ordered is right."""
    return [outcome for outcome in pairs if outcome is not None]


def near(lengths: list[int], pair: tuple[int, int], longer: float) -> bool:
    """Return whether the longer reply of a pair is at most a share `longer` longer than the shorter one."""
    short, long = sorted(lengths[at] for at in pair)
    return long - short <= longer * short + 1e-9  # 29 is not over 0.29 * 100


def best_of_n(human: list[float], scores: list[float | None]) -> list[float]:
    """Return the share of the replies with the highest score that people rank first, as RewardBench 2 counts ties.

    A prompt without a score has 0, one whose replies people tied has no value.
    """
    if len(set(human)) == 1:
        return []
    known = [score for score in scores if score is not None]
    tops = [h == max(human) for h, score in zip(human, scores, strict=True) if known and score == max(known)]
    return [sum(tops) / len(tops) if tops else 0.0]


def tops_among_perfect(human: list[float], perfect: list[bool]) -> list[bool]:
    """Return for each reply with the best score whether people rank it top, alone or not ("5-best")."""
    return [value == max(human) for value, best in zip(human, perfect, strict=True) if best]


def exact_match(human: list[float], scores: list[float | None]) -> bool:
    """Return whether the whole ranking equals the human one: each pair in the same order, ties included."""
    if any(score is None for score in scores):
        return False
    return all(sign(human[a] - human[b]) == sign(scores[a] - scores[b]) for a, b in combinations(range(len(human)), 2))


def spearman(human: list[float], scores: list[float | None]) -> list[float]:
    """Return Spearman's rho of one prompt as a list of at most one value; see `can_correlate`."""
    known, varies = can_correlate(human, scores)
    return [correlation(*map(ranks, known))] if varies else [0.0] if known else []


def kendall_tau(human: list[float], scores: list[float | None]) -> list[float]:
    """Return Kendall's tau-b of one prompt as a list of at most one value; see `can_correlate`.

    Pairs ordered alike minus pairs ordered the other way, over the geometric mean of the pairs that people
    and that the scores order (Kendall, 1945).
    """
    known, varies = can_correlate(human, scores)
    if not varies:
        return [0.0] if known else []
    by_people, by_scores = ([sign(a - b) for a, b in combinations(values, 2)] for values in known)
    agreed = sum(a * b for a, b in zip(by_people, by_scores, strict=True))
    return [agreed / sqrt(sum(map(abs, by_people)) * sum(map(abs, by_scores)))]


def can_correlate(human: list[float], scores: list[float | None]) -> tuple[list[list[float]], bool]:
    """Return (human values and scores of the replies with a score, whether the scores vary).

    If all scores are equal, the correlation is 0. A prompt with an all-equal human ranking, or with fewer than two
    scores, has no correlation; then the first list is empty.
    """
    known = [(h, s) for h, s in zip(human, scores, strict=True) if s is not None]
    if len({h for h, _ in known}) < 2:
        return [], False
    return [list(values) for values in zip(*known, strict=True)], len({s for _, s in known}) > 1


def ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value, from 1; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [(bisect_left(ordered, value) + bisect_right(ordered, value) + 1) / 2 for value in values]


def sign(x: float) -> int:
    """Return 1, 0 or -1."""
    return (x > 0) - (x < 0)
