"""The prompts as files: a TOML file holds a text with `$fields` and how its answer is read.

A template is found by its name (a file of this folder) or by a path. The texts are the project's
own words for the rubric that the paper describes (arXiv 2401.10020, figure 2 and section 2.2).
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from importlib.resources import files
from pathlib import Path
from string import Template as Fields

from srlm_cli.errors import OptionError
from srlm_cli.records import short_hash


@dataclass(frozen=True)
class Template:
    """A prompt for a model, and how its answer is read.

    `text` takes `$fields`. `pattern` has one group, the verdict; its last match counts. `choices`
    are all verdicts there are, and `finish` is the line that asks for one when an answer ended
    without. `low` and `high` bound a score.
    """

    name: str
    text: str
    pattern: str = ""
    finish: str = ""
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    prefix: str = ""
    stop: tuple[str, ...] = ()
    hash: str = field(default="", compare=False)

    def render(self, **values: str) -> str:
        """Return the text with its fields filled in; a `$` inside a value stays as it is."""
        return Fields(self.text).substitute(values)

    def start(self, **values: str) -> str:
        """Return the beginning of the answer that the template gives away."""
        return Fields(self.prefix).substitute(values)

    def verdict(self, answer: str) -> str | None:
        """Return the last text in the answer that the pattern captures, or None."""
        found = self.last_match(answer)
        return found[1] if found else None

    def last_match(self, answer: str) -> re.Match[str] | None:
        """Return the pattern's last match in an answer."""
        found = list(re.finditer(self.pattern, answer))
        return found[-1] if found else None

    def score(self, answer: str) -> float | None:
        """Return the last score of a judgement, or None where there is none between `low` and `high`."""
        verdict = self.verdict(answer)
        if verdict is None:
            return None
        score = float(verdict)
        return score if self.low <= score <= self.high else None


def load(name: str, *, fields: set[str], reads: bool = False) -> Template:
    """Return a template by name or path; raise OptionError when it is missing or lacks one of `fields`.

    With `reads` it has to have a pattern, since its answers are read.
    """
    path = Path(name) if name.endswith(".toml") else files(__name__) / f"{name}.toml"
    try:
        source = path.read_text(encoding="utf-8")
        content = tomllib.loads(source)
    except OSError:
        raise OptionError(
            f"no template {name!r}", f"a path that ends in .toml, or one of {', '.join(names())}"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"template {name}: {error}") from None
    content = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    keys = {field.name for field in dataclass_fields(Template)} - {"name", "hash"}
    if unknown := set(content) - keys or {"text"} - set(content):
        raise OptionError(
            f"template {name}: unknown or missing key `{min(unknown)}`", f"it takes {', '.join(sorted(keys))}"
        )
    try:
        template = Template(name=Path(name).stem, hash=short_hash(source), **content)
        if re.compile(template.pattern).groups != (1 if template.pattern or reads else 0):
            raise TypeError("its `pattern` needs one group, the verdict")
    except (TypeError, re.error) as error:
        raise OptionError(f"template {name}: {error}") from None
    missing = {f for f in fields if f"${f}" not in template.text and f"${{{f}}}" not in template.text}
    known = set(Fields(template.text).get_identifiers()) - fields
    if missing or known:
        raise OptionError(
            f"template {name}: its text has to use the fields {', '.join('$' + f for f in sorted(fields))}",
            "missing or not known: " + ", ".join(sorted(missing | known)),
        )
    return template


def names() -> list[str]:
    """Return the names of the built-in templates."""
    return sorted(file.name[:-5] for file in files(__name__).iterdir() if file.name.endswith(".toml"))
