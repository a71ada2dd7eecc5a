"""Words for people: everything on stderr, nothing ever on stdout."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from srlm_cli import distributed
from srlm_cli.redact import redacted

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0
SECONDS_TO_ESTIMATE = 5.0
ROWS_TO_ESTIMATE = 10


def say(text: str) -> None:
    """Print one line on stderr, without the secrets in it; a closed stderr is nobody's error.

    Of the processes of one training only the main one speaks.
    """
    if not distributed.is_main():
        return
    try:
        print(redacted(text), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def console() -> Console:
    """Return a rich console on stderr; NO_COLOR is honoured by rich."""
    from rich.console import Console

    return Console(stderr=True)


class Progress:
    """Show progress: a rich bar on a terminal, otherwise a plain line every few seconds."""

    def __init__(self, name: str, total: int | None, done: int, quiet: bool, unit: str = "rows") -> None:
        self.name, self.total, self.done = name, total, done
        self.quiet = quiet or not distributed.is_main()
        self.first = done
        self.unit = unit
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if not self.quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._open_bar()

    def advance(self, count: int, note: str = "") -> None:
        """Add finished rows; `note` is a short figure to show beside them."""
        self.done += count
        if self.bar:
            self.bar.update(self.task, completed=self.done, note=note)
        elif not self.quiet and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            say(f"srlm {self.name}: {self.line()}{', ' + note if note else ''}")

    def line(self) -> str:
        """Return `done/total, rate, time left` in plain words."""
        seconds = time.monotonic() - self.started
        rate = (self.done - self.first) / seconds if seconds else 0.0
        text = f"{self.done}{f'/{self.total}' if self.total else ''} {self.unit}, {rate:.2f} {self.unit}/s"
        if self.can_estimate() and rate and self.total >= self.done:
            text += f", {clock((self.total - self.done) / rate)} left"
        return text

    def can_estimate(self) -> bool:
        """Return whether the time left can be shown: some seconds, and 10 rows or half of all, have passed."""
        if not self.total or time.monotonic() - self.started < SECONDS_TO_ESTIMATE:
            return False
        return self.done - self.first >= min(ROWS_TO_ESTIMATE, (self.total - self.first) / 2)

    def close(self) -> None:
        """Take the bar off the screen's care."""
        if self.bar:
            self.bar.stop()

    def _open_bar(self) -> None:
        from rich import progress as parts
        from rich.text import Text

        class TimeLeft(parts.TimeRemainingColumn):
            def render(column, task: parts.Task) -> Text:  # noqa: N805 - `self` is the progress
                return super().render(task) if self.can_estimate() else Text("-:--:--", "progress.remaining")

        self.bar = parts.Progress(
            parts.TextColumn("{task.description}"),
            parts.BarColumn(),
            parts.MofNCompleteColumn(),
            parts.TimeElapsedColumn(),
            TimeLeft(),
            parts.TextColumn("{task.fields[note]}", markup=False),
            console=console(),
        )
        self.task = self.bar.add_task(f"srlm {self.name}", total=self.total, completed=self.done, note="")
        self.bar.start()


@contextmanager
def progress(name: str, total: int | None, *, done: int = 0, quiet: bool = False) -> Iterator[Progress]:
    """Show the progress of a command while the block runs."""
    shown = Progress(name, total, done, quiet)
    try:
        yield shown
    finally:
        shown.close()


def clock(seconds: float) -> str:
    """Return seconds as `1h02m`, `3m05s` or `12s`."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
