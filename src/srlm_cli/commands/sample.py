"""srlm sample."""

from functools import partial
from typing import Annotated

from typer import Option

from srlm_cli import records
from srlm_cli.engines import LazyEngine, template_kwargs
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
from srlm_cli.records import Record
from srlm_cli.runner.inputs import open_reader
from srlm_cli.runner.provenance import model_identity
from srlm_cli.runner.stage import StageRun, warn_of_thoughts
from srlm_cli.stages import sample as stage
from srlm_cli.stages.seen import with_ids_checked

app = new_app()


@app.command()
@grouped
def sample(
    stream: StreamOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
    num_responses: Annotated[
        int, Option("--num-responses", "-n", min=1, max=numbers.DRAWS, help="Responses per prompt (the paper: 4).")
    ] = 4,
    system: System = None,
    shard: ShardOption = None,
) -> None:
    """Draw N candidate responses for each prompt.

    \b
    Examples:
      srlm sample --in prompts.jsonl --model M1/model --out responses.jsonl
      echo '{"prompt": "Why is the sky blue?"}' | srlm sample --model smollm2-135m-instruct -n 2
      srlm sample --in prompts.jsonl --model M1/model | srlm judge | srlm make-pairs > pairs.jsonl
      echo '{"turns": ["Name a river.", "Where does it end?"]}' | srlm sample --model M1/model -n 1

    Reads `prompt` rows (docs/data.md has the forms of other tools), writes one row per response:
    `prompt_id`, `prompt`, `response`, `thought`, `k`, `finish_reason`, `model`. A thought that was cut off has no
    answer: its `response` is null. The defaults are the paper's (arXiv 2401.10020): N=4 at temperature
    0.7, top-p 0.9.

    A row with `turns`, a list of texts of the user (MT-Bench), is answered turn by turn: N responses per
    turn, each with `turn` and `num_turns`. Their `prompt` is the conversation before them, in which the first reply
    of each earlier turn was given. A turn without a reply ends the conversation, and the rest is counted.
    """
    model = LazyEngine(engine.spec())
    rows = open_reader(stream, with_ids_checked(partial(asked, system=system)), [stream.in_], shard=shard)
    own = {"num_responses": num_responses, "system": system, "shard": rows.part}
    decides = identity(sampling, **own) | model_identity(model.spec)
    options = stage.SampleOptions(
        num_responses, sampling.sampling(model.spec), sampling.seed, template_kwargs(model.spec) if rows.peek() else {}
    )
    tally = StageRun("sample", stream, rows, decides, engine=model).run(
        lambda rows, _: stage.sample(rows, model, options)
    )
    if not stream.quiet:
        warn_of_thoughts("sample", tally, sampling, model)


def asked(row: Record, system: str | None) -> Record:
    """Return a prompt row, with a system message where one is given; its id stays that of the prompt."""
    row = records.turns_record(row) if records.asks_turns(row) else records.prompt_record(row)
    return row if system is None else {**row, "prompt": records.with_system(row["prompt"], system)}
