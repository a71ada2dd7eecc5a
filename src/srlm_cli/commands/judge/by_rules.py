"""`--engine echo --model rules`: rules that a program checks, without a judge."""

from __future__ import annotations

from srlm_cli.commands.judge.asked import Asked
from srlm_cli.commands.judge.asking import run_asking
from srlm_cli.commands.judge.rows import judge_of, judgeable
from srlm_cli.engines import LazyEngine
from srlm_cli.options.judging import refuse_without_choices
from srlm_cli.options.rules import with_rules_checked
from srlm_cli.runner.inputs import open_reader
from srlm_cli.stages.rules import judge_by_rules
from srlm_cli.stages.seen import with_ids_checked
from srlm_cli.templates import Template


def run(asked: Asked, form: Template) -> None:
    """Score the rows by their rules, on the scale of a template."""
    judging, rules = asked.judging, asked.rule_options(form)
    refuse_without_choices(form, judging.template, judging.score, judging.force_score)
    check = with_ids_checked(with_rules_checked(judgeable, rules.rules))
    rows = open_reader(asked.stream, check, [asked.stream.in_], shard=judging.shard)
    model = LazyEngine(judge_of(asked, rows))
    decides = asked.identity(asked.options(form, model.spec, rows, None), rows)
    run_asking(asked, rows, model, decides, lambda rows, _: judge_by_rules(rows, rules))
