"""`--rescore`: the stored judgements read again, without a model."""

from __future__ import annotations

from functools import partial

from srlm_cli.commands.judge.asked import Asked
from srlm_cli.options.rules import with_rules_checked
from srlm_cli.runner.inputs import open_reader
from srlm_cli.runner.stage import StageRun
from srlm_cli.stages import rescore as stage
from srlm_cli.stages.rules import with_rules
from srlm_cli.stages.seen import with_ids_checked
from srlm_cli.templates import Template


def run(asked: Asked, form: Template) -> None:
    """Read the judgements of the rows with a template."""
    rules = asked.rule_options(form)
    check = with_ids_checked(with_rules_checked(stage.stored_record, rules and rules.rules))
    rows = open_reader(asked.stream, check, [asked.stream.in_], shard=asked.judging.shard)
    decides = {"rescore": True, "template": form.hash, "shard": rows.part, **asked.rules.identity()}
    ruled = partial(with_rules, options=rules) if rules else iter
    StageRun("judge", asked.stream, rows, decides).run(
        lambda rows, _: ruled(stage.rescore(rows, form)), limit=asked.limit()
    )
