"""The time left is shown when it means something."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from srlm_cli.streams import console
from srlm_cli.streams.console import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("total", "done", "count", "seconds", "shown"),
    [
        (2568, 0, 1, 25.0, False),
        (2568, 0, 9, 25.0, False),
        (2568, 0, 10, 25.0, True),
        (2568, 0, 10, 1.0, False),
        (2568, 500, 1, 25.0, False),
        (300, 0, 9, 25.0, False),
        (300, 0, 10, 25.0, True),
        (14, 0, 6, 25.0, False),
        (14, 0, 7, 25.0, True),
        (3, 0, 1, 25.0, False),
        (3, 0, 2, 25.0, True),
        (300, 295, 2, 25.0, False),
        (300, 295, 3, 25.0, True),
        (None, 0, 50, 25.0, False),
    ],
)
def test_the_time_left_is_shown_after_enough_rows_and_seconds(
    total: int | None, done: int, count: int, seconds: float, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", screen := Terminal())
    monkeypatch.setattr(console, "console", lambda: Console(file=screen, force_terminal=True, width=120))
    one = Progress("judge", total, done, quiet=False)
    one.started -= seconds
    one.advance(count)
    assert ("left" in one.line()) is shown
    one.bar.stop()
    [column] = [column for column in one.bar.columns if type(column).__name__ == "TimeLeft"]
    [task] = one.bar.tasks
    if task.total:
        task.finished_time, column.elapsed_when_finished = seconds, True
        assert (column.render(task).plain != "-:--:--") is shown
