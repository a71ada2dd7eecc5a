"""What a run learned: rules kept on held-out prompts, beside a control, and what that says in words."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from math import isclose
from pathlib import Path

from srlm_cli import records
from srlm_cli.errors import BadRow, OptionError
from srlm_cli.records import Record
from srlm_cli.report.collect import Round, Run, rows_of
from srlm_cli.report.words import LENGTH, SHARE, beyond_a_fifth, signed, value, with_interval

RESPONSES = "eval-rule-responses.jsonl"
Sums = dict[str, tuple[float, int]]  # by prompt: the sum of its results, and how many there are
LINES = {  # of the run itself: metric row of a round by name of the line
    "rules kept": ("rules", "rules_kept"),
    "judge, held-out pairs": ("reward", "pairwise_accuracy"),
    "longest wins": ("reward", "longest_wins"),
    "shortest wins": ("reward", "shortest_wins"),
}
CONTROL = "rules kept, control"


def lines(run: Run, control: Run | None) -> dict[str, list[Record | None]]:
    """Return the lines of a run, {name: a metric row or None per round}; {} without rules in two rounds.

    The control has a line of its own. Its rounds before its first training are those of the run.
    """
    if sum(bool(found.rules.row("rules_kept")) for found in run.rounds) < 2:
        return {}
    made = {name: [getattr(found, part).row(metric) for found in run.rounds] for name, (part, metric) in LINES.items()}
    if control:
        dealt = {found.name: found for found in control.rounds if found.training}
        kept = [dealt.get(found.name, found if not_later(found, dealt) else None) for found in run.rounds]
        made[CONTROL] = [found.rules.row("rules_kept") if found else None for found in kept]
    order = ["rules kept", CONTROL, *list(LINES)[1:]]
    return {name: made[name] for name in order if name in made and any(made[name])}


def not_later(found: Round, dealt: dict[str, Round]) -> bool:
    """Return whether a round comes before all rounds of the control that were trained."""
    return all(int(found.name[1:]) < int(name[1:]) for name in dealt)


def sentences(run: Run, control: Run | None, seed: int = 0) -> list[str]:
    """Return in words what was learned from M1 to the last model, and what was not; [] if it was not measured."""
    measured = [found for found in run.rounds if found.rules.row("rules_kept") and found.name != "M0"]
    if len(measured) < 2:
        return []
    first, last = measured[0], measured[-1]
    change = changed(last, first, seed)
    if not change:
        return []
    ends = " to ".join(value(found.rules.row("rules_kept"), SHARE) for found in (first, last))
    said = f"the rules kept on held-out prompts: {ends}, {in_points(change)}"
    if change["ci_low"] > 0:
        said = f"{last.name} keeps more rules than {first.name}; {said}"
    elif change["ci_high"] < 0:
        said = f"{last.name} keeps fewer rules than {first.name}; {said}"
    else:
        said = f"No change beyond chance from {first.name} to {last.name}: nothing was learned; {said}"
    return [
        f"{said}.",
        *against_control(change, first, last, control, seed),
        *of_judge(last),
        *of_length(run, first, last),
    ]


def against_control(change: Record, first: Round, last: Round, control: Run | None, seed: int) -> list[str]:
    """Return what the control, whose chosen and rejected were dealt at random, says about a change."""
    twin = next((found for found in control.rounds if found.name == last.name), None) if control else None
    dealt, apart = (changed(twin, first, seed), changed(last, twin, seed)) if twin else (None, None)
    if not dealt or not apart:
        return []
    said = f"The control, with chosen and rejected dealt at random, changed by {in_points(dealt)}"
    if apart["ci_low"] > 0 and change["ci_low"] > 0:
        return [f"{said}; {last.name} is above it by {in_points(apart)}, so the gain comes from the judgements."]
    if apart["ci_low"] > 0 or apart["ci_high"] < 0:
        where = "above" if apart["value"] > 0 else "below"
        return [f"{said}; {last.name} is {where} it, {in_points(apart)}."]
    return [
        f"{said}; {last.name} is not distinguishable from it, {in_points(apart)}, so no gain comes from the judgements."
    ]


def of_judge(last: Round) -> list[str]:
    """Return how the last judge orders held-out pairs, beside a comparison of lengths."""
    judge = last.reward.decided("pairwise_accuracy")
    lengths = [row for name in ("longest_wins", "shortest_wins") if (row := last.reward.row(name))]
    if not judge or not lengths:
        return []
    best = max([0.5, *(row["value"] for row in lengths)])
    sees = "more than chance and length" if judge["ci_low"] > best else "no more than chance or length can"
    beside = " and ".join(f"“{row['metric'].split('_')[0]} wins” {value(row, SHARE)}" for row in lengths)
    return [f"The judge of {last.name} orders {with_interval(judge, SHARE)} of the held-out pairs, {beside}: {sees}."]


def of_length(run: Run, first: Round, last: Round) -> list[str]:
    """Return how the length of the replies changed."""
    ratio = run.length_change(last, first)
    if not ratio:
        return []
    lengths = " and ".join(value(run.reply_length(found), LENGTH) for found in (last, first))
    warning = ", more than a fifth: read the figures with this in mind" if beyond_a_fifth(ratio) else ""
    return [f"Its replies are ×{ratio:.2f} as long as those of {first.name} ({lengths} characters){warning}."]


def in_points(change: Record) -> str:
    """Return a change of a share as `+12 points [+6 to +18]`."""
    middle, low, high = (signed(100 * change[name]) for name in ("value", "ci_low", "ci_high"))
    return f"{middle} points [{low} to {high}]"


def changed(now: Round, before: Round, seed: int) -> Record | None:
    """Return the change of the share of rules kept, with a bootstrap over the prompts that both models answered.

    None if the replies are not there, or do not have the rules that were measured.
    """
    import numpy as np

    from srlm_cli.stats.bootstrap import of_sums

    found = [results(one) for one in (now, before)]
    shared = [key for key in found[0] if key in found[1]] if all(found) else []
    if len(shared) < 2:
        return None
    columns = np.frombuffer(array("d", [part for key in shared for one in found for part in one[key]])).reshape(-1, 4)
    return of_sums(
        "rules", "change", columns, lambda s: s[..., 0] / s[..., 1] - s[..., 2] / s[..., 3], len(shared), seed
    )


def results(found: Round) -> Sums:
    """Return the results of a model's replies by prompt, {} if their share is not the one that was measured."""
    sums: Sums = {}
    try:
        for key, result in checked(found.folder / RESPONSES):
            total, count = sums.get(key, (0.0, 0))
            sums[key] = total + result, count + 1
    except (BadRow, OptionError):  # rules of functions, of another file, or that run code: no part of the replies
        return {}
    count = sum(count for _, count in sums.values())
    row = found.rules.row("rules_kept")
    whole = sum(total for total, _ in sums.values()) / count if count else None
    return sums if row and whole is not None and isclose(whole, row["value"], abs_tol=1e-9) else {}


def checked(path: Path) -> Iterator[tuple[str, float]]:
    """Yield the prompt id and the result of each rule in the field `rules` of each reply."""
    from srlm_cli.rules import check_reply, rules_of_row

    for row in rows_of(path, records.response_record):
        for result in check_reply(row, rules_of_row(row)).values():
            yield row["prompt_id"], float(result)
