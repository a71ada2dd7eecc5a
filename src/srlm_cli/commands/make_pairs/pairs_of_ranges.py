"""The pairs of a large file of judged rows, made by several processes: the same rows and counts as by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from srlm_cli.dataset_formats import unused_columns
from srlm_cli.errors import BadRow
from srlm_cli.options.common import StreamOptions
from srlm_cli.records import Record, is_judged_reply
from srlm_cli.runner.tally import Tally
from srlm_cli.stages import Outcome
from srlm_cli.stages import make_pairs as stage
from srlm_cli.streams import ranges, spill
from srlm_cli.streams.reader import Reader
from srlm_cli.streams.writer import encode_row


@dataclass(frozen=True)
class Pairs:
    """What became of the rows of a range, all counted as one, and the numbers of its prompts in their order."""

    outcome: Outcome
    prompts: list[int]


def pairs_of(rows: Iterable[Record], options: stage.PairOptions) -> Pairs:
    """Return the pairs of a range as lines; whether its prompts are new is left open."""
    lines: list[bytes] = []
    prompts: list[int] = []
    tally = Tally()
    for outcome in stage.make_pairs(rows, options, is_new=lambda prompt: prompts.append(prompt) or True):
        lines += map(encode_row, outcome.rows)
        tally.add(outcome)
    counted = Outcome(rows=lines, read=tally.read, dropped=dict(tally.dropped), counts=dict(tally.counts))
    return Pairs(counted, prompts)


def unwarned_record(row: Record) -> Record | list[Record]:
    """Return what `scored_record` does; refuse a row with columns that a warning counts."""
    if is_judged_reply(row):  # which has none: there are many
        return row
    checked = stage.scored_record(row)
    if unused_columns(checked[0] if isinstance(checked, list) else checked):
        raise BadRow("a row that a warning counts")
    return checked


def open_ranges(
    stream: StreamOptions, options: stage.PairOptions, files: ExitStack
) -> Iterable[ranges.RangeResult[Pairs]]:
    """Return the results that other processes make of the input; none where one process has to read it all.

    The processes end with `files`. They are forked here, before there is a thread.
    """
    alone = options.unsorted or options.earlier or options.later or options.before or stream.limit is not None
    if alone or not ranges.worthwhile(stream.in_):
        return ()
    work = partial(pairs_of, options=options)
    return files.enter_context(ranges.Ranges(stream.in_, unwarned_record, stage.group_of, work))


def make_pairs(
    rows: Reader, options: stage.PairOptions, results: Iterable[ranges.RangeResult[Pairs]] = ()
) -> Iterator[Outcome]:
    """Yield the outcomes of the results, and from where they end those of the rows that are left.

    A range with a prompt of an earlier range is processed again, up to the row where that prompt comes back.
    """
    seen = spill.Seen()
    is_new = seen.add
    for result in results:
        new = seen.add_all(result.made.prompts)
        if not all(new):
            is_new = partial(next_of, iter(new))
            break
        rows.pass_over(result.size, result.lines, result.made.outcome.read)
        yield result.made.outcome
    yield from stage.make_pairs(rows, options, is_new=is_new, group_by_key=spill.group_by_key)


def next_of(answers: Iterator[bool], prompt: int) -> bool:
    """Return the next answer of `Seen.add_all`, which has seen the prompts already."""
    return next(answers)
