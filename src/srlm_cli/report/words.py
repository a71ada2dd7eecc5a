"""The labels of metrics in the report, and the format of its figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from srlm_cli.records import Record

SHARE, NUMBER, LENGTH, SIGNED, RATIO, RATING = "share", "number", "length", "signed", "ratio", "rating"
NONE = "–"


@dataclass(frozen=True)
class Known:
    """The label of a metric, the format of its value, and a note on how to read it."""

    label: str
    kind: str
    note: str = ""


HEALTH = {
    "parse_rate": Known("parse rate", SHARE, "judgements whose score the judge wrote itself"),
    "forced_score_rate": Known(
        "forced scores", SHARE, "judgements without a score, for which the judge then chose one"
    ),
    "cut_off": Known("cut off", SHARE, "judgements that reached the token limit"),
    "mean_score": Known("mean score", NUMBER, "of 0 to 5"),
    "top_score_share": Known("commonest score", SHARE, "its share; near 100% the judge does not distinguish responses"),
    "tie_rate": Known("tie rate", SHARE, "pairs of responses to one prompt with equal scores"),
    "tied_prompts": Known("tied prompts", SHARE, "prompts whose responses all have the same score: no pair"),
    "score_std_within_k": Known("std within K", NUMBER, "standard deviation of the K scores of one response"),
    "gap": Known("score gap", NUMBER, "best minus worst response of a prompt"),
    "gap_change": Known("change of the gap", SIGNED, "since the previous round"),
    "length": Known("response length", LENGTH, "characters, mean"),
    "length_growth": Known("length growth", RATIO, "times the length of the previous round"),
    "score_length_spearman": Known(
        "score with length", SIGNED, "rank correlation within a prompt; above 0: longer scores higher"
    ),
    "score_length_spearman_overall": Known("score with length, all", SIGNED, "the same over all responses"),
    "longest_agreement": Known("longer scores higher", SHARE, "of the pairs that differ in both; 50%: no preference"),
    "accuracy": Known("accuracy", SHARE, "pairs of ranked replies ordered as people did"),
    "accuracy_change": Known("change of accuracy", SIGNED, "since the previous round"),
}

REWARD = {
    "pairwise_accuracy": Known("pairwise accuracy", SHARE, "pairs of replies ordered as people did; a tie is a miss"),
    "pairwise_accuracy_without_ties": Known("without ties", SHARE, "the same over pairs without a tie of the judge"),
    "pairwise_accuracy_ties_half": Known("ties as halves", SHARE, "the same, with a tie as half right"),
    "tie_rate": Known("tie rate", SHARE, "pairs to which the judge gives equal scores"),
    "best_of_n": Known("best of n", SHARE, "prompts whose highest score is on the reply that people rank first"),
    "5_best": Known("5-best", SHARE, "replies with a perfect score that people rank first"),
    "exact_match": Known("exact match", SHARE, "prompts ranked exactly as people did"),
    "spearman": Known("Spearman", SIGNED, "rank correlation with people within a prompt"),
    "kendall_tau": Known("Kendall tau-b", SIGNED, "the same, by pairs"),
    "scored_rate": Known("scored", SHARE, "replies with a readable score"),
    "weighted_kappa": Known("weighted kappa", SIGNED, "agreement with people's scores beyond chance"),
    "ties_score": Known("ties score", SHARE, "RewardBench 2, prompts with several right answers"),
    "self_preference": Known("own replies preferred", SHARE, "over equally good ones of others; 50%: no preference"),
    "longest_wins": Known("longest wins", SHARE, "accuracy of “the longer reply wins” on these pairs"),
    "shortest_wins": Known("shortest wins", SHARE, "accuracy of “the shorter reply wins”"),
    "random": Known("random", SHARE, "accuracy of random scores, one draw"),
    "pairwise_accuracy_matched_length": Known("accuracy, equal length", SHARE, "over pairs of similar length"),
    "pairwise_accuracy_matched_length_without_ties": Known("equal length, without ties", SHARE),
    "longest_wins_matched_length": Known("longest wins, equal length", SHARE),
}

RULES = {
    "rules_kept": Known("rules kept", SHARE, "of all rules of the held-out prompts"),
    "all_rules_kept": Known("all rules kept", SHARE, "replies that keep every rule of their prompt"),
    "length": Known("reply length", LENGTH, "characters, mean"),
}

PROBES = {"changed_wins": Known("changed reply wins", SHARE)}

MATCHES = {
    "win": Known("win", SHARE, "wins in both orders of the two replies"),
    "tie": Known("tie", SHARE, "the two orders disagree, or both are a tie"),
    "loss": Known("loss", SHARE),
    "win_rate": Known("win rate", SHARE, "a tie is half a win"),
    "length_controlled_win_rate": Known("win rate at equal length", SHARE, "by a regression on the length difference"),
    "preference_rate": Known("preference rate", SHARE, "matches won by the mean probability over both orders"),
    "first_position": Known("first wins", SHARE, "verdicts for the reply shown first; 50%: no position bias"),
    "length": Known("reply length", LENGTH, "characters, mean"),
    "baseline_length": Known("other model's length", LENGTH, "characters, mean"),
}

STAGE_UNITS = {
    "eft": ("ranked rows", "EFT rows"),
    "prompts": ("tries", "prompts"),
    "responses": ("prompts", "responses"),
    "judged": ("responses", "judged"),
    "pairs": ("judged", "pairs"),
}


def known(names: dict[str, Known], metric: str) -> Known:
    """Return the label, kind and note of a metric; an unknown metric has only its name."""
    return names.get(metric) or Known(metric.replace("_", " "), NUMBER)


def value(row: Record | None, kind: str) -> str:
    """Return a metric's value as text, a dash if there is none."""
    return NONE if not row or row.get("value") is None else _written(row["value"], kind, _fine(row))


