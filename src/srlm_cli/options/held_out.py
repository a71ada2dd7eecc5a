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
    keys = {key: path for path in files or [] for row in read_all(path, evaluated) for key in keys_of(row)}

    def checked(row: Record) -> Record:
        record = check(row)
        for key in (records.prompt_key(record["prompt"]), spoken(record["prompt"]), record.get("prompt_key")):
            if key in keys and not unless(record):
                raise BadRow(
                    f"its prompt is in the evaluation file {keys[key]} (--held-out): do not train on evaluation prompts"
                )
        return record

    return checked if keys else check


def evaluated(row: Record) -> Record:
    """Return a row of an evaluation file: a prompt, or a conversation with `turns`."""
    return records.turns_record(row) if records.asks_turns(row) else records.prompt_record(row)


def keys_of(row: Record) -> list[str]:
    """Return the keys of the prompts of a row: of a conversation, each turn with the user's turns before it."""
    texts = row["turns"] if records.asks_turns(row) else []
    return [records.prompt_key(row["prompt"]), *(key_of_turns(texts[: at + 1]) for at in range(len(texts)))]


def spoken(prompt: records.Prompt) -> str:
    """Return the key of what the user said in a prompt."""
    return key_of_turns(records.user_turns(prompt))


def key_of_turns(texts: list[str]) -> str:
    """Return the key of the user's turns, whatever was answered."""
    return records.prompt_key("\n\n".join(texts))
