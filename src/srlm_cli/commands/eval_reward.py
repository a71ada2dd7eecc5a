"""srlm eval reward."""

from itertools import groupby
from typing import Annotated

from typer import Option

from srlm_cli import records
from srlm_cli.commands import run
from srlm_cli.commands.grouping import grouped
from srlm_cli.commands.options import In, Out, ReadOptions, Seed
from srlm_cli.errors import DataError
from srlm_cli.records import Row
from srlm_cli.streams.reader import read_all


@grouped
def reward(
    read: ReadOptions,
    in_: In = "-",
    out: Out = "-",
    ranked: Annotated[
        str | None,
        Option("--ranked", metavar="FILE", help="Ranked rows, when the judged rows do not hold the people's ranking."),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Measure a judge against people: the paper's reward-model metrics.

    \b
    Examples:
      srlm judge --in ranked_eval.jsonl --model M1/model | srlm eval reward
      srlm eval reward --in judged.jsonl --ranked ranked_eval.jsonl --out metrics.jsonl

    Reads judged rows. Where they come from ranked rows through `srlm judge`, they hold the human
    ranking (`human`); rows from elsewhere are matched with --ranked by prompt and text. Writes one
    row a metric: `metric`, `value`, `n`, `ci_low`, `ci_high` (95%, bootstrap over prompts with
    --seed). Pairwise accuracy counts a tie of the judge as a miss; beside it stand the rate without
    ties, the tie rate, 5-best, exact match, Spearman, Kendall tau-b and what "the longest reply
    wins" would reach.
    """
    from srlm_cli.evaluate.reward import judge_metrics

    reader = run.reader(read, records.judged_record, [in_])
    people = human_values(ranked) if ranked else {}
    judged = [with_human(row, people, reader.at) for row in reader]
    reader.digests.clear()
    run.check_whole(reader)
    judged.sort(key=lambda row: row["prompt_id"])
    prompts = [list(group) for _, group in groupby(judged, key=lambda row: row["prompt_id"])]
    metrics = judge_metrics(prompts, seed)
    run.write_rows("eval reward", out, metrics, reader, read=len(judged), quiet=read.quiet)


def human_values(path: str) -> dict[tuple[str, str], float]:
    """Return what people thought of each reply, by prompt and text."""
    rows = [row for ranked in read_all(path, records.ranked_record) for row in records.responses_of(ranked)]
    return {(records.prompt_id(row["prompt"]), row["response"].strip()): row["human"] for row in rows}


def with_human(row: Row, people: dict[tuple[str, str], float], at: str) -> Row:
    """Return a judged row with `human`, its own or that of the ranked rows."""
    if "human" in row and not people:
        return row
    key = records.prompt_id(row["prompt"]), row["response"].strip()
    if key not in people:
        raise DataError(f"{at}: no human ranking of this response", "--ranked FILE has to hold its prompt and text")
    return {**row, "human": people[key]}
