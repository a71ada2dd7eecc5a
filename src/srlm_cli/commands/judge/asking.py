"""Run a mode that asks a model: its engine, the fingerprint of its rows, and the messages at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from srlm_cli.commands.judge.asked import Asked
from srlm_cli.commands.judge.limit import too_many_unparsed
from srlm_cli.commands.judge.rows import judge_of, judges_itself, of_one_writer, open_judgeable
from srlm_cli.engines import LazyEngine
from srlm_cli.records import Record
from srlm_cli.runner.provenance import model_identity
from srlm_cli.runner.stage import Resumed, StageRun, warn_of_thoughts
from srlm_cli.stages import Outcome
from srlm_cli.stages.judge import JudgeOptions
from srlm_cli.stages.rules import with_rules
from srlm_cli.streams.console import say
from srlm_cli.streams.reader import Reader
from srlm_cli.templates import Template

Rules = Callable[[Iterable[Outcome]], Iterator[Outcome]]
Make = Callable[[Iterable[Record], Resumed], Iterator[Outcome]]


def opened(asked: Asked, form: Template) -> tuple[Reader, LazyEngine, JudgeOptions, Rules]:
    """Return the rows, the judge, how it is asked, and what combines its scores with rules."""
    rules = asked.rule_options(form)
    rows = open_judgeable(asked, form, rules)
    found = asked.search.open()
    model = LazyEngine(judge_of(asked, rows))
    options = asked.options(form, model.spec, rows, found)
    return rows, model, options, partial(with_rules, options=rules) if rules else iter


def run_asking(
    asked: Asked, rows: Reader, model: LazyEngine, decides: dict[str, Any], make: Make, counted: str = "judgements"
) -> None:
    """Judge the rows by what `make` returns for them; `counted` is the name of a judgement in the counts."""
    own = judges_itself(asked, rows)
    whole = decides | model_identity(model.spec) if rows.peek() else {}

    def work(rows: Iterable[Record], done: Resumed) -> Iterator[Outcome]:
        return make(of_one_writer(rows, model.spec.model) if own else rows, done)

    tally = StageRun("judge", asked.stream, rows, whole, engine=model).run(work, asked.limit(counted))
    if asked.stream.quiet:
        return
    if too_many_unparsed(tally, 0.5, counted):
        say("; ".join(filter(None, [f"srlm judge: most {counted} cannot be read", asked.remedy(tally, counted)])))
    warn_of_thoughts("judge", tally, asked.sampling, model)
    if low := tally.counts["low score mass"]:
        say(f"srlm judge: {low} scores are null: the scores had too little probability (`score_mass`)")
