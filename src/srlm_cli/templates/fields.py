"""The text of a template: `$fields`, and optional blocks `$[ ... $]` that need the fields in them.

A field is `$name` or `${name}`; `${a.b.0}` is field `b` of the object `a`, and of it the first item of a list. A block
is left out if one of its fields is missing. Values are put in once and are not read again, so a `$prompt` in a value
stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from string import Template
from typing import Any

from srlm_cli.errors import BadRow
from srlm_cli.records import as_text

# `$[` and `$]`; if one is alone on its line, the line goes with it. `$$[` is a `$` and a bracket.
BORDER = re.compile(r"\$\$|^[ \t]*(\$[\[\]])[ \t]*(?:\n|\Z)|(\$[\[\]])", re.MULTILINE)


class Fields(Template):
    """A text with `$fields`, of which those in braces can have a path."""

    braceidpattern = r"(?a:[_a-z][_a-z0-9-]*(?:\.[_a-z0-9-]+)*)"


@dataclass(frozen=True)
class Piece:
    """A part of a text, which is left out without its fields if it is `optional`."""

    text: Fields
    names: frozenset[str]
    optional: bool


@cache
def pieces(text: str) -> tuple[Piece, ...]:
    """Return the parts of a text in order; raise ValueError for a text that cannot be read."""
    parts, begin, opened = [], 0, False
    for border in BORDER.finditer(text):
        sign = border[1] or border[2]
        if sign is None:  # $$
            continue
        if (sign == "$[") is opened:
            raise ValueError("each `$[` of its text needs a `$]` after it, and blocks do not hold blocks")
        parts.append((text[begin : border.start()], opened))
        begin, opened = border.end(), not opened
    if opened:
        raise ValueError("a `$[` of its text has no `$]`")
    parts.append((text[begin:], False))
    found = []
    for part, optional in parts:
        fields = Fields(part)
        if not fields.is_valid():
            raise ValueError("a `$` of its text that begins no field has to be doubled, `$$`")
        found.append(Piece(fields, frozenset(fields.get_identifiers()), optional))
        if optional and not found[-1].names:
            raise ValueError("a block `$[ ... $]` of its text has no field")
    return tuple(found)


def names_in(text: str, *, needed: bool = False) -> set[str]:
    """Return the fields of a text; with `needed` only those outside of optional blocks."""
    return {name for piece in pieces(text) if not (needed and piece.optional) for name in piece.names}


def rendered(text: str, row: Mapping[str, Any], **known: str) -> str:
    """Return a text with its fields: those that are `known`, blank or not, and others from a record.

    Raises BadRow if a field is missing that the text needs.
    """
    made = []
    for piece in pieces(text):
        found = {name: known[name] if name in known else value_of(row, name) for name in piece.names}
        if missing := [name for name in sorted(found) if found[name] is None]:
            if piece.optional:
                continue
            raise BadRow(f"expected `{missing[0]}`, a field that the template uses, got none")
        made.append(piece.text.substitute(found))
    return "".join(made)


def value_of(row: Mapping[str, Any], name: str) -> str | None:
    """Return a field of a record as text, or None if it is missing: not there, null, blank or empty."""
    value: Any = row
    for step in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    text = text_of(value)
    return text if text.strip() else None


def text_of(value: Any) -> str:
    """Return a JSON value as text: a text as it is, a dialogue turn by turn, a list of texts as lines, else JSON."""
    if isinstance(value, str):
        return value
    if value is None or value == [] or value == {}:
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(f"- {part}" for part in value)
    if isinstance(value, list) and all(map(is_turn, value)):
        return as_text(value)
    return json.dumps(value, ensure_ascii=False, default=str)  # TOML has dates


def is_turn(value: Any) -> bool:
    """Return whether a value is a chat message."""
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
