"""The rows that a command reads: its reader, and what became of the input when it has ended."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

from srlm_cli import distributed
from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.options.common import ReadOptions
from srlm_cli.records import Record
from srlm_cli.runner.outputs import same_file
from srlm_cli.runner.tally import Tally
from srlm_cli.streams.console import say
from srlm_cli.streams.reader import Reader, Shard, count_lines, open_lines
from srlm_cli.streams.writer import Rejects

Check = Callable[[Record], Record | list[Record]]


def open_reader(
    options: ReadOptions,
    check: Check,
    paths: list[str],
    *,
    traced: bool = True,
    shard: Shard | None = None,
    group_of: Callable[[Record], Hashable] | None = None,
    beside: Iterable[str | None] = (),
) -> Reader:
    """Return the reader of a command's input; it writes the `--rejects` file, which is none of those `beside`.

    `traced` is False for commands that are never resumed in the middle of their input. No `shard` cuts a group of
    consecutive rows with the same key, `group_of`.
    """
    if options.rejects and options.on_error != "skip":
        raise OptionError("--rejects needs --on-error skip", "add --on-error skip")
    for path in (*paths, *beside, getattr(options, "out", None)):
        if options.rejects and path and path != "-" and same_file(options.rejects, path):
            raise OptionError(f"--rejects {options.rejects} is a file of this command already", "another name")
    if "-" in paths and distributed.count() > 1:
        raise OptionError(f"{distributed.count()} processes cannot share stdin", "--in FILE")
    rejects = Rejects(options.rejects if distributed.is_main() else os.devnull) if options.rejects else None
    reading = {"on_error": options.on_error, "limit": options.limit, "rejects": rejects}
    return Reader(paths, check, **reading, traced=traced, shard=shard, group_of=group_of)


def refuse_missing(paths: Iterable[str]) -> None:
    """Raise OptionError for an input that is not there, before FILE.part begins; no pipe is opened for this."""
    for path in paths:
        if path != "-" and not os.path.exists(path):
            with open_lines(path):
                pass


def expected(rows: Reader, limit: int | None) -> int | None:
    """Return the number of records in the input, if the number of lines gives it; else None."""
    if rows.expands:
        return None
    if rows.shard:
        return rows.span[1] - rows.span[0]
    lines = count_lines(rows.paths)
    return lines if limit is None or lines is None else min(lines, limit)


def count_skipped(name: str, tally: Tally, rows: Reader | None) -> None:
    """Count the bad rows that were skipped before the stage, and warn of rows that were changed or read in part."""
    if rows is None:
        return
    if rows.skipped:
        tally.dropped["bad row"] = rows.skipped
    warn(name, rows.noted)
    if rows.rejects:
        rows.rejects.open()  # also where there were none


def warn(name: str, noted: Mapping[str, int]) -> None:
    """Print how many rows, or answers of a server, were not taken as they are; once per command, also with --quiet."""
    for what, count in noted.items():
        say(f"srlm {name}: warning: {count} {what}")


def check_whole(rows: Reader | None) -> None:
    """Raise the error of a bad row that ended the input; every row must have been read, and have had an outcome."""
    if rows is None:
        return
    if rows.error:
        error, rows.error = rows.error, None
        raise error
    left = f"{rows.unfinished} rows were read but not finished" if rows.unfinished else ""
    if left or rows.take() is not None:
        raise SrlmError(left or "not all rows were read", "this is a bug in srlm, please report it")


def finished(rows: Reader) -> Iterator[Record]:
    """Yield the rows and mark each as finished immediately, so that nothing of it is stored."""
    for row in rows:
        rows.finish(1)
        yield row


def all_rows(rows: Reader, *, origins: bool = False) -> list[Record]:
    """Return all rows of an input; a bad row raises DataError.

    With `origins` each row has its `origin`, for `Reader.refuse_row`, because it can be refused later.
    """
    found = [{**row, "origin": rows.origin} for row in rows] if origins else list(rows)
    rows.finish(len(found))
    check_whole(rows)
    return found
