"""How well a judge's scores agree with people: the paper's five metrics (arXiv 2401.10020, section 3.2, table 4)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from srlm_cli.evaluate.metric import metric
from srlm_cli.records import Row

BEST = 5.0


def judge_metrics(prompts: list[list[Row]], seed: int = 0) -> list[Row]:
    """Return the metric rows of judged rows that hold `human`, by prompt, and what length alone would reach."""
    scored = [([row["human"] for row in group], [row["score"] for row in group]) for group in prompts]
    lengths = [([row["human"] for row in group], [len(row["response"]) for row in group]) for group in prompts]
    judges = {judge_name(row) for group in prompts for row in group}
    name = {"model": judges.pop()} if len(judges) == 1 else {}
    return [{**row, **name} for row in [*reward_metrics(scored, seed), longest_wins(lengths, seed)]]


def judge_name(row: Row) -> str | None:
    """Return which model judged a row."""
    judge = row.get("judge")
    return judge.get("model") if isinstance(judge, dict) else judge


def reward_metrics(prompts: Iterable[tuple[list[float], list[float | None]]], seed: int = 0) -> list[Row]:
    """Return metric rows for prompts given as (human values, judge's scores), both larger is better.

    A reply whose score is null agrees with nobody: its pairs count as misses and its prompt has no
    exact match; it has no part in the correlations.
    """
    prompts = [(human, scores) for human, scores in prompts if len(human) > 1]
    pairs = [pair_outcomes(human, scores) for human, scores in prompts]
    rhos, taus = zip(*(correlations(human, scores) for human, scores in prompts), strict=True) if prompts else ([], [])
    values = {
        "pairwise_accuracy": [[outcome is True for outcome in group] for group in pairs],
        "pairwise_accuracy_without_ties": [[o for o in group if o is not None] for group in pairs],
        "tie_rate": [[outcome is None for outcome in group] for group in pairs],
        "5_best": [tops_among_perfect(human, scores) for human, scores in prompts],
        "exact_match": [[exact_match(human, scores)] for human, scores in prompts],
        "spearman": rhos,
        "kendall_tau": taus,
        "scored": [[score is not None for score in scores] for _, scores in prompts],
    }
    return [metric("reward", name, groups, seed) for name, groups in values.items()]


def pair_outcomes(human: list[float], scores: list[float | None]) -> list[bool | None]:
    """Return for each pair that people ordered: True as people did, False the other way, None a tie.

    A pair with a null score is False.
    """
    outcomes: list[bool | None] = []
    for a, b in combinations(range(len(human)), 2):
        if human[a] == human[b]:
            continue
        if scores[a] is None or scores[b] is None:
            outcomes.append(False)
        elif scores[a] == scores[b]:
            outcomes.append(None)
        else:
            outcomes.append((scores[a] > scores[b]) == (human[a] > human[b]))
    return outcomes


def tops_among_perfect(human: list[float], scores: list[float | None]) -> list[bool]:
    """Return for each reply with a perfect 5 whether people rank it top ("5-best")."""
    return [value == max(human) for value, score in zip(human, scores, strict=True) if score == BEST]


def exact_match(human: list[float], scores: list[float | None]) -> bool:
    """Tell whether the whole ranking is that of people: every pair in their order, their ties ties."""
    if any(score is None for score in scores):
        return False
    sign = lambda x: (x > 0) - (x < 0)  # noqa: E731
    return all(sign(human[a] - human[b]) == sign(scores[a] - scores[b]) for a, b in combinations(range(len(human)), 2))


def correlations(human: list[float], scores: list[float | None]) -> tuple[list[float], list[float]]:
    """Return Spearman's rho and Kendall's tau-b of one prompt, each as a list of at most one value.

    Scores that are all one tie count as 0. A prompt whose human ranking is all one tie, or with
    fewer than two scores, has none.
    """
    from scipy.stats import kendalltau, spearmanr

    known = [(h, s) for h, s in zip(human, scores, strict=True) if s is not None]
    if len({h for h, _ in known}) < 2:
        return [], []
    h, s = zip(*known, strict=True)
    if len(set(s)) < 2:
        return [0.0], [0.0]
    return [float(spearmanr(h, s).statistic)], [float(kendalltau(h, s).statistic)]


def longest_wins(prompts: Iterable[tuple[list[float], list[int]]], seed: int = 0) -> Row:
    """Return the share of pairs that "the longer reply is better" orders as people did, to read a judge against."""
    groups = [[o is True for o in pair_outcomes(human, [float(n) for n in lengths])] for human, lengths in prompts]
    return metric("reward", "longest_wins", groups, seed)
