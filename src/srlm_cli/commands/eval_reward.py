"""srlm eval reward."""

from itertools import groupby
from operator import itemgetter
from typing import Annotated

from typer import Option

from srlm_cli import records
from srlm_cli.commands import run
from srlm_cli.commands.grouping import grouped
from srlm_cli.commands.options import In, Out, ReadOptions, Seed
from srlm_cli.errors import BadRow
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
    best: Annotated[float, Option("--best", help="The perfect score of the judge's scale, for 5-best.")] = 5.0,
    matched_length: Annotated[
        float, Option("--matched-length", min=0.0, help="Lengths match when one is at most this share longer.")
    ] = 0.25,
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
    ties and with ties as halves, the tie rate, 5-best, exact match, Spearman, Kendall tau-b, what the
    longest, the shortest or a random reply would reach, and the accuracy among replies of about
    equal length. Rows with `replies` hold only the prompts with so many replies. docs/metrics.md
    defines each.
    """
    from srlm_cli.evaluate import reward as pure
    from srlm_cli.streams.spill import ByKey

    run.refuse_own_input(out, [in_, *([ranked] if ranked else [])])
    people = human_values(ranked) if ranked else {}
    reader = run.reader(read, lambda row: with_human(records.judged_record(row), people), [in_], traced=False)
    prompts, judges, count = ByKey(pure.Replies), set(), 0
    for prompt, rows in groupby(run.finished(reader), key=itemgetter("prompt_id")):
        group = list(rows)
        prompts.add(prompt, pure.replies_of(group, seed, best))
        judges |= {pure.judge_name(row) for row in group}
        count += len(group)
    run.check_whole(reader)
    metrics = pure.metric_rows(prompts, judges, seed, matched_length)
    run.write_rows("eval reward", out, metrics, reader, read=count, quiet=read.quiet)


def human_values(path: str) -> dict[tuple[str, str], float]:
    """Return what people thought of each reply, by prompt and text."""
    rows = [row for ranked in read_all(path, records.ranked_record) for row in records.responses_of(ranked)]
    return {(records.prompt_id(row["prompt"]), row["response"].strip()): row["human"] for row in rows}


def with_human(row: Row, people: dict[tuple[str, str], float]) -> Row:
    """Return a judged row with `human`, its own or that of the ranked rows; raise BadRow where there is none."""
    if "human" in row and not people:
        if not records.is_number(row["human"]):
            raise BadRow(f"expected `human`, a number, larger is better, got {row['human']!r}")
        return row
    key = records.prompt_id(row["prompt"]), row["response"].strip()
    if key not in people:
        raise BadRow("no human ranking of this response; --ranked FILE has to hold its prompt and text")
    return {**row, "human": people[key]}
