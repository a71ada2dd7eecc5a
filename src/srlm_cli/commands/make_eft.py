"""srlm make-eft."""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Annotated, Any, Literal

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
from srlm_cli.options.judging import EvidenceOptions, closing, judge_template, passages_need
from srlm_cli.options.rules import RuleSource
from srlm_cli.options.unused import command_with
from srlm_cli.records import Record
from srlm_cli.runner.inputs import open_reader
from srlm_cli.runner.provenance import model_identity
from srlm_cli.runner.stage import Resumed, StageRun
from srlm_cli.stages import Outcome
from srlm_cli.stages import judge as stage_judge
from srlm_cli.stages import make_eft as stage
from srlm_cli.stages import own as stage_own
from srlm_cli.stages import split as stage_split
from srlm_cli.stages.make_pairs import group_of
from srlm_cli.stages.rank_scores import RankScores
from srlm_cli.streams.reader import Reader, file_hash

app = new_app()

Method = Literal["accept", "hindsight"]
Reason = Literal["model", "none"]
Scale = Literal["balanced", "linear"]
Half = Literal["train", "eval"]
Own = Literal["rules", "people"]


def needs(values: dict[str, Any]) -> dict[str, str]:
    """Return the parameters that the method has no use for, with the option that they lack."""
    by_rank = values["method"] == "hindsight"
    others = ("num_judgements", "ties", "force_score") if by_rank else ("rows_per_reply", "reason", "scale")
    lacking = dict.fromkeys(others, f"--method {'accept' if by_rank else 'hindsight'}")
    if not by_rank or values["scale"] != "linear":
        lacking |= dict.fromkeys(("score_low", "score_high"), "--method hindsight --scale linear")
    if values["own"] != "rules":
        lacking["run_code"] = "--own rules"
    return lacking | passages_need(values)


@app.command(cls=command_with(needs=needs))
@grouped
def make_eft(
    stream: StreamOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
    search: EvidenceOptions,
    rules: RuleSource,
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
    own: Annotated[
        Own | None,
        Option("--own", help="Read a model's own responses, graded by their rules, or by people (`human`)."),
    ] = None,
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
      srlm make-eft --in ranked.jsonl --method accept --model sft/model --num-judgements 8 --ties --out eft.jsonl
      srlm make-eft --in responses.jsonl --own rules --rule no-commas --method hindsight --reason none --out own.jsonl
      cat eft-*.jsonl | srlm make-eft --thin --max-share 0.4 > eft.jsonl

    Reads ranked rows: `prompt`, `responses: [{text, rank or score}]`. Writes `prompt` (the judge's
    prompt), `completion` (reasons, then the score), `prompt_id` and `score`. `accept` is the paper's
    method. A small model that cannot judge yet needs `hindsight`: the score comes from the human ranking,
    and the seed decides between neighbouring scores. With `--reason none` the target is the score alone:
    the cheapest judge that works, without reasons. Only the text of a prompt and --seed decide whether it
    is in the eval part; --held-out rejects the prompts of a file. A --shard needs --max-share 1, because
    --max-share depends on all earlier rows; run --thin on the concatenated rows instead. With --evidence the
    prompts have passages, found as `srlm judge --evidence` finds them.

    With --own, --in has responses of the model itself (`srlm sample`), those of a prompt together. `rules`: the
    grade is the share of rules kept, those of --rule and --rule-file and of the field `rules`; it maps to the
    scores in proportion, without --scale. `people`: the grade is the field `human`. So the judge learns from the faults
    of the model. `--split eval` then writes the graded responses as ranked rows, for `srlm eval reward`.
    """
    if own != "rules" and (rules.rule or rules.rule_file):
        raise OptionError("--rule and --rule-file grade a model's own responses", "add --own rules")
    if own and (thin or shard):
        raise OptionError(
            f"--own looks at all replies to a prompt; {'--thin' if thin else '--shard'} does not fit", "leave one out"
        )
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
    if form.criteria:
        raise OptionError(f"template {template} has `criteria`", "make-eft writes one score: a template without them")
    is_eval = lambda row: stage_split.held_out(row, eval_share, sampling.seed)  # noqa: E731
    read_as = graded(own, rules)
    check = refusing(read_as, held_out, unless=is_eval)
    replies = None if own else records.responses_of
    check = check if split == "eval" else stage_judge.with_fields_of(form, check, replies)
    rows = open_reader(stream, check, [stream.in_], shard=shard, beside=held_out or [])
    parts = {"eval_share": eval_share, "split": split, "held_out": [file_hash(path) for path in held_out or []]}
    parts |= {"thin": False, "shard": rows.part, "own": own, **rules.identity()}

    def of_ranked(rows: Iterable[Record], done: Resumed, make: Callable[[Iterable[Record]], Iterator[Outcome]]):
        return stage_own.from_own(rows, make, own, seen_before(done)) if own else make(rows)

    if split == "eval":
        held = partial(stage_split.eval_part, eval_share=eval_share, seed=sampling.seed)
        StageRun("make-eft", stream, rows, {**parts, "seed": sampling.seed}).run(
            lambda rows, done: of_ranked(rows, done, held)
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
    linear = (0.0, 1.0) if own == "rules" else (score_low, score_high) if scale == "linear" else None
    known = all_scores(stream.in_, read_as) if by_rank and not linear else None
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
        parted = partial(stage_split.train_part, make=made, eval_share=eval_share, seed=sampling.seed)
        return closing(of_ranked(rows, done, parted), found)

    StageRun("make-eft", stream, rows, decides, engine=model if needs_model else None).run(make)


def graded(own: Own | None, rules: RuleSource) -> Callable[[Record], Record]:
    """Return how a row is read: as a ranked record, or as a response with its grade."""
    if own is None:
        return records.ranked_record
    return stage_own.graded_by_people if own == "people" else partial(stage_own.graded_by_rules, rules=rules.rules())


def seen_before(done: Resumed) -> Callable[[int], bool]:
    """Return what tells whether a prompt is new, after those of the rows that an unfinished run wrote."""
    from srlm_cli.streams.spill import Seen

    seen = Seen()
    for row in done.rows():
        seen.add(hash(group_of({"prompt_id": row.get("prompt_id", row["id"])})))  # EFT rows, or ranked rows
    return seen.add


def reason_template(with_evidence: bool) -> templates.Template:
    """Return the template that asks for the reasons of a known score, with passages if the judge is shown them."""
    fields = {"prompt", "response", "score", "high"}
    if with_evidence:
        return templates.load("hindsight_evidence", fields={*fields, "evidence"})
    return templates.load("hindsight", fields=fields)


def all_scores(path: str, read_as: Callable[[Record], Record]) -> list[float] | None:
    """Return the sorted human scores of a ranked file, or None for stdin and pipes, which cannot be read twice."""
    if not os.path.isfile(path):
        return None
    scores = []
    for row in Reader([path], read_as, on_error="skip"):
        found = [reply.get("score") for reply in row["responses"]] if "responses" in row else [row["human"]]
        scores += [score for score in found if records.is_number(score)]
    return sorted(scores)
