"""srlm judge."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Annotated, Any, Literal

from typer import Option

from srlm_cli import records, templates
from srlm_cli.engines import LOCAL, LazyEngine, template_kwargs
from srlm_cli.engines.base import Engine, EngineSpec, Sampling
from srlm_cli.errors import BadRow, LimitExceeded, OptionError
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
from srlm_cli.options.judging import EvidenceOptions, ScorerOptions, closing, refuse_without_choices
from srlm_cli.options.kinds import Draws, KindOptions, draws_of
from srlm_cli.options.rules import RulesOfJudge, with_rules_checked
from srlm_cli.records import Record
from srlm_cli.runner.inputs import finished, open_reader
from srlm_cli.runner.provenance import model_identity
from srlm_cli.runner.scorers import judge_with_scorer
from srlm_cli.runner.stage import Resumed, StageRun, warn_of_thoughts
from srlm_cli.runner.tally import Tally
from srlm_cli.stages import Outcome
from srlm_cli.stages import judge as stage
from srlm_cli.stages import meta_judge as stage_meta
from srlm_cli.stages import rescore as stage_rescore
from srlm_cli.stages import rules as stage_rules
from srlm_cli.streams.console import say
from srlm_cli.streams.reader import Reader
from srlm_cli.streams.spill import Seen

app = new_app()

Score = Literal["text", "expected"]
Conversation = Literal["whole", "last"]


@app.command()
@grouped
def judge(
    stream: StreamOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
    search: EvidenceOptions,
    rules: RulesOfJudge,
    kind: KindOptions,
    scorer: ScorerOptions,
    num_judgements: Annotated[
        Any,
        Option(
            "--num-judgements",
            "-k",
            parser=draws_of,
            metavar="K|LOW:HIGH",
            help="Judgements per response, averaged (the paper: 3); LOW:HIGH stops early, see --settle; with --by "
            "pairwise verdicts per pair and order, with --by group orders of the responses.",
        ),
    ] = 3,  # fmt: skip
    template: Annotated[
        str, Option("--template", help="Judge prompt: built-in template name or .toml file; --by has its own.")
    ] = "additive",
    score: Annotated[
        Score,
        Option(
            "--score",
            help="text: the score that the judge wrote; expected: the probability-weighted mean of the scores.",
        ),
    ] = "text",
    min_score_mass: Annotated[
        float | None,
        Option(
            "--min-score-mass",
            min=0.0,
            max=1.0,
            help="With expected: null if all scores have less probability (0.2; with criteria 0).",
        ),
    ] = None,
    force_score: Annotated[
        bool,
        Option("--force-score/--no-force-score", help="Ask the model for a score when a judgement has none."),
    ] = False,
    rescore: Annotated[
        bool, Option("--rescore", help="Read the stored `judgements` again with --template; no model runs.")
    ] = False,
    meta: Annotated[
        bool, Option("--meta", help="Compare the stored `judgements` of a response in both orders (Meta-Rewarding).")
    ] = False,
    meta_template: Annotated[
        str, Option("--meta-template", help="With --meta: meta-judge prompt, built-in template name or .toml file.")
    ] = "meta",
    meta_replies: Annotated[
        int,
        Option("--meta-replies", min=1, help="With --meta: N responses per prompt, those with the most varied scores."),
    ] = 1,
    direct: Annotated[
        bool,
        Option(
            "--direct/--no-direct",
            help="With --meta or --by pairwise: read the verdict from probabilities, without reasons.",
        ),
    ] = False,
    conversation: Annotated[
        Conversation,
        Option("--conversation", help="What the judge sees of a prompt with several turns: the whole, or its last."),
    ] = "whole",
    system: System = None,
    max_unparsed: Annotated[
        float,
        Option(
            "--max-unparsed", min=0.0, max=1.0, help="Exit with 4 when a larger share of the judgements has no score."
        ),
    ] = 1.0,
    show: Annotated[
        int | None, Option("--show", min=1, metavar="N", help="Print the judge's prompt for the first N rows and stop.")
    ] = None,
    shard: ShardOption = None,
) -> None:
    """Score responses with a model as the judge, K judgements each.

    \b
    Examples:
      srlm judge --in responses.jsonl --out judged.jsonl
      srlm judge --in responses.jsonl --model M2/model --template score_only --force-score
      srlm judge --in ranked.jsonl --model M1/model --score expected | srlm eval reward
      srlm judge --in responses.jsonl --score text --num-judgements 2:9 --settle 0.9
      srlm judge --in responses.jsonl --by pairwise --direct --comparisons 2 | srlm make-pairs
      srlm judge --in responses.jsonl --by group --out judged.jsonl
      srlm judge --in responses.jsonl --template own.toml --show 1
      srlm judge --in responses.jsonl --template criteria --out judged.jsonl
      srlm judge --in responses.jsonl --template evidence --evidence corpus.db --out judged.jsonl
      srlm judge --in judged.jsonl --rescore --template own.toml --out read-again.jsonl
      srlm judge --in responses.jsonl --rule no-commas --rule words:..30 --combine gate
      srlm judge --in responses.jsonl --engine echo --model rules --rule no-commas
      srlm judge --in judged.jsonl --meta --out meta.jsonl
      srlm judge --in responses.jsonl --engine reward --model reward/model
      srlm judge --in responses.jsonl --implicit --model M2/model --ref M1/model

    Without --model the judge is the model in the `model` field of the responses: the model judges
    itself (self-rewarding). Reads rows of `srlm sample`, rows of any tool with `prompt` and `response`, and
    ranked rows (`responses`). Adds `score` (the mean of the readable scores, or null), `scores`,
    `score_from`, `judgements` and `judge`. The last well-formed score of a judgement counts. With
    `--score expected` the score is the probability-weighted mean of all scores at that position, so
    ties are rare; with a template that asks for the score directly, no token is generated. `score_mass` is
    the probability of all scores together at that position. If it is below --min-score-mass, the judge was
    about to write something else: the score is null and counted (`low score mass`). The defaults are
    the paper's: K=3 at temperature 0.7, top-p 0.9, scores 0 to 5.

    With a template that has criteria (`--template criteria`), the judge gives a reason and a value for each of
    them in one answer in JSON. `criteria` has these per judgement, and the score is their weighted mean.
    docs/templates.md shows how to write one.

    With --evidence the judge is shown passages from an index of `srlm index`, found for each response, in place
    of `$evidence` in its template. The row has them as `evidence`: a list of id, source, text and rank.
    docs/evidence.md has the details, and the protocol of --evidence-cmd.

    With --rule, --rule-file or --combine, rules that a program checks are a part of the score: those for all
    rows and those in the field `rules` of a row. `score_judge` is then the score of the judge, `score_rules`
    that of the rules, and `rules` has the result of each. `--engine echo --model rules` uses the rules alone.
    Without these options the field `rules` is not read. docs/rules.md lists the rules.

    With --by the responses to a prompt are judged against each other; they must be consecutive. pairwise: two
    responses in both orders, and `score` is 5 times the mean probability to win against another response to the
    prompt (Bradley-Terry); `comparisons` has the other response for each of the `judgements`. group: all responses in
    one call, in K orders; `places` is where the response was shown. docs/judge.md has the details.

    Two scorers write no words, so templates and sampling do not apply: `--engine reward` takes the logit of a
    reward model (a sequence classifier of transformers with one label) for the dialogue in its chat template.
    `--implicit` takes DPO's implicit reward, beta * (log-probability of the reply by --model - that by --ref).

    With --meta the command reads judged rows. For each prompt it compares the judgements of the response
    with the most varied scores, pair by pair, in both orders (arXiv 2407.19594, with K=11). --template must
    be the template of these judgements. Adds `battles`, `targets` and `judge_prompt` for `srlm make-pairs
    --of judgements`; --max-unparsed then applies to the verdicts. docs/pairs.md has the formulas.
    """
    if meta and shard:
        raise OptionError(
            "--meta looks at all replies to a prompt, which --shard may part", "--meta on the joined rows"
        )
    if meta and rescore:
        raise OptionError("--meta and --rescore are two things to do", "run them separately")
    words = {"--meta": meta, "--rescore": rescore, "--force-score": force_score, "--system": system is not None}
    words |= {"--by": kind.by != "pointwise", "--show": show, "--evidence": search.given, "--rule": rules.given}
    words |= {"--settle": kind.settle is not None, "--comparisons": kind.comparisons is not None, "--direct": direct}
    words |= {"--conversation last": conversation == "last"}
    if scorer.asked(engine.engine, words):
        limit = partial(too_many_unparsed, limit=max_unparsed)
        judge_with_scorer(stream, engine.spec(), scorer, judgeable, shard, limit)
        return
    form, last = kind.template(template, system), conversation == "last"
    by_rules = (engine.engine, engine.model, meta or rescore) == ("echo", "rules", False)
    if search.given and by_rules:
        raise OptionError("no judge is shown passages with --model rules", "leave out --evidence")
    alone = {
        "--meta": meta,
        "--rescore": rescore,
        "--score expected": score == "expected",
        "--force-score": force_score,
    }
    others = {"--meta": meta, "--rescore": rescore, "--evidence": search.given, "--model rules": by_rules}
    kind.check_draws(num_judgements, form, score, others)
    kind.check(form, direct, alone | {"--evidence": search.given, "--model rules": by_rules})
    if show and (meta or rescore or by_rules):
        raise OptionError("--show prints the prompt of a judge", "leave out --meta, --rescore and --model rules")
    combined = None if meta else rules.options(kind.scaled(form), alone=by_rules)
    for_all = combined and combined.rules
    ruled = partial(stage_rules.with_rules, options=combined) if combined else iter
    if rescore:
        stored = open_reader(
            stream, with_rules_checked(stage_rescore.stored_record, for_all), [stream.in_], shard=shard
        )
        decides = {"rescore": True, "template": form.hash, "shard": stored.part, **rules.identity()}
        StageRun("judge", stream, stored, decides).run(
            lambda rows, _: ruled(stage_rescore.rescore(rows, form)),
            limit=lambda tally: too_many_unparsed(tally, max_unparsed),
        )
        return
    if not meta:
        refuse_without_choices(form, template, score, force_score)
    metas = meta_options(form, meta_template, sampling, engine, meta_replies, direct) if meta else None
    if not (metas or by_rules or kind.together):
        search.check(form, "--template additive")
    check = partial(stage_meta.meta_judgeable, template=form) if metas else with_rules_checked(judgeable, for_all)
    check = check if by_rules or kind.together else stage.with_fields_of(form, check)
    draws = num_judgements if isinstance(num_judgements, Draws) else None
    of_prompt = itemgetter("prompt_id") if kind.together or draws else None
    rows = open_reader(stream, check, [stream.in_], shard=shard, group_of=of_prompt)
    found = None if metas or by_rules else search.open()  # of judged rows the passages are in the rows
    if show and not search.asks_model:
        about = stage.JudgeOptions(
            form, 1, Sampling(), sampling.seed, score=score, system=system, evidence=found, last_turn=last
        )
        if kind.together:
            for text in islice(kind.prompts_shown(finished(rows), about), show):
                print(text, end="")
            if rows.error:
                raise rows.error
            return
        show_prompts(rows, LazyEngine(EngineSpec("echo")), about, show)
        return
    local = engine.engine in LOCAL
    if rows.peek() is None and rows.error:
        raise rows.error  # before there is a FILE.part: it would be one without a model
    self_judged = engine.model is None and (local or (engine.engine == "openai" and has_writer(rows)))
    spec = engine.spec(writer_of(rows) if self_judged else None)
    model = LazyEngine(spec)
    options = stage.JudgeOptions(
        form,
        draws.high if draws else num_judgements,
        sampling.sampling(spec),
        sampling.seed,
        force_score,
        score,
        min_score_mass,
        system,
        template_kwargs(spec) if rows.peek() else {},
        found,
        last,
    )
    if show:
        show_prompts(rows, model, options, show)
        return
    own = {
        "num_judgements": num_judgements,
        "template": form.hash,
        "force_score": force_score,
        "score": score,
        "min_score_mass": options.least_mass if score == "expected" else None,
        "rescore": False,
        "system": system,
        "conversation": conversation,
    }
    own |= {"shard": rows.part, **search.identity(found)}
    own |= {"meta": meta, "meta_template": metas and metas.meta_template.hash}
    own |= rules.identity()
    own |= {"meta_replies": metas and metas.replies, "direct": metas and metas.direct, **kind.identity(direct)}

    def make(rows: Iterable[Record], done: Resumed) -> Iterator[Outcome]:
        rows = of_one_writer(rows, spec.model) if self_judged else rows
        if by_rules:
            return stage_rules.judge_by_rules(rows, combined)
        if metas:
            return stage_meta.meta_judge(rows, model, metas)
        if kind.together or draws:
            is_new = Seen().add
            for row in done.rows():
                is_new(hash(row["prompt_id"]))
            return ruled(kind.judge(rows, model, options, direct, is_new, draws.low if draws else 0))
        return closing(ruled(stage.judge(rows, model, options)), found)

    asked = "verdicts" if metas or kind.by == "pairwise" else "judgements"
    decides = identity(sampling, **own) | model_identity(spec) if rows.peek() else {}
    limit = partial(too_many_unparsed, limit=max_unparsed, asked=asked)
    tally = StageRun("judge", stream, rows, decides, engine=model).run(make, limit)
    if too_many_unparsed(tally, 0.5, asked) and not stream.quiet:
        better = "--direct" if asked == "verdicts" else "--force-score, and --template score_only"
        say(f"srlm judge: most {asked} cannot be read; see {better}")
    if not stream.quiet:
        warn_of_thoughts("judge", tally, sampling)
    if (low := tally.counts["low score mass"]) and not stream.quiet:
        say(f"srlm judge: {low} scores are null: the scores had too little probability (`score_mass`)")


def show_prompts(rows: Reader, engine: Engine, options: stage.JudgeOptions, count: int) -> None:
    """Print the judge's prompts for the first rows; the engine writes queries only."""
    first = ((row, rows.at) for row in islice(finished(rows), count))
    for text in closing(stage.prompts_shown(first, engine, options), options.evidence):
        print(text, end="")
    if rows.error:
        raise rows.error


