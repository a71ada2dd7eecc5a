"""`--meta`: the stored judgements of a response against each other, in both orders."""

from __future__ import annotations

from functools import partial

from srlm_cli import templates
from srlm_cli.commands.judge.asked import Asked
from srlm_cli.commands.judge.asking import run_asking
from srlm_cli.commands.judge.rows import judge_of
from srlm_cli.engines import LazyEngine
from srlm_cli.errors import OptionError
from srlm_cli.runner.inputs import open_reader
from srlm_cli.stages.meta_judge import MetaOptions, meta_judge, meta_judgeable
from srlm_cli.templates import Template


def run(asked: Asked, form: Template) -> None:
    """Compare the judgements, which were made with a template."""
    metas = meta_options(asked, form)
    rows = open_reader(asked.stream, partial(meta_judgeable, template=form), [asked.stream.in_])
    model = LazyEngine(judge_of(asked, rows))
    decides = asked.identity(asked.options(form, model.spec, rows, None), rows, metas)
    run_asking(asked, rows, model, decides, lambda rows, _: meta_judge(rows, model, metas), "verdicts")


def meta_options(asked: Asked, judge_form: Template) -> MetaOptions:
    """Return how judgements are compared, by the template of --meta-template."""
    judging, name = asked.judging, asked.judging.meta_template
    form = templates.load(name, fields={"task", "first", "second"}, reads=True)
    if judging.direct and not (form.finish and form.choices):
        raise OptionError(f"template {name} has no `finish` and `choices`", "--direct needs them")
    sampling = asked.sampling.sampling(asked.engine.spec())
    return MetaOptions(judge_form, form, sampling, asked.sampling.seed, judging.meta_replies, judging.direct)
