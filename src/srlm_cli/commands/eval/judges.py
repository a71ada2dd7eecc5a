"""srlm eval judges."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from time import monotonic
from typing import Annotated, Any, Literal

from typer import Option

from srlm_cli import records
from srlm_cli.engines import LazyEngine, template_kwargs
from srlm_cli.engines.base import Engine
from srlm_cli.errors import OptionError
from srlm_cli.options import numbers
from srlm_cli.options.common import EngineOptions, SamplingOptions, StreamOptions, System, identity
from srlm_cli.options.groups import grouped
from srlm_cli.options.judging import refuse_without_choices
from srlm_cli.options.kinds import DEFAULT, KindOptions
from srlm_cli.records import Record
from srlm_cli.runner.inputs import open_reader
from srlm_cli.runner.outputs import refuse_clash, refuse_own_input
from srlm_cli.runner.provenance import model_identity
from srlm_cli.runner.stage import Resumed, StageRun, warn_of_thoughts, write_metrics
from srlm_cli.runner.tally import Tally
from srlm_cli.stages import Outcome
from srlm_cli.stages import judge as stage
from srlm_cli.streams.console import say
from srlm_cli.templates import Template

# Each by the options of `srlm judge`: --by, --score, --direct.
KINDS = {
    "text": ("pointwise", "text", False),
    "expected": ("pointwise", "expected", False),
    "pairwise": ("pairwise", "text", False),
    "pairwise-direct": ("pairwise", "text", True),
    "group": ("group", "text", False),
}


def kinds_of(text: Any) -> tuple[str, ...]:
    """Return the names in a list, or in a text with commas; each once."""
    names = text if isinstance(text, list | tuple) else str(text).split(",")  # srlm.toml may have a list
    return tuple(dict.fromkeys(str(name).strip() for name in names))


def needs(values: dict[str, Any]) -> dict[str, str]:
    """Return the parameters that none of the kinds has a use for, with the option that they lack."""
    kinds = {kind.partition(":")[0] for kind in values["kinds"]}
    lacking = {} if "expected" in kinds else {"min_score_mass": "--kinds expected"}
    return lacking | ({} if kinds & {"text", "expected"} else {"force_score": "--kinds text"})


@grouped
def judges(
    stream: StreamOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
    kinds: Annotated[
        Any,
        Option(
            "--kinds",
            parser=kinds_of,
            metavar="KIND,...",
            help="Kinds of judging, in this order; KIND:TEMPLATE has another judge prompt.",
        ),
    ] = ",".join(KINDS),
    num_judgements: Annotated[
        int,
        Option(
            "--num-judgements",
            "-k",
            min=1,
            max=numbers.DRAWS,
            help="Judgements per response; pairwise: verdicts per pair and order; group: orders of the responses.",
        ),
    ] = 3,
    template: Annotated[
        str, Option("--template", help="Judge prompt of text and expected: a built-in name or a .toml file.")
    ] = DEFAULT,
    comparisons: Annotated[
        int | None,
        Option(
            "--comparisons",
            min=1,
            metavar="M",
            show_default="all",
            help="With pairwise: responses that each is compared with at most, in Swiss rounds.",
        ),
    ] = None,
    force_score: Annotated[
        bool,
        Option("--force-score/--no-force-score", help="With text and expected: ask for a score that is missing."),
    ] = False,
    min_score_mass: Annotated[
        float | None,
        Option(
            "--min-score-mass", min=0.0, max=1.0, show_default="as in judge",
            help="With expected: null if all scores have less probability.",
        ),
    ] = None,
    conversation: Annotated[
        Literal["whole", "last"],
        Option("--conversation", help="What the judge sees of a prompt with several turns: the whole, or its last."),
    ] = "whole",
    system: System = None,
    judged: Annotated[
        str | None, Option("--judged", metavar="FILE", help="Write the judged rows of every kind to this file.")
    ] = None,
) -> None:  # fmt: skip
    """Compare kinds of judging on replies that people ranked.

    \b
    Examples:
      srlm eval judges --in ranked.jsonl --model M1/model
      srlm eval judges --in ranked.jsonl --model M1/model --kinds text,expected,pairwise,group --limit 40
      srlm eval judges --in ranked.jsonl --model M1/model --kinds expected,expected:score_only --judged judged.jsonl

    Reads ranked rows, and judges their replies with one model in each of the kinds: text (the score that the judge
    wrote), expected (the probability-weighted mean of the scores), pairwise (two replies in both orders),
    pairwise-direct (the same, by the probabilities of the verdicts) and group (all replies in one call). They are
    those of `srlm judge`, with its settings and seeds. Writes one row per kind: `value` is the pairwise accuracy of
    `srlm eval reward` with its interval, `difference` the accuracy minus that of the first kind, `tie_rate` the ties,
    `first_position` the share of the comparisons that the reply shown first won (0.5 means no position bias),
    `num_judgements`, `tokens_in` and `tokens_out` the cost, `without_score` the replies without a score by reason.
    A table goes to stderr, with the seconds per reply. docs/metrics.md defines each.
    """
    from srlm_cli.evaluate import judges as measure
    from srlm_cli.streams.spill import ByKey, Seen

    refuse_own_input(stream.out, [stream.in_])
    refuse_clash("--judged", judged, stream.out, [stream.in_])
    ways = {name: way_of(name, template, comparisons, system) for name in kinds}
    if comparisons is not None and not any(way.by.by == "pairwise" for way in ways.values()):
        raise OptionError("--comparisons is about pairs of responses", "--kinds pairwise")
    check = ranked_responses
    for way in ways.values():
        if not way.by.together:
            refuse_without_choices(way.form, way.form.name, way.score, force_score)
            check = stage.with_fields_of(way.form, check)
    reader = open_reader(stream, check, [stream.in_], beside=[judged])
    spec = engine.spec()
    model = LazyEngine(spec)
    shared = {"system": system, "template_kwargs": template_kwargs(spec) if reader.peek() else {}}
    shared |= {"last_turn": conversation == "last", "min_score_mass": min_score_mass}
    options = {
        name: stage.JudgeOptions(
            way.form, num_judgements, sampling.sampling(spec), sampling.seed,
            force_score and not way.by.together, way.score, **shared,
        )
        for name, way in ways.items()
    }  # fmt: skip
    found = {name: ByKey(measure.OfKind) for name in kinds}
    seconds: dict[str, float] = {}
    timed = 0  # the responses that were judged by this process

    def count(rows: Iterable[Record]) -> None:
        for (kind, prompt), group in groupby(rows, key=lambda row: (row["kind"], row["prompt_id"])):
            found[kind].add(prompt, measure.of_kind(list(group), sampling.seed))

    def make(rows: Iterable[Record], done: Resumed) -> Iterator[Outcome]:
        from srlm_cli.stages.judge_kinds import judge_kinds

        nonlocal timed
        is_new = Seen().add
        for prompt, group in groupby(done.rows(), key=lambda row: row["prompt_id"]):
            is_new(hash(prompt))
            count(group)
        if rows.peek() is not None:
            model.open()  # before the first kind, which would else be charged with it
        each = {name: partial(way.judge, options=options[name]) for name, way in ways.items()}
        for outcome in judge_kinds(rows, model, each, monotonic, seconds, is_new):
            count(outcome.rows)
            timed += 0 if outcome.bad else outcome.read
            yield outcome

    decides = identity(
        sampling, kinds=list(kinds), template=[way.form.hash for way in ways.values()], num_judgements=num_judgements,
        comparisons=comparisons, force_score=force_score, min_score_mass=min_score_mass, conversation=conversation,
        system=system,
    )  # fmt: skip
    decides |= model_identity(spec) if reader.peek() else {}
    run = StageRun("eval judges", replace(stream, out=judged), reader, decides, engine=model)
    run.summary = partial(Tally.summary, kept="judged rows")
    tally = run.run(make)
    about = {name: {"template": way.form.name, "model": model.model} for name, way in ways.items()}
    rows = measure.judges_metrics(found, about, sampling.seed)
    if not stream.quiet:
        warn_of_thoughts("eval judges", tally, sampling, model)
        per_reply = {name: seconds[name] / timed if timed else None for name in kinds}
        for line in measure.table(rows, per_reply):
            say(line)
    write_metrics("eval judges", stream.out, rows, reader, read=tally.read, quiet=True)


@dataclass(frozen=True)
class Way:
    """One kind of judging, with its template."""

    by: KindOptions
    score: str
    direct: bool
    form: Template

    def judge(self, rows: Iterable[Record], engine: Engine, options: stage.JudgeOptions) -> Iterator[Outcome]:
        """Return the outcomes of this kind."""
        from srlm_cli.stages.seen import never_seen

        if not self.by.together:
            return stage.judge(rows, engine, options)
        return self.by.judge(rows, engine, options, self.direct, never_seen())


def way_of(name: str, template: str, comparisons: int | None, system: str | None) -> Way:
    """Return the kind of judging that `KIND` or `KIND:TEMPLATE` names."""
    kind, colon, own = name.partition(":")
    if kind not in KINDS or (colon and not own):
        raise OptionError(f"--kinds {name}: no such kind", f"KIND or KIND:TEMPLATE, each of {', '.join(KINDS)}")
    by, score, direct = KINDS[kind]
    options = KindOptions(by, comparisons if by == "pairwise" else None)
    if own == DEFAULT and options.together:
        raise OptionError(f"--kinds {name}: template {own} shows one response", f"--kinds {kind}, or your own template")
    form = options.template(own or (DEFAULT if options.together else template), system)
    options.check(form, direct, {})
    if form.uses("evidence"):
        raise OptionError(f"--kinds {name}: template {form.name} has $evidence, and no passages are looked for here")
    return Way(options, score, direct, form)


def ranked_responses(row: Record) -> list[Record]:
    """Return the responses of a ranked row, each with what people thought of it."""
    return records.responses_of(records.ranked_record(row))
