"""`--show`: the judge's prompts of the first rows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from srlm_cli.commands.judge.asked import Asked
from srlm_cli.commands.judge.asking import opened
from srlm_cli.commands.judge.rows import open_judgeable
from srlm_cli.engines import LazyEngine
from srlm_cli.engines.base import EngineSpec, Sampling
from srlm_cli.options.judging import closing
from srlm_cli.runner.inputs import finished
from srlm_cli.stages import judge as stage
from srlm_cli.streams.reader import Reader
from srlm_cli.templates import Template


def run(asked: Asked, form: Template) -> None:
    """Print the prompts; a model runs only if it writes the queries for passages."""
    if asked.search.asks_model:
        rows, model, options, _ = opened(asked, form)
    else:
        rows = open_judgeable(asked, form, asked.rule_options(form))
        model = LazyEngine(EngineSpec("echo"))
        options = stage.JudgeOptions(
            form, 1, Sampling(), asked.sampling.seed, score=asked.judging.score, system=asked.judging.system,
            evidence=asked.search.open(), last_turn=asked.judging.last_turn,
        )  # fmt: skip
    if asked.kind.together:
        show(rows, islice(asked.kind.prompts_shown(finished(rows), options), asked.judging.show))
        return
    first = ((row, rows.at) for row in islice(finished(rows), asked.judging.show))
    show(rows, closing(stage.prompts_shown(first, model, options), options.evidence))


def show(rows: Reader, texts: Iterable[str]) -> None:
    """Print texts that are made of rows; raise the error that the rows ended with."""
    for text in texts:
        print(text, end="")
    if rows.error:
        raise rows.error