def meta_options(
    judge_form: templates.Template,
    name: str,
    sampling: SamplingOptions,
    engine: EngineOptions,
    replies: int,
    direct: bool,
) -> stage_meta.MetaOptions:
    """Return how judgements are compared, by a template of this name."""
    form = templates.load(name, fields={"task", "first", "second"}, reads=True)
    if direct and not (form.finish and form.choices):
        raise OptionError(f"template {name} has no `finish` and `choices`", "--direct needs them")
    return stage_meta.MetaOptions(judge_form, form, sampling.sampling(engine.spec()), sampling.seed, replies, direct)


def too_many_unparsed(tally: Tally, limit: float, asked: str = "judgements") -> LimitExceeded | None:
    """Return an error if the share of judgements without a score, or of verdicts without a winner, is too large."""
    rate = tally.counts["unparsed"] / max(tally.counts[asked], 1)
    if rate <= limit:
        return None
    what, hint = "score", "--force-score lets the model choose a missing score"
    if asked == "verdicts":
        what, hint = "winner", "--direct takes the more probable one"
    return LimitExceeded(f"{rate:.1%} of the {asked} have no readable {what}, above --max-unparsed {limit}", hint)


def judgeable(row: Record) -> Record | list[Record]:
    """Return a response row, or the responses of a ranked row."""
    if "responses" in row and "response" not in row:
        return records.responses_of(records.ranked_record(row))
    return records.response_record(row)


def has_writer(rows: Reader) -> bool:
    """Return whether the first row names the model that wrote it; if none does, a server's only model may judge."""
    first = rows.peek()
    return first is not None and named_in(first) is not None


def named_in(row: Record) -> str | None:
    """Return the model that a row says wrote it."""
    model = row.get("model")
    return model if isinstance(model, str) and model else None


def writer_of(rows: Reader) -> str | None:
    """Return the model that wrote the first row; raise OptionError when it names none."""
    first = rows.peek()
    if first is None:
        return None
    model = named_in(first)
    if model is None:
        raise OptionError(f"{rows.at}: the row does not name its `model`", "--model MODEL sets the judge")
    if model.split(":")[0] == "echo":
        raise OptionError(f"{rows.at}: the row was written by the echo engine", "--engine echo, or --model MODEL")
    return model


def of_one_writer(rows: Iterable[Record], model: str | None) -> Iterator[Record]:
    """Yield the rows; a row of another model is a bad row, because without --model its judge is unknown."""
    for row in rows:
        if row.get("model") != model:
            other = row.get("model") or "no named model"
            raise BadRow(f"written by {other}, rows before it by {model}: --model MODEL sets the judge")
        yield row
