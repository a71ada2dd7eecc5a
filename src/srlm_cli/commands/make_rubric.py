"""srlm make-rubric."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from typer import BadParameter, Option

from srlm_cli import records, templates
from srlm_cli.engines import LazyEngine, template_kwargs
from srlm_cli.errors import DataError, LimitExceeded, OptionError
from srlm_cli.options import numbers
from srlm_cli.options.common import EngineOptions, SamplingOptions, StreamOptions, identity, new_app
from srlm_cli.options.groups import Defaults, grouped
from srlm_cli.records import Record
from srlm_cli.runner.inputs import all_rows, count_skipped, open_reader
from srlm_cli.runner.outputs import refuse_clash, refuse_own_input
from srlm_cli.runner.provenance import meta, model_identity
from srlm_cli.runner.stage import Resumed, StageRun, write_whole
from srlm_cli.runner.tally import Tally
from srlm_cli.stages import Outcome
from srlm_cli.stages import make_rubric as stage
from srlm_cli.stages.judge import JudgeOptions
from srlm_cli.streams.console import clock, say
from srlm_cli.streams.reader import Reader, shown
from srlm_cli.streams.writer import dumps
from srlm_cli.templates.criteria import MOST, as_toml

app = new_app()
LEAST_PROMPTS = 10  # of a part: with fewer, hardly any gain is above chance


def scale_of(text: Any) -> str | int:
    """Return the scale of a criterion."""
    if str(text) == "yes/no":
        return "yes/no"
    if str(text).isdecimal() and 1 <= int(text) <= MOST:
        return int(text)
    raise BadParameter(f"expected yes/no, or a number from 1 to {MOST} (0 to this number), got {text!r}")


@dataclass(frozen=True)
class RubricStreams(StreamOptions):
    """Ranked rows in, a template out."""

    out: Annotated[str, Option("--out", "-o", metavar="FILE", help="Judge template (TOML) to write; - is stdout.")] = (
        "-"
    )


@app.command()
@grouped
def make_rubric(
    stream: RubricStreams,
    engine: EngineOptions,
    sampling: Annotated[SamplingOptions, Defaults(max_new_tokens=256)],
    num_candidates: Annotated[
        int, Option("--num-candidates", min=0, max=MOST, help="Criteria that the model writes, to be tried.")
    ] = 10,
    max_tries: Annotated[
        int | None,
        Option("--max-tries", min=1, show_default="--num-candidates", help="Stop after N answers with criteria."),
    ] = None,
    rows_shown: Annotated[
        int, Option("--rows-shown", min=1, max=numbers.DRAWS, help="Ranked rows that each of these answers is shown.")
    ] = 3,
    scale: Annotated[
        Any, Option("--scale", parser=scale_of, metavar="yes/no|N", help="Scale of these criteria: yes/no, or 0 to N.")
    ] = "yes/no",
    criteria: Annotated[
        str | None,
        Option(
            "--criteria", metavar="TEMPLATE", help="Also try the criteria of this template, built-in or .toml file."
        ),
    ] = None,
    max_criteria: Annotated[int, Option("--max-criteria", min=1, max=MOST, help="Keep at most N criteria.")] = 5,
    num_judgements: Annotated[
        int, Option("--num-judgements", "-k", min=1, max=numbers.DRAWS, help="Judgements per reply, averaged.")
    ] = 1,
    template: Annotated[
        Literal["criteria", "criteria_score_only"],
        Option(
            "--template",
            metavar="<criteria|criteria_score_only>",
            help="Judge prompt; criteria_score_only has no reasons and is for small models.",
        ),
    ] = "criteria",
    write_template: Annotated[
        str, Option("--write-template", help="Prompt for criteria: built-in template name or .toml file.")
    ] = "new_criteria",
    score: Annotated[
        Literal["text", "expected"],
        Option("--score", help="How a value is read: as written, or as the probability-weighted mean of the scale."),
    ] = "expected",
    asked: Annotated[
        str | None,
        Option(
            "--asked", metavar="FILE", help="Write all criteria and judged replies to this file; a killed run resumes."
        ),
    ] = None,
) -> None:
    """Let a model write criteria from ranked replies, and keep those that agree with people.

    \b
    Examples:
      srlm make-rubric --in ranked.jsonl --model M1/model --out rubric.toml
      srlm make-rubric --in ranked.jsonl --model M1/model --template criteria_score_only --out rubric.toml
      srlm make-rubric --in ranked.jsonl --model M1/model --criteria criteria --asked asked.jsonl --out rubric.toml
      srlm judge --in responses.jsonl --model M1/model --template rubric.toml --score expected

    The prompts of the ranked rows are divided into three parts, at random. The model is shown rows of the first
    part, the better and the worse reply, and writes criteria. It then judges the replies of the second part by one
    criterion at a time. The criterion that raises the agreement of the weighted mean with people most is added, again
    and again; its weight is how often. Its gain must pass a randomization test over prompts, at a level of 0.05
    divided by the number of criteria. Last, the rubric judges the replies of the third part: this agreement is printed,
    because nothing was chosen by it.

    Writes a judge template for `srlm judge --template`. If no criterion helps, nothing is written (exit 4). With
    `--num-candidates 0 --criteria own.toml` only your own criteria are tried. docs/templates.md has the details.
    """
    refuse_own_input(stream.out, [stream.in_])
    refuse_clash("--asked", asked, stream.out, [stream.in_])
    if not num_candidates and not criteria:
        raise OptionError("no criteria to try", "--num-candidates above 0, or --criteria TEMPLATE")
    form = templates.load_judge(template)
    writing = templates.load(write_template, fields={"comparisons", "count"})
    if engine.thinking == "on":  # the beginning of an answer would leave no room for a thought
        writing = replace(writing, prefix="")
    own = criteria_of(criteria) if criteria else ()
    reader = open_reader(stream, records.ranked_record, [stream.in_], beside=[asked, criteria])
    ranked = all_rows(reader)
    parts = stage.parts_of(ranked, sampling.seed, bool(num_candidates))
    refuse_too_few(parts, shown(stream.in_), bool(num_candidates))
    spec = engine.spec()
    model = LazyEngine(spec)
    drawn = sampling.sampling(spec)
    judging = JudgeOptions(
        form, num_judgements, drawn, sampling.seed, score=score, template_kwargs=template_kwargs(spec)
    )
    tries = num_candidates if max_tries is None else max_tries
    options = stage.RubricOptions(
        num_candidates, tries if num_candidates else 0, rows_shown, scale, writing, replace(drawn, stop=writing.stop),
        sampling.seed, judging, own,
    )  # fmt: skip
    trial, chosen = stage.Trial(), []

    def choose(trial: stage.Trial) -> stage.Rubric:
        from srlm_cli.evaluate import rubric as measure

        prompts = measure.prompts_of(parts.chosen_by, trial.found)
        chosen.append(measure.choose(prompts, tuple(trial.candidates), max_criteria, sampling.seed))
        return chosen[0].rubric

    def make(_: Any, done: Resumed) -> Iterator[Outcome]:
        return stage.make_rubric(parts, model, options, choose, trial, done.rows(), done.read)

    decides = identity(
        sampling, template=form.hash, write_template=writing.hash, num_candidates=num_candidates, max_tries=tries,
        rows_shown=rows_shown, scale=scale, criteria=[as_toml(one) for one in own], max_criteria=max_criteria,
        num_judgements=num_judgements, score=score, rows=records.short_hash(dumps(ranked)),
    )  # fmt: skip
    run = StageRun(
        "make-rubric", replace(stream, out=asked), None, decides | model_identity(spec), engine=model, source=reader
    )
    run.summary = summary
    tally = run.run(make)
    report(stream, reader, parts, trial, chosen[0], tally, model, template)


def criteria_of(name: str) -> stage.Rubric:
    """Return the criteria of a template; raise OptionError if it has none."""
    form = templates.load_judge(name)
    if not form.criteria:
        raise OptionError(f"template {name} has no criteria", "--criteria takes a template with [[criteria]]")
    return tuple(replace(one, weight=1.0) for one in form.criteria)


def refuse_too_few(parts: stage.Parts, source: str, writes: bool) -> None:
    """Raise DataError unless each part has rows enough."""
    named = [parts.shown, parts.chosen_by, parts.measured][0 if writes else 1 :]
    counts = [len({records.prompt_key(row["prompt"]) for row in part}) for part in named]
    if min(counts) < LEAST_PROMPTS:
        raise DataError(
            f"{source}: {sum(counts)} prompts with replies that people put in an order, expected at least "
            f"{LEAST_PROMPTS * len(named)} ({LEAST_PROMPTS} for each of {len(named)} parts)",
            "add ranked rows",
        )


def summary(tally: Tally) -> str:
    """Return the counts of the answers in one line."""
    count = tally.counts["judgements"]
    parts = [f"{tally.read} answers", f"{count} of them judgements" if count else ""]
    parts += [f"{number} dropped: {reason}" for reason, number in tally.dropped.most_common()]
    parts += [f"{number} {name}" for name, number in tally.counts.items() if number and name != "judgements"]
    tokens = f"{tally.tokens_in} tokens in, {tally.tokens_out} out"
    return f"{', '.join(filter(None, [*parts, tokens]))}; {clock(tally.seconds)}"


def report(
    stream: StreamOptions,
    reader: Reader,
    parts: stage.Parts,
    trial: stage.Trial,
    chosen: Any,
    asked: Tally,
    engine: LazyEngine,
    template: str,
) -> None:
    """Write the rubric and print how well it agrees; raise LimitExceeded, and write nothing, without one."""
    from srlm_cli.evaluate.rubric import agreement

    sizes = {
        "rows to write from": parts.shown,
        "rows to choose by": parts.chosen_by,
        "rows to measure on": parts.measured,
    }
    sizes = {name: len(part) for name, part in sizes.items()}
    tally = Tally(read=sum(sizes.values()) + parts.unordered, kept=len(chosen.rubric), seconds=asked.seconds)
    tally.tokens_in, tally.tokens_out = asked.tokens_in, asked.tokens_out
    tally.dropped["no order by people"] += parts.unordered
    count_skipped("make-rubric", tally, reader)
    tally.dropped = +tally.dropped
    tally.counts.update(sizes)
    if not stream.quiet:
        used = [f"{count} {name}" for name, count in sizes.items() if count]
        used += [f"{count} dropped: {reason}" for reason, count in tally.dropped.items()]
        say(f"srlm make-rubric: {tally.read} ranked rows: {', '.join(used)}")
    refuse_no_rubric(trial, chosen)
    found = agreement(trial, parts.measured)
    lines = [*told(found, chosen, trial, parts), *left_out(chosen)]
    if not stream.quiet:
        for line in lines:
            say(f"srlm make-rubric: {line}")
    by = f"Criteria that {engine.model or 'a model'} was asked for and judged by, made by `srlm make-rubric`."
    source = [f"Written from {len(parts.shown)} ranked rows, chosen by {len(parts.chosen_by)} others."]
    text = as_template([by, *source, *lines], template, chosen.rubric)
    about = meta("make-rubric", reader, tally, engine)
    about["rubric"] = {"alone": chosen.alone, "chosen_by": chosen.together, "measured": found}
    write_whole("make-rubric", stream.out, [text.encode()], tally, about, quiet=True)


def refuse_no_rubric(trial: stage.Trial, chosen: Any) -> None:
    """Raise LimitExceeded if nothing was kept."""
    if not trial.candidates:
        raise LimitExceeded(
            "no criteria could be read in the answers, nothing is written",
            "--max-tries gives more answers, --max-new-tokens longer ones, --criteria TEMPLATE tries your own",
        )
    if not chosen.rubric:
        best = max(chosen.alone, key=chosen.alone.__getitem__)
        raise LimitExceeded(
            f"none of {len(trial.candidates)} criteria raises the agreement with people by more than chance (the best: "
            f"{best}, {chosen.alone[best]:.3f}), nothing is written",
            "more ranked rows, another --model, or --criteria TEMPLATE with your own",
        )


def told(found: list[Record], chosen: Any, trial: stage.Trial, parts: stage.Parts) -> list[str]:
    """Return what was kept, and its agreement, in lines for people."""
    rubric, longer = found
    kept = ", ".join(f"{one.name} (weight {one.weight:g}, alone {chosen.alone[one.name]:.3f})" for one in chosen.rubric)
    if rubric["ci_low"] is None:
        interval, fails = "no interval: one prompt", "; one prompt is not enough to distinguish it from chance, 0.5"
    else:
        interval = f"95% interval {rubric['ci_low']:.3f} to {rubric['ci_high']:.3f}"
        fails = "" if rubric["ci_low"] > 0.5 else "; this is not above chance, 0.5"
    return [
        f"{len(chosen.rubric)} of {len(trial.candidates)} criteria kept: {kept}",
        f"agreement with people on the rows that they were chosen by: {chosen.together:.3f}",
        f"agreement on {len(parts.measured)} rows that were not used before: {rubric['value']:.3f} ({interval}, "
        f"{rubric['n']} pairs); the longer reply: "
        f"{longer['value']:.3f}{fails}",
    ]


def left_out(chosen: Any) -> list[str]:
    """Return the criteria that were not kept, in at most one line."""
    kept = {one.name for one in chosen.rubric}
    names = [f"{name} ({value:.3f})" for name, value in chosen.alone.items() if name not in kept]
    return [f"not kept, with their agreement alone: {', '.join(names)}"] if names else []


def as_template(comments: list[str], extends: str, rubric: stage.Rubric) -> str:
    """Return a template file with these criteria."""
    plain = ["".join(sign if sign.isprintable() else " " for sign in line) for line in comments]
    head = [*(f"# {line}" for line in plain), f'extends = "{extends}"', 'aggregate = "mean"', ""]
    return "\n".join([*head, *map(as_toml, rubric)])
