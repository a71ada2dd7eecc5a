"""The report as one HTML page, without scripts or external files, for light and dark colour schemes."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from srlm_cli import __version__
from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.records import Record
from srlm_cli.report import plots, tables, words
from srlm_cli.report.collect import Round, Run
from srlm_cli.report.findings import findings
from srlm_cli.report.learned import sentences
from srlm_cli.report.samples import sample_matches, sample_pairs
from srlm_cli.streams.writer import replace_text

BEGIN = "<!doctype html>"
UNREADABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")  # not allowed in HTML


def render(run: Run, pairs: int, seed: int, control: Run | None = None) -> str:
    """Return the page; the same runs, `pairs` and `seed` give the same text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("srlm_cli.report").joinpath("page.html").read_text(encoding="utf-8"))
    html = template.render(
        run=run,
        version=__version__,
        findings=findings(run),
        learned=tables.learned_table(run, control),
        learned_plot=Markup(plots.learned_plot(run, control)),
        sentences=sentences(run, control, seed),
        stages=tables.stages(run),
        units=words.STAGE_UNITS,
        clock=words.clock,
        seconds=total_seconds(run),
        tables={name: getattr(tables, f"{name}_table")(run) for name in TABLES} | {"overview": tables.overview(run)},
        plots={name: Markup(getattr(plots, f"{name}_plot")(run)) for name in PLOTS},
        curves=[Markup(plot) for plot in plots.curve_plots(run)],
        number=words.number,
        left=tables.LEFT,
        pairs=[(found, sample_pairs(found, pairs, seed)) for found in run.rounds],
        matches=[(found, sample_matches(run, found, pairs, seed)) for found in run.rounds],
        seed=seed,
        settings=settings_of(run),
        made=[
            (found, made_model(found), [made_file(name, meta) for name, meta in found.files.items()])
            for found in run.rounds
        ],
    )
    return UNREADABLE.sub("\ufffd", html).encode("utf-8", "replace").decode()


TABLES = (
    "health",
    "reward",
    "calibration",
    "reply_count",
    "probe",
    "rules",
    "match",
    "criterion",
    "category",
    "rating",
    "length",
    "training",
)
PLOTS = ("judge", "calibration", "score", "rules", "match", "length", "pair")


def total_seconds(run: Run) -> float:
    """Return the seconds that all files and models of a run took."""
    counts = [meta.get("counts", {}) for found in run.rounds for meta in found.files.values()]
    return sum(one.get("seconds") or 0 for one in [*counts, *(found.training for found in run.rounds)])


def settings_of(run: Run) -> dict[str, list[tuple[str, str]]]:
    """Return the settings of each command as names and texts."""
    return {name: flat(values) for name, values in run.settings.items()}


def made_model(found: Round) -> dict[str, Any]:
    """Return the provenance of a round's model: its command line, and the other fields by name."""
    rest = {key: value for key, value in found.training.items() if key not in ("argv", "command")}
    return {"command": command_line(found.training), "fields": flat(rest)} if rest else {}


def made_file(name: str, meta: Record) -> dict[str, Any]:
    """Return the provenance of a file, without its checkpoint, which repeats the counts."""
    rest = {key: value for key, value in meta.items() if key not in ("argv", "command", "checkpoint")}
    return {"name": name, "command": command_line(meta), "fields": flat(rest)}


def command_line(meta: Record) -> str:
    """Return the command line of a file or a model, quoted for a shell."""
    import shlex

    return shlex.join(["srlm", *map(str, meta.get("argv", [meta.get("command", "")]))])


def flat(values: Record, before: str = "") -> list[tuple[str, str]]:
    """Return the fields of an object as (name, text); names of nested fields are joined by dots."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += flat(value, f"{before}{key}.")
        else:
            lines.append((f"{before}{key}", words.plain(value)))
    return lines


def write(html: str, path: str) -> None:
    """Write the page atomically; raise an error of one line if this fails, or if the file is not a page."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise OptionError(f"{path} is a folder", "--html takes a file")
    try:
        if target.exists() and not target.is_file():  # a device or a named pipe
            target.write_text(html, encoding="utf-8")
            return
        if target.exists() and not is_page(target):
            raise OptionError(f"{path} exists and is not a page made by srlm", "--html another file, or remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, html)
    except OSError as error:
        hint = "--html FILE writes the page elsewhere, --no-html leaves it out"
        raise SrlmError(f"{path}: {error.strerror or error}", hint) from error


def is_page(path: Path) -> bool:
    """Return whether a file is empty or an HTML page."""
    with open(path, "rb") as file:
        begin = file.read(len(BEGIN))
    return not begin or begin.lower() == BEGIN.encode()
