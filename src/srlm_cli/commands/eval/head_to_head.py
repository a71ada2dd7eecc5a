"""srlm eval head-to-head."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from typer import Option

from srlm_cli import records, templates
from srlm_cli.engines import LazyEngine
from srlm_cli.errors import OptionError
from srlm_cli.options.common import EngineOptions, SamplingOptions, StreamOptions, identity
from srlm_cli.options.groups import Defaults, grouped
from srlm_cli.records import Record
from srlm_cli.runner.inputs import check_whole, finished, open_reader
from srlm_cli.runner.outputs import refuse_clash, refuse_own_input
from srlm_cli.runner.provenance import model_identity
from srlm_cli.runner.stage import StageRun, write_metrics
from srlm_cli.runner.tally import Tally
from srlm_cli.streams.console import say
from srlm_cli.streams.reader import Reader, shown


@grouped
def head_to_head(
    stream: StreamOptions,
    engine: EngineOptions,
    sampling: Annotated[SamplingOptions, Defaults(temperature=0.0, max_new_tokens=256)],
    against: Annotated[
        list[str] | None,
        Option("--against", metavar="FILE", help="Responses of another model to compare with (repeatable)."),
    ] = None,
    matches: Annotated[
        str | None, Option("--matches", metavar="FILE", help="Write every match to this file, with both verdicts.")
    ] = None,
    by: Annotated[
        str, Option("--by", metavar="FIELD", help="Also report rates for each value of this field.")
    ] = "category",
    direct: Annotated[
        bool,
        Option("--direct/--no-direct", help="Read the verdict from the probabilities of A and B, without reasons."),
    ] = False,
    template: Annotated[
        str, Option("--template", help="Pairwise prompt: a built-in name or a .toml file.")
    ] = "pairwise",
) -> None:
    """Compare the responses of two or more models, with a model as the judge, in both orders.

    \b
    Examples:
      srlm eval head-to-head --in M2/responses.jsonl --against M1/responses.jsonl --model M2/model
      srlm sample --in prompts.jsonl --model M2/model -n 1 | srlm eval head-to-head --against m1.jsonl --model M2/model
      srlm eval head-to-head --in m3.jsonl --against m2.jsonl --against m1.jsonl --model M3/model --matches m.jsonl

    Reads responses of one model and, for each --against, of another model to the same prompts. The prompts
    are those of --in; the first response to each prompt counts. The judge sees both orders; if its verdicts
    disagree, the match is a tie (arXiv 2401.10020, section 3.2). Writes one row per metric for each pair of
    files, from the view of the first file: `win`, `tie`, `loss`, `win_rate` (a tie is half a win),
    `length_controlled_win_rate` (at equal lengths), `first_position` (0.5 means no position bias), and the
    mean lengths in characters. With --direct also `preference_rate`: the share of prompts for which the
    probability that the first is better, averaged over both orders, is above one half; use it if position
    bias makes every match a tie. Rates by category are rows with a `category`.

    With three or more files each model also has a `bradley_terry` rating (maximum likelihood over all
    matches; 400 points are odds of 10:1; the mean of the models is 0). One tie is added for each pair of
    models, so that a model that won everything has a finite rating. A table goes to stderr. The name of a
    model is the `model` of its rows, or the file name if two files have the same `model`.
    """
    from srlm_cli.evaluate import standings
    from srlm_cli.stages import head_to_head as compare
    from srlm_cli.streams import spill

    if not against:
        raise OptionError("no --against FILE", "responses of the model to compare with")
    files = [stream.in_, *against]
    refuse_clashes(files, stream.out, matches)
    form = templates.load(template, fields={"prompt", "first", "second"}, reads=True)
    if direct and not (form.finish and form.choices):
        raise OptionError(f"template {template} has no `finish` and `choices`", "--direct needs them")
    others = [read_first(path) for path in against]
    if os.path.isfile(stream.in_):  # before a model is loaded; for a pipe this is known only at its end
        rows = Reader([stream.in_], records.response_record, on_error="skip", limit=stream.limit)
        compare.check_common((row["prompt_id"] for row in rows), [other.responses for other in others], files)
    reader = open_reader(stream, records.response_record, [stream.in_], beside=[*against, matches])
    first = [reader.peek(), *(next(iter(other.responses.values()), None) for other in others)]
    names = compare.names_of([row.get("model") if row else None for row in first], files)
    model = LazyEngine(engine.spec())
    options = compare.HeadToHeadOptions(form, sampling.sampling(engine.spec()), sampling.seed, direct, by)
    played = spill.Rows()

    def play(rows, done):
        sources = [rows, *(other.responses for other in others)]
        entries = [compare.Entry(*one) for one in zip(names, map(shown, files), sources, strict=True)]
        for match in done.rows():
            played.add(compare.numbers_of(match))
        for outcome in compare.head_to_head(entries, model, options, kept=played, is_new=spill.Seen().add):
            for match in outcome.rows:
                played.add(compare.numbers_of(match))
            yield outcome

    digests = [other.digest for other in others]
    decides = identity(sampling, template=form.hash, direct=direct, by=by, against=digests, names=names)
    decides |= model_identity(model.spec)
    run = StageRun("eval head-to-head", replace(stream, out=matches), reader, decides, engine=model)
    run.summary = partial(Tally.summary, kept="matches")
    tally = run.run(play)
    metrics = standings.metrics(played, names, sampling.seed)
    if len(files) > 2 and not stream.quiet:
        for line in standings.table(metrics, names):
            say(line)
    write_metrics("eval head-to-head", stream.out, metrics, reader, read=tally.kept, quiet=True)


@dataclass(frozen=True)
class Other:
    """The first response of a file to each prompt, by its id, and a hash of the file's rows."""

    responses: Mapping[str, Record]
    digest: str


def read_first(path: str) -> Other:
    """Read a whole file of responses; they are kept on disk."""
    from srlm_cli.stages.head_to_head import first_responses
    from srlm_cli.streams.spill import Table

    reader = Reader([path], records.response_record)
    responses = first_responses(finished(reader), Table())
    check_whole(reader)
    return Other(responses, reader.digest.hex())


def refuse_clashes(inputs: list[str], out: str, matches: str | None) -> None:
    """Raise OptionError when one file would be read twice from stdin, or written twice, or read and written."""
    if inputs.count("-") > 1:
        raise OptionError("stdin can be only one of the files", "--in or --against has to name a file")
    refuse_own_input(out, inputs)
    refuse_clash("--matches", matches, out, inputs)
