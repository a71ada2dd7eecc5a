"""What was seen before: keys, by hash, in memory, and the ids of the rows just before."""

from __future__ import annotations

from collections.abc import Callable

from srlm_cli.errors import BadRow
from srlm_cli.records import Record, as_messages

Check = Callable[[Record], Record | list[Record]]


def never_seen() -> Callable[[int], bool]:
    """Return a function that returns True the first time it is called with a number."""
    seen: set[int] = set()
    return lambda key: len(seen) < (seen.add(key) or len(seen))


def with_ids_checked(check: Check) -> Check:
    """Return a check of rows that also refuses an id that the rows just before have for another prompt or reply.

    In memory are the ids of the last prompt only. A row without `prompt_id` is a prompt itself.
    """
    name, prompt = None, None
    texts: dict[str, int] = {}

    def look(row: Record) -> None:
        nonlocal name, prompt
        this, asked, text = row.get("prompt_id", row["id"]), row.get("prompt"), hash(row.get("response"))
        if this == name and asked != prompt and as_messages(asked) != as_messages(prompt):
            raise BadRow(f"two prompts have the {'prompt_id' if 'prompt_id' in row else 'id'} {this}: give each an id")
        if row["id"] in texts and (this != name or texts[row["id"]] != text):
            raise BadRow(f"two replies have the id {row['id']}: give each reply, or ranking of a prompt, its own")
        if this != name:
            name, prompt = this, asked
            texts.clear()
        texts[row["id"]] = text

    def checked(row: Record) -> Record | list[Record]:
        found = check(row)
        for one in found if isinstance(found, list) else [found]:
            look(one)
        return found

    return checked
