"""srlm make-eft."""

import os
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from typer import Option

from srlm_cli import records, templates
from srlm_cli.engines import LazyEngine, template_kwargs
from srlm_cli.errors import OptionError
from srlm_cli.options import numbers
from srlm_cli.options.common import (
    EngineOptions,
    SamplingOptions,
    ShardOption,
    StreamOptions,
    System,
    identity,
    new_app,
)
from srlm_cli.options.groups import grouped
from srlm_cli.options.held_out import HeldOut, refusing
from srlm_cli.options.judging import EvidenceOptions, closing, judge_template
from srlm_cli.records import Record
from srlm_cli.runner.inputs import open_reader
from srlm_cli.runner.provenance import model_identity
from srlm_cli.runner.stage import Resumed, StageRun
from srlm_cli.stages import Outcome
from srlm_cli.stages import judge as stage_judge
from srlm_cli.stages import make_eft as stage
from srlm_cli.stages import split as stage_split
from srlm_cli.stages.rank_scores import RankScores
from srlm_cli.streams.reader import Reader, file_hash

app = new_app()

Method = Literal["accept", "hindsight"]
Reason = Literal["model", "none"]
Scale = Literal["balanced", "linear"]
Half = Literal["train", "eval"]


@app.command()
@grouped
def make_eft(
    stream: StreamOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
    search: EvidenceOptions,
    method: Annotated[
        Method,
        Option(
            "--method",
            help="accept: keep the model's judgements that agree with people; hindsight: take scores from the ranks.",
        ),
    ] = "accept",
    num_judgements: Annotated[
        int, Option("--num-judgements", min=1, max=numbers.DRAWS, help="accept: judgements drawn for each reply.")
    ] = 4,
    rows_per_reply: Annotated[
        int, Option("--rows-per-reply", min=1, max=numbers.DRAWS, help="hindsight: rows made from each reply.")
    ] = 1,
    ties: Annotated[bool, Option("--ties/--no-ties", help="accept: count a tie of the model as agreement.")] = False,
    force_score: Annotated[
        bool,
        Option("--force-score/--no-force-score", help="accept: ask the model for a score when it wrote none."),
    ] = False,
    reason: Annotated[Reason, Option("--reason", help="hindsight: source of the reasons before the score.")] = "model",
    scale: Annotated[
        Scale,
        Option("--scale", help="hindsight: balanced scores, or scores proportional to the human ones."),
    ] = "balanced",
    score_low: Annotated[float, Option("--score-low", help="linear: human score that maps to the lowest score.")] = 0.0,
    score_high: Annotated[
        float, Option("--score-high", help="linear: human score that maps to the highest score.")
    ] = 1.0,
    max_share: Annotated[
        float,
        Option("--max-share", min=0.0, max=1.0, help="Largest share of rows with the same score; more are dropped."),
    ] = 0.4,
    eval_share: Annotated[
        float, Option("--eval-share", min=0.0, max=1.0, help="Share of prompts to hold out, chosen by --seed.")
    ] = 0.0,
    split: Annotated[
        Half, Option("--split", help="train: EFT rows; eval: the held-out ranked rows, unchanged.")
    ] = "train",
    held_out: HeldOut = None,
    template: Annotated[
        str, Option("--template", help="Judge prompt: built-in template name or .toml file.")
    ] = "additive",
    system: System = None,
    thin: Annotated[
        bool, Option("--thin", help="Only apply --max-share to the EFT rows of --in; no model runs.")
    ] = False,
    shard: ShardOption = None,
) -> None:
    """Turn ranked replies into fine-tuning rows for the judge (EFT).

    \b
    Examples:
      srlm make-eft --in ranked.jsonl --model sft/model --out eft.jsonl
      srlm make-eft --in ranked.jsonl --method hindsight --reason none --template score_only --out eft.jsonl
      srlm make-eft --in ranked.jsonl --method hindsight --template evidence --evidence corpus.db --out eft.jsonl
      srlm make-eft --in ranked.jsonl --eval-share 0.25 --split eval --out ranked_eval.jsonl
      srlm make-eft --in ranked.jsonl --eval-share 0.25 --model sft/model --num-judgements 8 --ties --out eft.jsonl
      cat eft-*.jsonl | srlm make-eft --thin --max-share 0.4 > eft.jsonl

    Reads ranked rows: `prompt`, `responses: [{text, rank or score}]`. Writes `prompt` (the judge's
    prompt), `completion` (reasons, then the score), `prompt_id` and `score`. `accept` is the paper's
    method. A small model that cannot judge yet needs `hindsight`: the score comes from the human ranking,
    and the seed decides between neighbouring scores. With `--reason none` the target is the score alone:
    the cheapest judge that works, without reasons. Only the text of a prompt and --seed decide whether it
    is in the eval part; --held-out rejects the prompts of a file. A --shard needs --max-share 1, because
    --max-share depends on all earlier rows; run --thin on the concatenated rows instead. With --evidence the
    prompts have passages, found as `srlm judge --evidence` finds them.
    """
    if thin and shard:
        raise OptionError("--thin looks at all rows before", "it is for the joined rows, without --shard")
    if thin:
        check = refusing(records.eft_record, held_out)
        rows = open_reader(stream, check, [stream.in_], beside=held_out or [])
        decides = {"thin": True, "max_share": max_share, "held_out": [file_hash(path) for path in held_out or []]}
        StageRun("make-eft", stream, rows, decides).run(
            lambda rows, done: stage.thinned(rows, max_share, kept=done.rows())
        )
        return
    if shard and max_share < 1 and split == "train":
        raise OptionError(
            "--shard cannot thin scores out: that depends on all rows before",
            "--max-share 1 with every shard, then `srlm make-eft --thin --max-share ...` on the joined rows",
        )
    if score_low >= score_high:
        raise OptionError(f"--score-low {score_low} is not below --score-high {score_high}")
    if split == "eval" and not eval_share:
        raise OptionError("--split eval without --eval-share", "for instance --eval-share 0.25")
    form = judge_template(template, system)
    is_eval = lambda row: stage_split.held_out(row, eval_share, sampling.seed)  # noqa: E731
    check = refusing(records.ranked_record, held_out, unless=is_eval)
    check = check if split == "eval" else stage_judge.with_fields_of(form, check, records.responses_of)
    rows = open_reader(stream, check, [stream.in_], shard=shard, beside=held_out or [])
    parts = {"eval_share": eval_share, "split": split, "held_out": [file_hash(path) for path in held_out or []]}
    parts |= {"thin": False, "shard": rows.part}
    if split == "eval":
        StageRun("make-eft", stream, rows, {**parts, "seed": sampling.seed}).run(
            lambda rows, _: stage_split.eval_part(rows, eval_share, sampling.seed)
        )
        return
    search.check(form, "another template")
    by_rank = method == "hindsight"
    if (by_rank or force_score) and not form.finish:
        raise OptionError(f"template {template} has no `finish`", "the line before the score")
    if force_score and not form.choices:
        raise OptionError(f"template {template} has no `choices`", "--force-score chooses among them")
    writes_reasons = by_rank and reason == "model"
    needs_model = not by_rank or writes_reasons or search.asks_model
    reasons = reason_template(search.given) if writes_reasons else None
    linear = (score_low, score_high) if scale == "linear" else None
    known = all_scores(stream.in_) if by_rank and not linear else None
    model = LazyEngine(engine.spec())
    found = search.open()
    options = stage.EftOptions(
        form,
        sampling.sampling(model.spec),
        sampling.seed,
        num_judgements,
        rows_per_reply,
        ties,
        max_share,
        force_score,
        RankScores(int(form.low), int(form.high), known, linear),
        reasons,
        system,
        template_kwargs(model.spec) if needs_model and rows.peek() else {},
        found,
    )
    made_by = stage.hindsight if by_rank else stage.accept
    chosen = {"method": method, "reason": reason, "ties": ties, "max_share": max_share}
    chosen |= {"num_judgements": num_judgements, "rows_per_reply": rows_per_reply}
    chosen |= {"force_score": force_score, "scale": scale, "score_low": score_low, "score_high": score_high, **parts}
    chosen |= {"system": system, **search.identity(found)}
    decides = identity(sampling, **chosen, all_scores=len(known or []), template=form.hash)
    decides |= model_identity(model.spec) if needs_model else {}

    def make(rows: Iterable[Record], done: Resumed) -> Iterator[Outcome]:
        made = lambda ours: made_by(ours, model, options, kept=done.rows())  # noqa: E731
        return closing(stage_split.train_part(rows, made, eval_share, sampling.seed), found)

    StageRun("make-eft", stream, rows, decides, engine=model if needs_model else None).run(make)


def reason_template(with_evidence: bool) -> templates.Template:
    """Return the template that asks for the reasons of a known score, with passages if the judge is shown them."""
    fields = {"prompt", "response", "score", "high"}
    if with_evidence:
        return templates.load("hindsight_evidence", fields={*fields, "evidence"})
    return templates.load("hindsight", fields=fields)


def all_scores(path: str) -> list[float] | None:
    """Return the sorted human scores of a ranked file, or None for stdin and pipes, which cannot be read twice."""
    if not os.path.isfile(path):
        return None
    scores = []
    for row in Reader([path], records.ranked_record, on_error="skip"):
        found = [reply.get("score") for reply in row["responses"]]
        scores += [score for score in found if records.is_number(score)]
    return sorted(scores)
