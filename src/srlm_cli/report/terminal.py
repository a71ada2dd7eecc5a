"""The report in a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid

from srlm_cli.evaluate.health import USUAL_SCORES
from srlm_cli.records import Record
from srlm_cli.report import tables
from srlm_cli.report.collect import Run
from srlm_cli.report.findings import findings
from srlm_cli.report.learned import lines, sentences
from srlm_cli.report.samples import Sample, sample_pairs
from srlm_cli.report.tables import Cell, Table
from srlm_cli.report.words import SHARE, number, plain, value

BARS = " ▁▂▃▄▅▆▇█"
PAIRS = 1
SHORT = 200
BAR, WORDS = 40, 21  # characters of a bar of 100%, and of the name of a line


def show(run: Run, console: Console, pairs: int = PAIRS, seed: int = 0, control: Run | None = None) -> None:
    """Print the tables of a run, some pairs, all settings, the findings, and what was learned."""
    for line in run.unfinished:
        console.print(f"! {line}", soft_wrap=True)
    for table in (
        tables.stage_table(run),
        tables.training_table(run),
        health_with_scores(run),
        tables.reward_table(run),
        tables.calibration_table(run),
        tables.rules_table(run),
        tables.probe_table(run),
        tables.match_table(run),
        tables.rating_table(run),
        tables.length_table(run),
    ):
        if table.rows:
            console.print(grid(table))
    for found in run.rounds:
        for sample in sample_pairs(found, min(pairs, PAIRS), seed):
            print_lines(console, f"A pair of {found.name}", in_short(sample))
    print_lines(console, "Settings", [setting_line(name, values) for name, values in run.settings.items()])
    console.print(grid(tables.overview(run)))
    print_lines(console, "To notice", findings(run))
    if (learned := tables.learned_table(run, control)).rows:
        console.print(grid(learned))
        print_lines(console, "The same as bars, 0 to 100%", bars(run, control))
        print_lines(console, "In words", sentences(run, control, seed))


def bars(run: Run, control: Run | None) -> list[str]:
    """Return the lines of what was learned as bars, one per round."""
    made = []
    for name, rows in lines(run, control).items():
        for found, row in zip(run.rounds, rows, strict=True):
            width = round(8 * BAR * row["value"]) if row else 0
            text = "█" * (width // 8) + "▏▎▍▌▋▊▉"[width % 8 - 1 : width % 8 or -8]
            made.append(f"{name:<{WORDS}} {found.name:<3} {text:<{BAR}} {value(row, SHARE):>4}")
            name = ""
    return made


def health_with_scores(run: Run) -> Table:
    """Return the health table with a row of small bars for the scores."""
    table = tables.health_table(run)
    shares = [tables.score_shares(found) for found in run.rounds if found.health.totals]
    scores = sorted({*USUAL_SCORES, *(score for share in shares for score in share)})
    if any(shares):
        label = Cell(f"scores {scores[0]} to {scores[-1]}", note="shares in per cent")
        table.rows.append([label, *(Cell(histogram([share.get(score, 0.0) for score in scores])) for share in shares)])
    return table


def histogram(shares: list[float]) -> str:
    """Return shares as small bars, followed by per cent."""
    top = max(shares) or 1
    return "".join(BARS[round(8 * share / top)] for share in shares) + "  " + " ".join(f"{100 * s:.0f}" for s in shares)


def grid(table: Table) -> Grid:
    """Return a table for rich, with the notes in a last column."""
    made = Grid(title=table.title, title_justify="left", box=SIMPLE_HEAD, title_style="bold")
    noted = any(row[0].note for row in table.rows)
    for column in table.columns:
        words = column in tables.LEFT
        made.add_column(column, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    if noted:
        made.add_column("how to read it")
    for row in table.rows:
        made.add_row(*(printable(written(cell)) for cell in row), *([row[0].note] if noted else []))
    return made


def written(cell: Cell) -> str:
    """Return a cell as `42% [31–53]`."""
    return f"{cell.text} [{cell.interval}]" if cell.interval else cell.text


def in_short(sample: Sample) -> list[str]:
    """Return a pair as lines, one per text."""
    lines = [f"prompt    {one_line(sample.prompt)}"]
    for side in sample.sides:
        lines.append(f"{side.label:<9} {number(side.score)}  {one_line(side.text)}")
    return lines


def setting_line(name: str, values: Record) -> str:
    """Return the settings of a command as one line, without those that are not set."""
    return f"{name}: " + ", ".join(f"{key} {plain(value)}" for key, value in values.items() if value is not None)


def print_lines(console: Console, title: str, lines: list[str]) -> None:
    """Print lines under a title; print nothing if there are none."""
    if lines:
        console.print(title, style="bold")
        for line in lines:
            console.print(f"  {printable(line)}", soft_wrap=True)
        console.print()


def one_line(text: str, most: int = SHORT) -> str:
    """Return a text as one line, cut off at `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def printable(text: str) -> str:
    """Return a text without characters that could move the cursor of a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
