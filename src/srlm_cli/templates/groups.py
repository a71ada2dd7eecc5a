"""Templates that show all replies to a prompt, and read a score for each of them from one answer."""

from __future__ import annotations

import re
from string import ascii_uppercase

from srlm_cli.errors import OptionError
from srlm_cli.templates import Template, load
from srlm_cli.templates.reading import own_words


def load_group(name: str) -> Template:
    """Return a template with `$prompt` and `$replies`, whose pattern has the groups `reply` and `score`."""
    template = load(name, fields={"prompt", "replies"})
    if not template.of_group:
        raise OptionError(f"template {name}: its `pattern` needs two groups, `reply` and `score`, and no other")
    return template


def letters(count: int) -> list[str]:
    """Return the names of replies: A to Z, then AA, AB and so on."""
    names = [*ascii_uppercase, *(one + other for one in ascii_uppercase for other in ascii_uppercase)]
    return names[:count]


def shown(replies: list[str]) -> str:
    """Return replies as the template shows them, each in a block with its letter."""
    named = zip(letters(len(replies)), replies, strict=True)
    return "\n\n".join(f"<reply {name}>\n{text}\n</reply {name}>" for name, text in named)


def scores_by_letter(answer: str, template: Template, count: int) -> list[float | None]:
    """Return the score of each of the replies: the last that the answer gives it; None if it is not in bounds."""
    found: dict[str, float | None] = {}
    for match in re.finditer(template.pattern, own_words(answer, template.pattern)):
        score = float(match["score"].replace(",", "."))
        found[match["reply"].upper()] = score if template.low <= score <= template.high else None
    return [found.get(name) for name in letters(count)]
