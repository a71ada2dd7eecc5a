"""Refuse rows whose prompt is held out for measuring."""

from collections.abc import Callable
from typing import Annotated

from typer import Option

from srlm_cli import records
from srlm_cli.errors import BadRow
from srlm_cli.records import Record
from srlm_cli.streams.reader import read_all

HeldOut = Annotated[
    list[str] | None,
    Option(
        "--held-out", metavar="FILE", help="Reject training rows whose prompt is in this evaluation file (repeatable)."
    ),
]


def refusing(
    check: Callable[[Record], Record], files: list[str] | None, unless: Callable[[Record], bool] = lambda row: False
) -> Callable[[Record], Record]:
    """Return a check of rows that also refuses rows with a prompt of `files`; white space and case are ignored.

    Rows for which `unless` is true are not used for training and are accepted. The prompt of an EFT row is that of the
    reply that it judges, its `prompt_key`.
    """
    keys = {
        records.prompt_key(row["prompt"]): path for path in files or [] for row in read_all(path, records.prompt_record)
    }

    def checked(row: Record) -> Record:
        record = check(row)
        for key in (records.prompt_key(record["prompt"]), record.get("prompt_key")):
            if key in keys and not unless(record):
                raise BadRow(
                    f"its prompt is in the evaluation file {keys[key]} (--held-out): do not train on evaluation prompts"
                )
        return record

    return checked if keys else check
