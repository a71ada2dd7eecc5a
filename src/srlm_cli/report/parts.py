"""The parts of a round that `make iterate SMALL=N` cuts its prompts in, shown as one round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from srlm_cli.records import Record

Figures = dict[str, Any]
LAST = ("margin", "accuracy", "last_loss")  # of the last part that was trained
TOTALS = ("steps", "seconds")


def part_folders(folder: Path, settings: dict[str, Figures]) -> list[Path]:
    """Return the folders of a round's parts that exist, as many as the run's settings say; those of others are old."""
    count = str(settings.get("SMALL", {}).get("value") or 1)
    parts = [folder / f"part-{number}" for number in range(1, int(count) + 1)] if count.isdecimal() else []
    return [part for part in parts if len(parts) > 1 and part.is_dir()]


def joined_counts(parts: Iterable[dict[str, Figures]], stages: Iterable[str]) -> dict[str, Figures]:
    """Return the counts of each stage over all parts, with the number of parts that have it."""
    parts = list(parts)
    found = {stage: [part[stage] for part in parts if stage in part] for stage in stages}
    return {stage: summed(some) for stage, some in found.items() if some}


def summed(counts: list[Figures]) -> Figures:
    """Return the sums of the counts of one stage, reason by reason."""
    made: Figures = {
        name: sum(one.get(name) or 0 for one in counts) for name in ("read", "kept", "tokens_out", "seconds")
    }
    for name in ("dropped", "counts"):
        total: Counter[str] = Counter()
        for one in counts:
            total.update(one[name])
        made[name] = dict(total)
    made["counts"]["parts"] = len(counts)
    return made


def joined_training(trainings: list[Record]) -> Record:
    """Return the trainings of all parts as the one of the last: rows and steps are summed, it starts as the first."""
    first, last = trainings[0], trainings[-1]
    if not all(trainings):
        return last
    made = {**last, "from": first.get("from", {}), "parts": len(trainings)}
    made["data"] = of_each(trainings, "data", lambda name: max if name == "longest" else sum)
    made |= {name: sum(one.get(name) or 0 for one in trainings) for name in TOTALS}
    made |= {name: values[-1] for name in LAST if (values := known(trainings, name))}
    made["first_loss"] = next(iter(known(trainings, "first_loss")), None)
    tokens = sum((one.get("tokens_per_second") or 0) * (one.get("seconds") or 0) for one in trainings)
    return {**made, "tokens_per_second": tokens / made["seconds"] if made["seconds"] else None}


def of_each(trainings: list[Record], name: str, how: Callable[[str], Callable]) -> Figures:
    """Return the whole numbers in an object of all trainings, each joined as `how` says."""
    found: dict[str, list[int]] = {}
    for one in trainings:
        for key, value in one.get(name, {}).items():
            if isinstance(value, int):
                found.setdefault(key, []).append(value)
    return {key: how(key)(values) for key, values in found.items()}


def known(trainings: list[Record], name: str) -> list[float]:
    """Return a figure of those trainings that have it."""
    return [one[name] for one in trainings if one.get(name) is not None]


def joined_steps(parts: list[list[Record]]) -> list[Record]:
    """Return the logged steps of all parts, counted on from one to the next."""
    made: list[Record] = []
    for steps in parts:
        before = made[-1]["step"] if made else 0
        made += [{**row, "step": before + row.get("step", at)} for at, row in enumerate(steps, 1)]
    return made
