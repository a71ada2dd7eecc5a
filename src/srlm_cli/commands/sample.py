"""srlm sample."""

from typing import Annotated

from typer import Option

from srlm_cli import records
from srlm_cli.engines import LazyEngine
from srlm_cli.options import numbers
from srlm_cli.options.common import EngineOptions, SamplingOptions, ShardOption, StreamOptions, identity, new_app
from srlm_cli.options.groups import grouped
from srlm_cli.runner.inputs import open_reader
from srlm_cli.runner.provenance import model_identity
from srlm_cli.runner.stage import StageRun
from srlm_cli.stages import sample as stage

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
    shard: ShardOption = None,
) -> None:
    """Draw N candidate responses for each prompt.

    \b
    Examples:
      srlm sample --in prompts.jsonl --model M1/model --out responses.jsonl
      echo '{"prompt": "Why is the sky blue?"}' | srlm sample --model smollm2-135m-instruct -n 2
      srlm sample --in prompts.jsonl --model M1/model | srlm judge | srlm make-pairs > pairs.jsonl

    Reads `prompt` rows (docs/data.md has the forms of other tools), writes one row per response:
    `prompt_id`, `prompt`, `response`, `k`, `finish_reason`, `model`. The defaults are the paper's
    (arXiv 2401.10020): N=4 at temperature 0.7, top-p 0.9.
    """
    model = LazyEngine(engine.spec())
    rows = open_reader(stream, records.prompt_record, [stream.in_], shard=shard)
    decides = identity(sampling, num_responses=num_responses, shard=rows.part) | model_identity(model.spec)
    options = stage.SampleOptions(num_responses, sampling.sampling(), sampling.seed)
    StageRun("sample", stream, rows, decides, engine=model).run(lambda rows, _: stage.sample(rows, model, options))
