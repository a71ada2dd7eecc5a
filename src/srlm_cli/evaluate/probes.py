"""How often a judge prefers a reply that was changed and got no better, by probe (`stages.probes`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from srlm_cli.errors import LimitExceeded
from srlm_cli.records import Record
from srlm_cli.stats.bootstrap import measured


@dataclass(frozen=True)
class Probed:
    """The changed replies to one prompt: their probes, and the scores before and after, None if unreadable."""

    probes: list[str]
    before: list[float | None]
    after: list[float | None]


def probed(row: Record) -> Probed:
    """Return a row of `stages.probes` as numbers."""
    return Probed([row["probe"]], [row["score_before"]], [row["score"]])


def probe_metrics(prompts: Iterable[Probed], names: Iterable[str], judge: str | None, seed: int = 0) -> list[Record]:
    """Return `changed_wins`, `changed_ties` and `score_change` of each probe and, last, of all together.

    `changed_wins` is the share of the changed replies whose score is above that of the reply as it was. Replies with an
    unreadable score are left out; `scored_rate` is the share of the others. Intervals: bootstrap over prompts.
    """
    rows = []
    for name in [*names, None]:

        def pairs(one: Probed, name: str | None = name) -> Iterator[tuple[float, float]]:
            for probe, before, after in zip(one.probes, one.before, one.after, strict=True):
                if name in (probe, None) and before is not None and after is not None:
                    yield before, after

        def known(one: Probed, name: str | None = name) -> list[bool]:
            found = zip(one.probes, one.before, one.after, strict=True)
            return [None not in (before, after) for probe, before, after in found if name in (probe, None)]

        values = {
            "changed_wins": lambda one: [after > before for before, after in pairs(one)],
            "changed_ties": lambda one: [after == before for before, after in pairs(one)],
            "score_change": lambda one: [after - before for before, after in pairs(one)],
            "scored_rate": known,
        }
        part = {"probe": name} if name else {}
        rows += [{**row, **part, "model": judge} for row in measured("probe", prompts, values, seed)]
    return rows


def over_limit(rows: list[Record], most: float) -> LimitExceeded | None:
    """Return an error that names the probes which win more often than `most`."""
    wins = {
        row["probe"]: row["value"]
        for row in rows
        if row["metric"] == "changed_wins" and "probe" in row and row["value"] is not None
    }
    found = [f"{name} {value:.0%}" for name, value in wins.items() if value > most]
    if not found:
        return None
    return LimitExceeded(
        f"the judge prefers replies that got no better: {', '.join(found)} of the comparisons, above "
        f"--max-probe-wins {most:g}",
        '--max-probe-wins in ["eval probe"] changes the limit',
    )
