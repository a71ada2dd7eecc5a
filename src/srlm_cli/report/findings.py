"""Findings that follow from the figures of a run and their intervals, without arbitrary limits."""

from __future__ import annotations

from collections.abc import Callable

from srlm_cli.report.collect import Round, Run
from srlm_cli.report.words import LENGTH, REWARD, SHARE, beyond_a_fifth, value, with_interval

Finding = tuple[str, str]  # the finding, and the round


def findings(run: Run) -> list[str]:
    """Return one sentence per finding, with the rounds in which it is true."""
    checks: tuple[Callable[[Run, Round], Finding | None], ...] = (
        agreement,
        against_length,
        position,
        winner,
        longer,
        other_length,
        more_rules,
        control,
    )
    found: dict[str, list[str]] = {}
    for check in checks:
        for one in run.rounds:
            if finding := check(run, one):
                found.setdefault(finding[0], []).append(finding[1])
    return [f"{what}: {', '.join(whose)}." for what, whose in found.items()]


def agreement(run: Run, found: Round) -> Finding | None:
    """Return whether the judge's agreement with people differs from chance."""
    names = ("pairwise_accuracy_ties_half", "pairwise_accuracy_without_ties")
    row = next((row for name in names if (row := found.reward.decided(name))), None)
    if not row or row["ci_low"] > 0.5:
        return None
    order = "order pairs against people" if row["ci_high"] < 0.5 else "are not distinguishable from chance"
    what = f"Judges that {order} (accuracy, {REWARD[row['metric']].label})"
    return what, f"{found.name} {with_interval(row, SHARE)}"


def against_length(run: Run, found: Round) -> Finding | None:
    """Return whether "the longest reply wins" agrees with people better than the judge."""
    judge, longest = found.reward.row("pairwise_accuracy"), found.reward.row("longest_wins")
    if not judge or not longest or longest["value"] <= judge["value"]:
        return None
    what = "“The longest reply wins” orders more pairs as people did than the judge"
    return what, f"{found.name} {value(longest, SHARE)} against {value(judge, SHARE)}"


def position(run: Run, found: Round) -> Finding | None:
    """Return whether the pairwise judge prefers a position; where both orders disagree, a match is a tie."""
    row = found.matches.decided("first_position")
    if not row or row["ci_low"] <= 0.5 <= row["ci_high"]:
        return None
    place, part = ("first", row["value"]) if row["value"] > 0.5 else ("second", 1 - row["value"])
    return f"Judges that prefer the reply shown {place}", f"{found.name} {100 * part:.0f}% of its verdicts"


def winner(run: Run, found: Round) -> Finding | None:
    """Return whether a model is better or worse than the previous one."""
    row = found.matches.decided("win_rate")
    if not row:
        return None
    whose = f"{found.name} vs {run.model(row.get('baseline'))} {with_interval(row, SHARE)}"
    if row["ci_low"] > 0.5:
        return "Better than the previous model (win rate)", whose
    if row["ci_high"] < 0.5:
        return "Worse than the previous model (win rate)", whose
    return "Not distinguishable from the previous model (win rate)", whose


def longer(run: Run, found: Round) -> Finding | None:
    """Return whether replies to the same prompts grew or shrank beyond both intervals."""
    mine, theirs = found.matches.decided("length"), found.matches.decided("baseline_length")
    if not mine or not theirs or (mine["ci_low"] <= theirs["ci_high"] and theirs["ci_low"] <= mine["ci_high"]):
        return None
    word = "Longer" if mine["value"] > theirs["value"] else "Shorter"
    return (
        f"{word} replies than the previous model (characters)",
        f"{found.name} {value(mine, LENGTH)} against {value(theirs, LENGTH)}",
    )


def control(run: Run, found: Round) -> Finding | None:
    """Return whether the labels of a round's pairs were shuffled, so that nothing can be learned from them."""
    count, shuffled = found.pairs.get("count"), found.pairs.get("shuffled")
    if not shuffled:
        return None
    return (
        "A control: chosen and rejected dealt at random (--shuffle-labels)",
        f"{found.name}, {shuffled} of {count} pairs",
    )


def other_length(run: Run, found: Round) -> Finding | None:
    """Return whether replies are more than a fifth longer or shorter than those of M1, or of the model before.

    M1 itself is not compared: fine-tuning on IFT is meant to change how long replies are.
    """
    at = run.rounds.index(found)
    earlier = {one.name: one for one in (run.rounds[at - 1], *run.rounds[:at]) if at and one.name != "M0"}
    nearest = [name for name in earlier if name in ("M1", run.rounds[at - 1].name)]
    changes = {name: run.length_change(found, earlier[name]) for name in nearest}
    large = [f"×{ratio:.2f} of {name}" for name, ratio in changes.items() if ratio and beyond_a_fifth(ratio)]
    what = "Reply lengths that changed by more than a fifth; read the other figures with this in mind"
    return (what, f"{found.name} {' and '.join(large)}") if large else None


def more_rules(run: Run, found: Round) -> Finding | None:
    """Return whether a model keeps more or fewer rules of held-out prompts than the previous one, by both intervals."""
    before = run.before(found)
    mine, theirs = found.rules.decided("rules_kept"), before and before.rules.decided("rules_kept")
    if not mine or not theirs:
        return None
    whose = f"{found.name} {value(mine, SHARE)} against {value(theirs, SHARE)}"
    if mine["ci_low"] > theirs["ci_high"]:
        return "More rules kept than by the previous model (held-out prompts)", whose
    if mine["ci_high"] < theirs["ci_low"]:
        return "Fewer rules kept than by the previous model (held-out prompts)", whose
    return "Rules kept: not distinguishable from the previous model (held-out prompts)", whose
