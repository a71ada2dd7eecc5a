"""Each response alone, in K judgements."""

from __future__ import annotations

from srlm_cli.commands.judge.asked import Asked
from srlm_cli.commands.judge.asking import opened, run_asking
from srlm_cli.options.judging import closing
from srlm_cli.stages import judge as stage
from srlm_cli.templates import Template


def run(asked: Asked, form: Template) -> None:
    """Judge the rows one by one."""
    rows, model, options, ruled = opened(asked, form)
    run_asking(
        asked, rows, model, asked.identity(options, rows),
        lambda rows, _: closing(ruled(stage.judge(rows, model, options)), options.evidence),
    )  # fmt: skip
