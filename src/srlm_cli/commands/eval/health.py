"""srlm eval health."""

from typing import Annotated

from typer import Option

from srlm_cli import records
from srlm_cli.errors import DataError, OptionError
from srlm_cli.options.common import In, OnLimit, Out, ReadOptions, Seed
from srlm_cli.options.groups import grouped
from srlm_cli.records import Record
from srlm_cli.runner.inputs import check_whole, finished, open_reader
from srlm_cli.runner.outputs import refuse_own_input
from srlm_cli.runner.stage import write_metrics
from srlm_cli.stages.seen import with_ids_checked
from srlm_cli.streams.reader import Reader, read_all


@grouped
def health(
    read: ReadOptions,
    in_: In = "-",
    out: Out = "-",
    before: Annotated[
        str | None,
        Option(
            "--before",
            metavar="FILE",
            help="Judged rows of the previous round, to report changes in length and score gap.",
        ),
    ] = None,
    reward: Annotated[
        str | None, Option("--reward", metavar="FILE", help="Output of `srlm eval reward` for this round's judge.")
    ] = None,
    reward_before: Annotated[
        str | None,
        Option("--reward-before", metavar="FILE", help="Output of `srlm eval reward` for the previous round's judge."),
    ] = None,
    max_one_score: Annotated[
        float,
        Option("--max-one-score", min=0.0, max=1.0, help="Exit with 4 when one score has a larger share than this."),
    ] = 0.95,
    min_parse_rate: Annotated[
        float,
        Option(
            "--min-parse-rate",
            min=0.0,
            max=1.0,
            help="Exit with 4 when fewer judgements than this have a readable score.",
        ),
    ] = 0.5,
    max_length_growth: Annotated[
        float, Option("--max-length-growth", min=0.0, help="Exit with 4 when responses grew by more than this factor.")
    ] = 2.0,
    max_accuracy_drop: Annotated[
        float,
        Option(
            "--max-accuracy-drop",
            min=0.0,
            max=1.0,
            help="Exit with 4 when the judge's accuracy fell by more than this.",
        ),
    ] = 0.1,
    seed: Seed = 0,
    on_limit: OnLimit = "write",
) -> None:
    """Measure the health of a judge from any judged file, and stop a loop that collapses.

    \b
    Examples:
      srlm eval health --in M1/judged.jsonl
      srlm eval health --in M2/judged.jsonl --before M1/judged.jsonl --max-length-growth 1.5 --out health.jsonl
      srlm eval health --in judged.jsonl --reward M2/eval-reward.jsonl --reward-before M1/eval-reward.jsonl

    Reads judged rows in one pass, in any order, and keeps only numbers, most of them on disk. Writes one row
    per metric: parse rate, finish reasons, the share of each score, ties, the spread within K judgements,
    the gap between best and worst, and the correlation of score and length; compared with the previous round,
    length growth, gap change and accuracy change. docs/metrics.md defines each. If a limit is exceeded, the
    command writes its rows, says why, and exits with 4. A limit without input is not checked.
    """
    from srlm_cli.evaluate import health as pure
    from srlm_cli.streams.spill import ByKey

    if reward_before and not reward:
        raise OptionError("--reward-before has nothing to compare with", "add --reward FILE")
    refuse_own_input(out, [in_, *filter(None, [before, reward, reward_before])])
    accuracies = [accuracy_in(path) if path else None for path in (reward, reward_before)]
    earlier = numbers_of_file(before) if before else None
    reader = open_reader(
        read, with_ids_checked(records.judged_record), [in_], traced=False, beside=[before, reward, reward_before, out]
    )
    judged = pure.numbers_of(finished(reader), ByKey(pure.Numbers))
    check_whole(reader)
    rows = pure.health_metrics(judged, earlier, *accuracies, seed=seed)
    limits = pure.Limits(max_one_score, min_parse_rate, max_length_growth, max_accuracy_drop)
    write_metrics(
        "eval health",
        out,
        rows,
        reader,
        read=judged.responses,
        quiet=read.quiet,
        limit=pure.over_limits(rows, limits),
        on_limit=on_limit,
    )


def numbers_of_file(path: str):
    """Return the numbers of a whole judged file; a bad row raises DataError."""
    from srlm_cli.evaluate.health import Numbers, numbers_of
    from srlm_cli.streams.spill import ByKey

    reader = Reader([path], with_ids_checked(records.judged_record), traced=False)
    numbers = numbers_of(finished(reader), ByKey(Numbers))
    check_whole(reader)
    return numbers


def accuracy_in(path: str) -> Record:
    """Return the pairwise accuracy over all prompts from the rows of `srlm eval reward`."""
    rows = [
        row
        for row in read_all(path, records.metric_record)
        if row["metric"] == "pairwise_accuracy" and not {"replies", "category", "criterion"} & row.keys()
    ]
    if not rows:
        raise DataError(f"{path}: no `pairwise_accuracy`", "expected the rows of `srlm eval reward`")
    return rows[-1]