def interval(row: Record | None, kind: str) -> str:
    """Return a metric's 95% interval as `31–53`, or an empty text."""
    if not row or row.get("ci_low") is None or row.get("value") is None:
        return ""
    low, high = (_written(row[end], kind, _fine(row)).strip("×%") for end in ("ci_low", "ci_high"))
    return f"{low} to {high}" if low[0] in "−+" else f"{low}–{high}"


def with_interval(row: Record | None, kind: str) -> str:
    """Return `42% [31–53]`."""
    bounds = interval(row, kind)
    return f"{value(row, kind)} [{bounds}]" if bounds else value(row, kind)


def share(number: float | None) -> str:
    """Return a share as per cent."""
    return NONE if number is None else _written(number, SHARE)


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with this many decimals."""
    return NONE if value is None else f"{value:.{digits}f}".replace("-", "−")


def beyond_a_fifth(ratio: float) -> bool:
    """Return whether a length fell or rose by more than a fifth."""
    return not 0.8 <= ratio <= 1.2


def signed(value: float) -> str:
    """Return a whole number with its sign; 0 has none."""
    number = round(value)
    return f"{number:+d}".replace("-", "−") if number else "0"


def clock(seconds: float | None) -> str:
    """Return a duration in seconds as text."""
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plain(value: Any) -> str:
    """Return a setting as text."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _fine(row: Record) -> bool:
    """Return whether an interval is so narrow that one more digit is useful."""
    return row.get("ci_low") is not None and 0 < row["ci_high"] - row["ci_low"] < 0.04


def _written(value: float, kind: str, fine: bool = False) -> str:
    if kind == SHARE:
        return f"{100 * value:.{int(fine)}f}%"
    text = {NUMBER: f"{value:.2f}", LENGTH: f"{value:.0f}", RATIO: f"×{value:.2f}", RATING: f"{value:+.0f}"}.get(kind)
    return (text or f"{value:+.2f}").replace("-", "−")
