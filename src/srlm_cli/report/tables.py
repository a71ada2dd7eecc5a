"""The rounds of a run as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from srlm_cli.records import Row
from srlm_cli.report.collect import Round

BARS = " ▁▂▃▄▅▆▇█"


def show(rounds: list[Round], console: Console) -> None:
    """Print what each round did, how its judge scored, and how each model compares."""
    for table in (stages(rounds), judges(rounds), models(rounds)):
        if table.row_count:
            console.print(table)


def stages(rounds: list[Round]) -> Table:
    """Return the table of rows in and out, one line a stage."""
    table = _table("What each round did", "", "stage", "in>", "out>", "dropped, and more", "time>")
    for found in rounds:
        if found.training:
            table.add_row(found.name, found.training["command"], *_training(found.training))
        for stage, counts in found.stages.items():
            details = [f"{n} {reason}" for reason, n in counts["dropped"].items()]
            details += [f"{n} {name}" for name, n in counts["counts"].items() if name not in ("replies", "responses")]
            table.add_row(
                found.name,
                stage,
                str(counts["read"]),
                str(counts["kept"]),
                ", ".join(details),
                _seconds(counts["seconds"]),
            )
    return table


def judges(rounds: list[Round]) -> Table:
    """Return the table of the judges: on their own responses, and against people on held-out replies."""
    table = _table(
        "The judge of each round", "", "parse rate>", "finished>", "ties>", "scores 0..5", "mean>",
        "agrees with people>", "longest wins>",
    )  # fmt: skip
    for found in rounds:
        own = found.judging
        table.add_row(
            found.name,
            _share(own.get("parse_rate")),
            _share(own["readable"] - own["parse_rate"]) if own else "-",
            _share(own.get("tie_rate")),
            histogram(own["histogram"]) if own else "-",
            _number(own.get("mean")),
            _interval(found.metrics.get("pairwise_accuracy")),
            _interval(found.metrics.get("longest_wins")),
        )
    return table


def models(rounds: list[Round]) -> Table:
    """Return the table of the models: the pairs they made, win rates against the model before, lengths."""
    table = _table(
        "The model of each round", "", "pairs made>", "gap>", "chosen>", "rejected>", "against",
        "win>", "tie>", "loss>", "lean>", "first wins>", "length>", "theirs>",
    )  # fmt: skip
    for found in rounds:
        metrics = found.metrics
        if not found.pairs and "win" not in metrics:
            continue
        baseline = (metrics.get("win") or {}).get("baseline", "-")
        table.add_row(
            found.name,
            str(found.stages.get("pairs", {}).get("kept", "-")),
            _number(found.pairs.get("gap")),
            _number(found.pairs.get("chosen"), 0),
            _number(found.pairs.get("rejected"), 0),
            _model_name(baseline),
            *(_share(value_of(found, name)) for name in ("win", "tie", "loss", "lean", "first_position")),
            *(_number(value_of(found, name), 0) for name in ("length", "baseline_length")),
        )
    return table


def value_of(found: Round, name: str) -> float | None:
    """Return the value of a round's metric, or None."""
    return found.metrics[name]["value"] if name in found.metrics else None


def histogram(counts: dict[int, int]) -> str:
    """Return counts of the scores 0..5 as six bars and six numbers."""
    values = [counts.get(score, 0) for score in range(6)]
    top = max(values) or 1
    return "".join(BARS[round(8 * value / top)] for value in values) + "  " + " ".join(map(str, values))


def _training(made: dict[str, Any]) -> tuple[str, str, str, str]:
    data = made["data"]
    details = [f"{made['steps']} steps", f"loss {made['first_loss']:.3f} to {made['last_loss']:.3f}"]
    details += [f"{data['truncated']} truncated"] if data["truncated"] else []
    details += [f"margin {made['margin']:.3f}"] if "margin" in made else []
    return str(data["rows"] + data["left_out"]), str(data["rows"]), ", ".join(details), _seconds(made["seconds"])


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, title_style="bold")
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left")
    return table


def _model_name(path: str) -> str:
    return path.removesuffix("/model").rsplit("/", 1)[-1].replace("smollm2-135m-instruct", "M0")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(metric: Row | None) -> str:
    if not metric or metric["value"] is None:
        return "-"
    return f"{_share(metric['value'])} [{100 * metric['ci_low']:.0f}-{100 * metric['ci_high']:.0f}]"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s"
