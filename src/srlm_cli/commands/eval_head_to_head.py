"""srlm eval head-to-head."""

from dataclasses import replace
from typing import Annotated

from typer import Option

from srlm_cli import records, templates
from srlm_cli.commands import run
from srlm_cli.commands.grouping import Defaults, grouped
from srlm_cli.commands.options import EngineOptions, SamplingOptions, StreamOptions, identity
from srlm_cli.engines import LazyEngine
from srlm_cli.errors import OptionError
from srlm_cli.records import Row
from srlm_cli.streams.reader import file_hash, read_all


@grouped
def head_to_head(
    stream: StreamOptions,
    engine: EngineOptions,
    sampling: Annotated[SamplingOptions, Defaults(temperature=0.0, max_new_tokens=256)],
    against: Annotated[
        str | None, Option("--against", metavar="FILE", help="Responses of the model to compare with.")
    ] = None,
    matches: Annotated[
        str | None, Option("--matches", metavar="FILE", help="Keep every match here, with both verdicts.")
    ] = None,
    direct: Annotated[
        bool,
        Option("--direct/--no-direct", help="Ask for the verdict at once: A or B by probability, without reasons."),
    ] = False,
    template: Annotated[
        str, Option("--template", help="Pairwise prompt: a built-in name or a .toml file.")
    ] = "pairwise",
) -> None:
    """Compare two models' responses: win, tie and loss, a model as the judge, in both orders.

    \b
    Examples:
      srlm eval head-to-head --in M2/responses.jsonl --against M1/responses.jsonl --model M2/model
      srlm sample --in prompts.jsonl --model M2/model -n 1 | srlm eval head-to-head --against m1.jsonl --model M2/model

    Reads response rows of one model and, with --against, of another, to the same prompts (the first
    response to each counts). The judge sees both orders; if its verdicts disagree, it is a tie
    (arXiv 2401.10020, section 3.2). Writes one row a metric, seen from --in: `win`, `tie`, `loss`,
    `win_rate`, `first_position` (0.5 is no position bias), the mean lengths in characters and, with
    --direct, `lean`: the share of prompts where the probability that --in is better, averaged over both
    orders, is above one half. It tells something where a judge's position bias makes every match a tie.
    """
    from srlm_cli.evaluate import head_to_head as compare

    if not against:
        raise OptionError("no --against FILE", "responses of the model to compare with")
    form = templates.load(template, fields={"prompt", "first", "second"}, reads=True)
    if direct and not (form.finish and form.choices):
        raise OptionError(f"template {template} has no `finish` and `choices`", "--direct needs them")
    others = read_all(against, records.response_record)
    reader = run.reader(stream, records.response_record, [stream.in_])
    model = LazyEngine(engine.spec())
    options = compare.HeadToHeadOptions(form, sampling.sampling(), sampling.seed, direct)
    played: list[Row] = []

    def play(rows, done):
        played.extend(done.rows())
        for outcome in compare.head_to_head(rows, others, model, options, kept=played):
            played.extend(outcome.rows)
            yield outcome

    run.stage(
        "eval head-to-head",
        replace(stream, out=matches),
        reader,
        identity(sampling, template=form.hash, direct=direct, against=file_hash(against))
        | run.model_identity(model.spec),
        play,
        engine=model,
    )
    metrics = compare.win_rates(played, sampling.seed)
    run.write_rows("eval head-to-head", stream.out, metrics, reader, read=len(played), quiet=True)
