"""srlm eval probe."""

from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from typer import Option

from srlm_cli import records
from srlm_cli.engines import LazyEngine, template_kwargs
from srlm_cli.errors import OptionError
from srlm_cli.options import numbers
from srlm_cli.options.common import EngineOptions, SamplingOptions, StreamOptions, System, identity
from srlm_cli.options.groups import grouped
from srlm_cli.options.judging import judge_template, refuse_without_choices
from srlm_cli.runner.inputs import open_reader
from srlm_cli.runner.outputs import refuse_clash, refuse_own_input
from srlm_cli.runner.provenance import model_identity
from srlm_cli.runner.stage import StageRun, write_metrics
from srlm_cli.runner.tally import Tally
from srlm_cli.stages import judge as stage_judge
from srlm_cli.stages.probes import PROBES
from srlm_cli.stages.seen import with_ids_checked


@grouped
def probe(
    stream: StreamOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
    num_judgements: Annotated[
        int, Option("--num-judgements", "-k", min=1, max=numbers.DRAWS, help="Judgements per reply, averaged.")
    ] = 3,
    template: Annotated[
        str, Option("--template", help="Judge prompt: built-in template name or .toml file.")
    ] = "additive",
    score: Annotated[
        Literal["text", "expected"], Option("--score", help="How a score is read, as in `srlm judge`.")
    ] = "text",
    force_score: Annotated[
        bool,
        Option("--force-score/--no-force-score", help="Ask the model for a score when a judgement has none."),
    ] = False,
    system: System = None,
    probe: Annotated[list[str] | None, Option("--probe", metavar="NAME", help="Only this probe (repeatable).")] = None,
    probed: Annotated[
        str | None, Option("--probed", metavar="FILE", help="Write every changed reply to this file, with both scores.")
    ] = None,
    max_probe_wins: Annotated[
        float,
        Option("--max-probe-wins", min=0.0, max=1.0, help="Exit with 4 when a probe wins more often than this."),
    ] = 1.0,
) -> None:
    """Probe a judge with replies that were changed and got no better.

    \b
    Examples:
      srlm eval probe --in M1/judged.jsonl --model M1/model --limit 50
      srlm eval probe --in M1/judged.jsonl --model M1/model --score expected --probed probed.jsonl --max-probe-wins 0.5
      srlm eval probe --in responses.jsonl --model M1/model --probe score-stuffed --probe instruction

    Reads responses, judged or not. The judge scores each reply as it is, and after each change: emptied, cut
    off in the middle, padded with filler, doubled, with praise of the question, with the best score written
    below it, with an instruction to the judge, replaced by the reply to another prompt, with wrong numbers. A
    probe that cannot change a reply is left out for it. Writes for each probe `changed_wins`, the share of
    changed replies with a higher score than before, `changed_ties`, `score_change` (the mean difference) and
    `scored_rate`, with intervals; the rows without `probe` are over all. Use the judge's settings of the loop.
    """
    from srlm_cli.evaluate import probes as measure
    from srlm_cli.streams.spill import ByKey

    names = list(dict.fromkeys(probe or PROBES))
    for name in names:
        if name not in PROBES:
            raise OptionError(f"--probe {name}: no such probe", f"one of {', '.join(PROBES)}")
    refuse_own_input(stream.out, [stream.in_])
    refuse_clash("--probed", probed, stream.out, [stream.in_])
    form = judge_template(template, system)
    refuse_without_choices(form, template, score, force_score)
    check = with_ids_checked(stage_judge.with_fields_of(form, records.response_record))
    reader = open_reader(stream, check, [stream.in_], beside=[probed])
    spec = engine.spec()
    model = LazyEngine(spec)
    options = stage_judge.JudgeOptions(
        form, num_judgements, sampling.sampling(spec), sampling.seed, force_score, score, system=system,
        template_kwargs=template_kwargs(spec) if reader.peek() else {},
    )  # fmt: skip
    found = ByKey(measure.Probed)

    def make(rows, done):
        from srlm_cli.stages.probes import probe as run

        for row in done.rows():
            found.add(row["prompt_id"], measure.probed(row))
        for outcome in run(rows, model, options, names):
            for row in outcome.rows:
                found.add(row["prompt_id"], measure.probed(row))
            yield outcome

    decides = identity(
        sampling, template=form.hash, num_judgements=num_judgements, score=score, force_score=force_score,
        system=system, probe=names,
    )  # fmt: skip
    decides |= model_identity(spec) if reader.peek() else {}
    run = StageRun("eval probe", replace(stream, out=probed), reader, decides, engine=model)
    run.summary = partial(Tally.summary, kept="probed replies")
    tally = run.run(make)
    rows = measure.probe_metrics(found, names, model.model, sampling.seed)
    limit = measure.over_limit(rows, max_probe_wins)
    write_metrics(
        "eval probe", stream.out, rows, reader, read=tally.kept, quiet=True, limit=limit, on_limit=stream.on_limit
    )
