"""srlm eval rules."""

from collections.abc import Callable
from typing import Annotated

from typer import Option

from srlm_cli import records
from srlm_cli.errors import BadRow, DataError, OptionError
from srlm_cli.options.common import In, OnLimit, Out, ReadOptions, Seed
from srlm_cli.options.groups import grouped
from srlm_cli.options.rules import RuleSource, with_rules_checked
from srlm_cli.records import Record
from srlm_cli.runner.inputs import check_whole, finished, open_reader
from srlm_cli.runner.outputs import refuse_own_input
from srlm_cli.runner.stage import write_metrics
from srlm_cli.stages.seen import with_ids_checked
from srlm_cli.streams.reader import Reader, read_all


@grouped
def rules(
    read: ReadOptions,
    source: RuleSource,
    in_: In = "-",
    out: Out = "-",
    prompts: Annotated[
        str | None,
        Option(
            "--prompts",
            metavar="FILE",
            help="Prompts with `rules`, for responses without; in srlm.toml also the prompts that `make iterate` asks.",
        ),
    ] = None,
    before: Annotated[
        str | None,
        Option("--before", metavar="FILE", help="Output of this command for the previous round, for --max-fall."),
    ] = None,
    max_fall: Annotated[
        float | None,
        Option(
            "--max-fall",
            min=0.0,
            max=1.0,
            show_default="no limit",
            help="Exit with 4 when the share of rules kept is lower than before by more than this.",
        ),
    ] = None,
    seed: Seed = 0,
    on_limit: OnLimit = "write",
) -> None:
    """Check the rules that responses have to keep: a measure without a judge.

    \b
    Examples:
      srlm eval rules --in responses.jsonl --rule no-commas --rule words:..30
      srlm sample --in ruled.jsonl --model M2/model | srlm eval rules --out rules.jsonl
      srlm eval rules --in responses.jsonl --prompts ruled.jsonl --before M1/eval-rules.jsonl --max-fall 0.05

    Reads response rows, judged rows or ranked rows. The rules of a row are those of --rule and --rule-file and
    those in its field `rules`, a list such as ["no-commas", "words:..30"]. Writes `rules_kept`, the share of
    rules kept, for each rule (`rule`) and for all; `all_rules_kept`, the share of responses that keep all
    their rules; and `length`, the mean number of characters. Each has a 95% interval, a bootstrap over
    prompts with --seed. A response without text keeps no rule. docs/rules.md lists the rules.
    """
    from srlm_cli.evaluate import rules as pure
    from srlm_cli.streams.spill import ByKey

    refuse_own_input(out, [in_, *filter(None, [prompts, before])])
    rules = source.rules()
    earlier = total_in(before) if before else None
    check = with_ids_checked(with_rules_checked(adding_rules(responses, prompts), rules))
    reader = open_reader(read, check, [in_], traced=False, beside=[prompts, before, out])
    found, names, models, count = ByKey(pure.Kept), set(), set(), 0
    for row in finished(reader):
        try:
            one = pure.kept_of(row, rules.of(row))
        except BadRow as error:
            raise DataError(f"{reader.at}: {error}") from None
        found.add(row["prompt_id"], one)
        names.update(one.names)
        models.add(row.get("model") if isinstance(row.get("model"), str) else None)
        count += 1
    check_whole(reader)
    if count and not names:
        raise OptionError("no row has `rules`, and there is no --rule", "--rule NAME, or --prompts FILE")
    metrics = pure.rule_metrics(found, names, models, seed)
    limit = pure.fell(metrics, earlier, max_fall) if earlier and max_fall is not None else None
    write_metrics("eval rules", out, metrics, reader, read=count, quiet=read.quiet, limit=limit, on_limit=on_limit)


def responses(row: Record) -> Record | list[Record]:
    """Return a response record, or the responses of a ranked record."""
    if "responses" in row and "response" not in row:
        return records.responses_of(records.ranked_record(row))
    return records.response_record(row)


def adding_rules(check: Callable[[Record], Record | list[Record]], path: str | None) -> Callable:
    """Return a check of rows that also gives rows without `rules` those of their prompt in a file."""
    if path is None:
        return check
    from srlm_cli.streams.spill import Table

    reader = Reader([path], records.prompt_record)
    by_prompt = Table()
    for row in finished(reader):
        by_prompt[records.prompt_id(row["prompt"])] = row.get("rules")
    check_whole(reader)

    def checked(row: Record) -> Record | list[Record]:
        found = check(row)
        return list(map(ruled, found)) if isinstance(found, list) else ruled(found)

    def ruled(row: Record) -> Record:
        if row.get("rules") is not None:
            return row
        key = records.prompt_id(row["prompt"])
        if key not in by_prompt:
            raise BadRow(f"its prompt is not in {path} (--prompts), and it has no `rules`")
        return {**row, "rules": by_prompt[key]}

    return checked


def total_in(path: str) -> Record:
    """Return the share of all rules kept from the rows of this command."""
    from srlm_cli.evaluate.rules import total_kept

    row = total_kept(read_all(path, records.metric_record))
    if row is None:
        raise DataError(f"{path}: no `rules_kept`", "expected the rows of `srlm eval rules`")
    return row
