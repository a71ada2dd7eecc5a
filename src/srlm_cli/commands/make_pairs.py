"""srlm make-pairs."""

from typing import Annotated

from typer import Option

from srlm_cli.commands import run
from srlm_cli.commands.grouping import grouped
from srlm_cli.commands.options import Seed, StreamOptions, identity, new_app
from srlm_cli.stages import make_pairs as stage

app = new_app()


@app.command()
@grouped
def make_pairs(
    stream: StreamOptions,
    seed: Seed = 0,
    min_gap: Annotated[float, Option("--min-gap", min=0.0, help="Least difference of the two scores.")] = 0.0,
    unsorted: Annotated[
        bool, Option("--unsorted", help="The responses of a prompt do not stand together: gather all rows on disk.")
    ] = False,
) -> None:
    """Pair the best with the worst response of each prompt.

    \b
    Examples:
      srlm make-pairs --in judged.jsonl --out pairs.jsonl
      srlm judge --in responses.jsonl | srlm make-pairs > pairs.jsonl
      cat judged-*.jsonl | srlm make-pairs --unsorted --min-gap 1
      srlm make-pairs --in ranked.jsonl --out human-pairs.jsonl

    The highest score is `chosen`, the lowest `rejected`; prompts whose scores are all equal or that
    have fewer than two scored responses are dropped and counted (the paper's rule). Among responses
    of equal score the seed decides. A response without a score is never ranked. Of ranked rows
    (`responses`) the scores are people's, or minus the ranks, and the pair says `score_from: human`. The
    rows are what TRL's DPOTrainer and datasets.load_dataset("json") take.

    Memory stays the same however long the input is. A prompt whose responses do not stand together, as
    after `cat` of files that share prompts, is a bad row (exit 3), unless --unsorted gathers them first: on
    disk, in the folder for temporary files (TMPDIR), which needs room for the rows without their judgements.
    """
    from srlm_cli.streams import spill

    options = stage.PairOptions(min_gap, unsorted, seed)
    run.stage(
        "make-pairs",
        stream,
        run.reader(stream, stage.scored_record, [stream.in_], traced=False),
        identity(seed=seed, min_gap=min_gap, unsorted=unsorted),
        lambda rows, _: stage.make_pairs(rows, options, is_new=spill.Seen().add, gather=spill.gathered),
        from_the_start=True,
    )
