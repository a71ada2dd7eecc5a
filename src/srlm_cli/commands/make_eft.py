"""srlm make-eft."""

from typing import Annotated, Literal

from typer import Option

from srlm_cli import records, templates
from srlm_cli.commands import run
from srlm_cli.commands.grouping import grouped
from srlm_cli.commands.options import EngineOptions, SamplingOptions, StreamOptions, identity, new_app
from srlm_cli.engines import LazyEngine
from srlm_cli.errors import OptionError
from srlm_cli.stages import make_eft as stage

app = new_app()


app = new_app()

Method = Literal["accept", "hindsight"]
Reason = Literal["model", "none"]


@app.command()
@grouped
def make_eft(
    stream: StreamOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
    method: Annotated[
        Method,
        Option(
            "--method",
            help="accept: keep the model's judgements that agree with people; hindsight: score from the rank.",
        ),
    ] = "accept",
    samples: Annotated[int, Option("--samples", min=1, help="accept: judgements sampled for each reply.")] = 4,
    ties: Annotated[bool, Option("--ties/--no-ties", help="accept: a tie of the model agrees with any order.")] = False,
    reason: Annotated[Reason, Option("--reason", help="hindsight: who writes the reasons before the score.")] = "model",
    max_share: Annotated[
        float,
        Option("--max-share", min=0.0, max=1.0, help="Thin out a score that has more than this share of the rows."),
    ] = 0.4,
    score_low: Annotated[float, Option("--score-low", help="hindsight: the human score that becomes 0.")] = 0.0,
    score_high: Annotated[float, Option("--score-high", help="hindsight: the human score that becomes 5.")] = 1.0,
    template: Annotated[
        str, Option("--template", help="Judge's prompt: a built-in name or a .toml file.")
    ] = "additive",
) -> None:
    """Turn ranked replies into fine-tuning rows for the judge (EFT).

    \b
    Examples:
      srlm make-eft --in ranked.jsonl --model sft/model --out eft.jsonl
      srlm make-eft --in ranked.jsonl --method hindsight --reason none --template score_only --out eft.jsonl
      srlm make-eft --in ranked.jsonl.gz --model sft/model --samples 8 --ties | gzip > eft.jsonl.gz

    Reads ranked rows: `prompt`, `responses: [{text, rank or score}]`. Writes `prompt` (the judge's
    prompt), `completion` (reasons, then the score), `prompt_id` and `score`. `accept` is the paper's
    way; a small model that cannot judge yet needs `hindsight`: the rank gives the score. With
    `--reason none` the target is the score alone, the cheapest way to a judge that works, at the
    cost of judgements that give no reasons.
    """
    if score_low >= score_high:
        raise OptionError(f"--score-low {score_low} is not below --score-high {score_high}")
    form = templates.load(template, fields={"prompt", "response"}, reads=True)
    writes_reasons = method == "hindsight" and reason == "model"
    needs_model = method == "accept" or writes_reasons
    reasons = templates.load("hindsight", fields={"prompt", "response", "score"}) if writes_reasons else None
    model = LazyEngine(engine.spec())
    options = stage.EftOptions(
        form, sampling.sampling(), sampling.seed, samples, ties, max_share, (score_low, score_high), reasons
    )
    made_by = stage.accept if method == "accept" else stage.hindsight
    chosen = {"method": method, "reason": reason, "samples": samples, "ties": ties, "max_share": max_share}
    run.stage(
        "make-eft",
        stream,
        run.reader(stream, records.ranked_record, [stream.in_]),
        identity(sampling, **chosen, score_low=score_low, score_high=score_high, template=form.hash)
        | (run.model_identity(model.spec) if needs_model else {}),
        lambda rows, done: made_by(rows, model, options, kept=done.rows()),
        engine=model if needs_model else None,
    )
