"""Which criteria of a judge raise its agreement with people: forward selection, and the agreement that is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from srlm_cli.evaluate.reward import ordered_pairs, outcomes
from srlm_cli.records import Record
from srlm_cli.stages.make_rubric import Found, Rubric, Trial, replies_of
from srlm_cli.stats.bootstrap import measured
from srlm_cli.stats.randomization import p_above_zero

LEVEL = 0.05
CHANCE = 0.5


@dataclass(frozen=True)
class Prompt:
    """The replies to one prompt: what people gave each, and what the judge found for each by criterion."""

    human: list[float]
    found: list[Found]
    lengths: list[int]


@dataclass(frozen=True)
class Chosen:
    """The criteria that were kept with their weights, and the agreement with people on the rows they were chosen by.

    `alone` is the agreement of each criterion that was tried, by name, and `together` that of those that were kept.
    """

    rubric: Rubric
    alone: dict[str, float]
    together: float


def prompts_of(ranked: list[Record], found: Sequence[Found]) -> list[Prompt]:
    """Return the prompts of ranked rows; `found` has the findings for all their replies, in order."""
    left, prompts = iter(found), []
    for row in ranked:
        replies = replies_of(row)
        lengths = [len(reply["response"]) for reply in replies]
        prompts.append(Prompt([reply["human"] for reply in replies], [next(left) for _ in replies], lengths))
    return prompts


def choose(prompts: list[Prompt], candidates: Rubric, most: int, seed: int = 0) -> Chosen:
    """Return at most `most` criteria whose weighted mean agrees with people.

    Forward selection with replacement (Caruana et al., 2004): of all criteria the one that raises the agreement most is
    added, again and again; its weight is how often it was added. It is added only if its gain over the prompts is above
    chance at the level `LEVEL` / (number of candidates), so that the best of many useless criteria is not taken for a
    useful one.
    """
    weights: dict[str, int] = {}
    pairs = sum(len(ordered_pairs(one.human)) for one in prompts)
    before = right_pairs(prompts, weights)
    alone = {one.name: sum(right_pairs(prompts, {one.name: 1})) / max(pairs, 1) for one in candidates}
    while pairs:
        names = [one.name for one in candidates if one.name in weights or len(weights) < most]
        after = {name: right_pairs(prompts, {**weights, name: weights.get(name, 0) + 1}) for name in names}
        gains = {name: [b - a for a, b in zip(before, made, strict=True)] for name, made in after.items()}
        best = max(
            (name for name in names if p_above_zero(gains[name], seed) <= LEVEL / len(candidates)),
            key=lambda name: sum(gains[name]),
            default=None,
        )
        if best is None:
            break
        weights[best] = weights.get(best, 0) + 1
        before = after[best]
    by_name = {one.name: one for one in candidates}
    kept = tuple(replace(by_name[name], weight=float(weight)) for name, weight in weights.items())
    return Chosen(kept, alone, sum(before) / pairs if pairs else CHANCE)


def right_pairs(prompts: list[Prompt], weights: Mapping[str, int]) -> list[float]:
    """Return for each prompt how many pairs of replies the weighted mean orders as people do; a tie counts half.

    A tie is not a miss here: otherwise each useless criterion would help, because it breaks ties.
    """
    return [sum(halves(one.human, [mean(found, weights) for found in one.found])) for one in prompts]


def halves(human: list[float], scores: list[float | None]) -> Iterator[float]:
    """Yield 1 for each pair that the scores order as people do, 1/2 for a tie, 0 for another order or a null score."""
    for outcome in outcomes(ordered_pairs(human), scores):
        yield CHANCE if outcome is None else float(outcome)


def mean(found: Found, weights: Mapping[str, int]) -> float | None:
    """Return the weighted mean of the scores of a reply; what does not apply is left out.

    None if a score is unreadable, or if nothing applies. Without any criteria it is 0.
    """
    if any(found.get(name, 0) is None for name in weights):
        return None
    known = [(found[name], weight) for name, weight in weights.items() if name in found]
    if not known:
        return None if weights else 0.0
    return sum(score * weight for score, weight in known) / sum(weight for _, weight in known)


def agreement(trial: Trial, measured_on: list[Record], seed: int = 0) -> list[Record]:
    """Return two metrics over the rows that neither step saw, with intervals from a bootstrap over prompts.

    They are the share of the pairs that the rubric orders as people do, ties as halves, and the same for the rule that
    the longer reply is better.
    """
    prompts = prompts_of(measured_on, [{"score": score} for score in trial.scores])
    values = {
        "pairwise_accuracy_ties_half": lambda one: [*halves(one.human, [found["score"] for found in one.found])],
        "longest_wins": lambda one: [*halves(one.human, one.lengths)],
    }
    return measured("rubric", prompts, values, seed)
