"""The counts of a command."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from srlm_cli.stages import Outcome
from srlm_cli.streams.console import clock


@dataclass
class Tally:
    """The counts of a command so far, for the summary line and FILE.meta.json."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self.read += outcome.read
        self.kept += len(outcome.rows)
        for total, some in ((self.dropped, outcome.dropped), (self.counts, outcome.counts)):
            for name, count in some.items():  # Counter.update is ten times slower, and this runs per row
                total[name] += count
        self.tokens_in += outcome.tokens_in
        self.tokens_out += outcome.tokens_out

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON takes them."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "counts": {name: count for name, count in self.counts.items() if count},
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "seconds": round(self.seconds, 3),
        }

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Tally:
        """Return the tally that `as_dict` saved."""
        return cls(**{**saved, "dropped": Counter(saved["dropped"]), "counts": Counter(saved["counts"])})

    def summary(self, kept: str = "written") -> str:
        """Return the figures in one line for people; `kept` is the word for the rows that were made."""
        parts = [f"{self.read} read", f"{self.kept} {kept}"]
        parts += [f"{count} dropped: {reason}" for reason, count in self.dropped.most_common()]
        parts += [f"{count} {name}" for name, count in self.counts.items() if count]
        if self.tokens_out:
            rate = self.tokens_out / self.seconds if self.seconds else 0.0
            parts.append(f"{self.tokens_in} tokens in, {self.tokens_out} out ({rate:.0f}/s)")
        return ", ".join(parts) + f"; {clock(self.seconds)}"

    def speed(self) -> str:
        """Return the figure to show beside the progress."""
        return f"{self.tokens_out / self.seconds:.0f} tokens/s" if self.tokens_out and self.seconds else ""
