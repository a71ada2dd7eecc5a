"""srlm eval reward, srlm eval head-to-head."""

from dataclasses import replace
from itertools import groupby
from typing import Annotated

from typer import Option

from srlm_cli import records, templates
from srlm_cli.commands import run
from srlm_cli.commands.grouping import Defaults, grouped
from srlm_cli.commands.options import (
    EngineOptions,
    In,
    Out,
    ReadOptions,
    SamplingOptions,
    Seed,
    StreamOptions,
    identity,
    new_app,
)
from srlm_cli.engines import LazyEngine
from srlm_cli.errors import DataError, OptionError
from srlm_cli.records import Row
from srlm_cli.streams.reader import file_hash, read_all

app = new_app("Measure: a judge against people, one model against another.")


@app.command()
@grouped
def reward(
    read: ReadOptions,
    in_: In = "-",
    out: Out = "-",
    ranked: Annotated[
        str | None,
        Option("--ranked", metavar="FILE", help="Ranked rows, when the judged rows do not hold the people's ranking."),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Measure a judge against people: the paper's reward-model metrics.

    \b
    Examples:
      srlm judge --in ranked_eval.jsonl --model M1/model | srlm eval reward
      srlm eval reward --in judged.jsonl --ranked ranked_eval.jsonl --out metrics.jsonl

    Reads judged rows. Where they come from ranked rows through `srlm judge`, they hold the human
    ranking (`human`); rows from elsewhere are matched with --ranked by prompt and text. Writes one
    row a metric: `metric`, `value`, `n`, `ci_low`, `ci_high` (95%, bootstrap over prompts with
    --seed). Pairwise accuracy counts a tie of the judge as a miss; beside it stand the rate without
    ties, the tie rate, 5-best, exact match, Spearman, Kendall tau-b and what "the longest reply
    wins" would reach.
    """
    from srlm_cli.evaluate.reward import judge_metrics

    reader = run.reader(read, records.judged_record, [in_])
    people = human_values(ranked) if ranked else {}
    judged = [with_human(row, people, reader.at) for row in reader]
    reader.digests.clear()
    run.check_whole(reader)
    judged.sort(key=lambda row: row["prompt_id"])
    prompts = [list(group) for _, group in groupby(judged, key=lambda row: row["prompt_id"])]
    metrics = judge_metrics(prompts, seed)
    run.write_rows("eval reward", out, metrics, reader, read=len(judged), quiet=read.quiet)


def human_values(path: str) -> dict[tuple[str, str], float]:
    """Return what people thought of each reply, by prompt and text."""
    rows = [row for ranked in read_all(path, records.ranked_record) for row in records.responses_of(ranked)]
    return {(records.prompt_id(row["prompt"]), row["response"].strip()): row["human"] for row in rows}


def with_human(row: Row, people: dict[tuple[str, str], float], at: str) -> Row:
    """Return a judged row with `human`, its own or that of the ranked rows."""
    if "human" in row and not people:
        return row
    key = records.prompt_id(row["prompt"]), row["response"].strip()
    if key not in people:
        raise DataError(f"{at}: no human ranking of this response", "--ranked FILE has to hold its prompt and text")
    return {**row, "human": people[key]}


@app.command("head-to-head")
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
