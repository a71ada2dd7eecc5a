"""srlm eval reward."""

from collections.abc import Mapping
from itertools import groupby
from operator import itemgetter
from typing import Annotated

from typer import Option

from srlm_cli import records
from srlm_cli.errors import BadRow
from srlm_cli.options.common import In, Out, ReadOptions, Seed
from srlm_cli.options.groups import grouped
from srlm_cli.records import Record
from srlm_cli.runner.inputs import check_whole, finished, open_reader
from srlm_cli.runner.outputs import refuse_own_input
from srlm_cli.runner.stage import write_metrics
from srlm_cli.stages.seen import with_ids_checked
from srlm_cli.streams.reader import Reader


@grouped
def reward(
    read: ReadOptions,
    in_: In = "-",
    out: Out = "-",
    ranked: Annotated[
        str | None,
        Option("--ranked", metavar="FILE", help="Ranked rows, when the judged rows do not have the human ranking."),
    ] = None,
    best: Annotated[float, Option("--best", help="Highest score of the judge's scale, for 5-best.")] = 5.0,
    matched_length: Annotated[
        float, Option("--matched-length", min=0.0, help="Lengths match when one reply is longer by at most this share.")
    ] = 0.25,
    by: Annotated[
        str, Option("--by", metavar="FIELD", help="Also report the accuracy for each value of this field.")
    ] = "category",
    seed: Seed = 0,
) -> None:
    """Measure a judge against people: the paper's reward-model metrics.

    \b
    Examples:
      srlm judge --in ranked_eval.jsonl --model M1/model | srlm eval reward
      srlm eval reward --in judged.jsonl --ranked ranked_eval.jsonl --out metrics.jsonl

    Reads judged rows. If `srlm judge` made them from ranked rows, they have the human ranking (`human`);
    other rows are matched with --ranked by prompt and text. Writes one row per metric: `metric`, `value`,
    `n`, `ci_low`, `ci_high` (95%, bootstrap over prompts with --seed). Pairwise accuracy counts a tie of
    the judge as a miss. The other metrics are the accuracy without ties and with ties as halves, the tie
    rate, best-of-n, 5-best, exact match, Spearman, Kendall tau-b, weighted kappa, the baselines longest,
    shortest and random reply, and the accuracy for replies of similar length. A row with `replies` or
    `category` is over the prompts with this number of replies or of this category. A row with `criterion` is the
    agreement of one criterion of the judge's template, a row with `bin` what people thought of the replies in one
    bin of the judge's score (calibration). docs/metrics.md defines each.
    """
    from srlm_cli.evaluate import reward as pure
    from srlm_cli.streams.spill import ByKey

    refuse_own_input(out, [in_, *([ranked] if ranked else [])])
    people = human_values(ranked) if ranked else None
    check = with_ids_checked(lambda row: with_human(records.judged_record(row), people))
    reader = open_reader(read, check, [in_], traced=False, beside=[ranked, out])
    prompts, judges, count = ByKey(pure.Replies), set(), 0
    for prompt, rows in groupby(finished(reader), key=itemgetter("prompt_id")):
        group = list(rows)
        prompts.add(prompt, pure.replies_of(group, seed, best, by))
        judges |= {pure.judge_name(row) for row in group}
        count += len(group)
    check_whole(reader)
    metrics = pure.metric_rows(prompts, judges, seed, matched_length)
    write_metrics("eval reward", out, metrics, reader, read=count, quiet=read.quiet)


def human_values(path: str) -> Mapping[str, float] | None:
    """Return what people thought of each reply (see `reply_key`), on disk; None of a file without rows."""
    from srlm_cli.streams.spill import Table

    reader = Reader([path], records.ranked_record, traced=False)
    values = Table()
    for ranked in finished(reader):
        for row in records.responses_of(ranked):
            values[reply_key(row)] = row["human"]
    check_whole(reader)
    return values if len(values) else None


def reply_key(row: Record) -> str:
    """Return the identity of a reply: hashes of its prompt and its text."""
    return f"{records.prompt_id(row['prompt'])}/{records.text_hash(row['response'].strip())}"


def with_human(row: Record, people: Mapping[str, float] | None) -> Record:
    """Return a judged row with `human`, its own or that of the ranked rows; raise BadRow where there is none."""
    if people is None and "human" in row:
        if not records.is_number(row["human"]):
            raise BadRow(f"expected `human`, a number, larger is better, got {row['human']!r}")
        return row
    value = people.get(reply_key(row)) if people is not None else None
    if value is None:
        raise BadRow("no human ranking of this response; --ranked FILE has to hold its prompt and text")
    return {**row, "human": value}
