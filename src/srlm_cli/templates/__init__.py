"""Prompt templates: a TOML file has a text with `$fields`, and a pattern that reads the answer.

A template is found by its name (a file in this folder) or by a path. The built-in texts were written for this project
and follow the rubric of the paper (arXiv 2401.10020, figure 2 and section 2.2).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

from srlm_cli.errors import BadRow, OptionError
from srlm_cli.records import Message, Record, is_number, short_hash
from srlm_cli.templates import criteria as criteria_of
from srlm_cli.templates.criteria import AGGREGATES, Criterion, Finding
from srlm_cli.templates.fields import Fields, names_in, rendered, value_of
from srlm_cli.templates.reading import Found, read, verdict_groups


@dataclass(frozen=True)
class Template:
    """A prompt for a model, and the pattern that reads its answer.

    `text` has `$fields` and optional blocks (see `fields`), and so has `system`, the system message. Each of `examples`
    has such fields and an `answer`: two turns before the text. `pattern` has one group, the verdict, or two groups `a`
    and `b`, the scores of two replies; its last match counts. `choices` are all possible verdicts. `finish` is the line
    that asks for a verdict if an answer ended without one. `low` and `high` are the bounds of a score. With `direct`
    the answer starts with `finish`, without reasons before the verdict. An answer ends after a line that matches
    `last_line`. With `criteria` the answer is JSON (see `criteria`), and `aggregate` makes one score of their values.
    """

    name: str
    text: str
    pattern: str = ""
    finish: str = ""
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    direct: bool = False
    prefix: str = ""
    stop: tuple[str, ...] = ()
    last_line: str = ""
    system: str = ""
    examples: tuple[Record, ...] = field(default=(), hash=False)
    criteria: tuple[Criterion, ...] = ()
    aggregate: str = "mean"
    hash: str = field(default="", compare=False)

    def chat(self, row: Mapping[str, Any] | None = None, **known: str) -> list[Message]:
        """Return the prompt as messages: the system message, the examples and the text.

        Fields are those that are `known`, and those of a record. Raises BadRow if a field is missing.
        """
        row, known = row or {}, {**known, **self.own_fields}
        turns = [("system", rendered(self.system, row, **known))] if self.system else []
        for example in self.examples:
            turns += [("user", rendered(self.text, example, **self.own_fields)), ("assistant", example["answer"])]
        turns.append(("user", rendered(self.text, row, **known)))
        return [{"role": role, "content": text.strip()} for role, text in turns]

    @property
    def own_fields(self) -> dict[str, str]:
        """The fields that the template gives itself: its criteria, and the form of the answer."""
        if not self.criteria:
            return {}
        return {
            "criteria": criteria_of.listed(self.criteria),
            "form": criteria_of.form(self.criteria, self.direct),
        }

    def uses(self, name: str) -> bool:
        """Return whether the text or the system message has a field of this name."""
        return name in names_in(self.text) | names_in(self.system)

    def refuse_without_fields(self, row: Mapping[str, Any], known: Container[str]) -> None:
        """Raise BadRow if a field is missing in a record that the template needs, beside those that are `known`."""
        for name in sorted(names_in(self.text, needed=True) | names_in(self.system, needed=True)):
            if name not in known and name not in self.own_fields and value_of(row, name) is None:
                raise BadRow(f"expected `{name}`, a field that template {self.name} uses, got none")

    def start(self, **values: str) -> str:
        """Return the start of the answer, if the template sets it."""
        return Fields(self.prefix).substitute(values)

    def verdict(self, answer: str) -> str | None:
        """Return the last text in the answer that the pattern captures, or None.

        Of two scores the verdict is `A` or `B`, whichever is higher, or `tie`.
        """
        if self.compares:
            scores = self.scores(answer)
            return scores and ("tie" if scores[0] == scores[1] else "A" if scores[0] > scores[1] else "B")
        found = self.last_match(answer)
        return next(iter(found.texts.values())) or None if found else None

    def score(self, answer: str) -> float | None:
        """Return the last score of a judgement, or None if there is none from `low` to `high`.

        With criteria it is that of all their values.
        """
        if self.criteria:
            return self.total(self.findings(answer))
        scores = self.scores(answer)
        return scores[0] if scores else None

    def findings(self, answer: str) -> dict[str, Finding]:
        """Return what an answer says about the criteria, by name, without those that cannot be read."""
        return criteria_of.read(answer, self.criteria)

    def total(self, found: Mapping[str, Finding]) -> float | None:
        """Return the score of findings, from `low` to `high`; None if one is missing, or if no criterion applies."""
        share = criteria_of.share(found, self.criteria, self.aggregate)
        return None if share is None else self.low + share * (self.high - self.low)

    def scores(self, answer: str) -> tuple[float, ...] | None:
        """Return the one score of an answer, or the two of `a` and `b`; None unless all are in bounds."""
        found = self.last_match(answer)
        if not found or None in found.texts.values():  # an optional group of the pattern
            return None
        texts = [found.texts["a"], found.texts["b"]] if self.compares else list(found.texts.values())
        try:
            scores = tuple(float(text.replace(",", ".")) for text in texts)
        except ValueError:
            return None
        return scores if all(self.low <= score <= self.high for score in scores) else None

    def last_match(self, answer: str) -> Found | None:
        """Return the match of the pattern that counts (see `reading`), with its position in the answer."""
        return read(answer, self.pattern, self.finish)

    @property
    def compares(self) -> bool:
        """Whether the pattern reads two scores."""
        return {"a", "b"} <= set(re.compile(self.pattern).groupindex)

    @property
    def of_group(self) -> bool:
        """Whether the pattern reads the name and the score of each of several replies (see `groups`)."""
        return {"reply", "score"} == set(re.compile(self.pattern).groupindex)


JUDGES = {"response": "one reply", "second": "two replies", "replies": "all replies to a prompt"}  # by a field
JUDGED = frozenset({"prompt", "response"})  # the fields of every judge template


def load_judge(name: str) -> Template:
    """Return a template that judges one reply, by name or path; it can use any field of the row."""
    return load(name, fields=set(JUDGED), reads=True, of_rows=True)


def load(name: str, *, fields: set[str], reads: bool = False, of_rows: bool = False) -> Template:
    """Return a template by name or path; raise OptionError if it is missing, invalid or lacks one of `fields`.

    With `reads` the template needs a pattern. With `of_rows` it can have other fields, too: those of a row.
    """
    content, source = _content(name)
    keys = {field.name for field in dataclass_fields(Template)} - {"name", "hash"}
    if unknown := set(content) - keys or {"text"} - set(content):
        raise OptionError(
            f"template {name}: unknown or missing key `{min(unknown)}`",
            f"valid keys: {', '.join(sorted(keys | {'extends'}))}",
        )
    try:
        _check_kinds(content)
        content["criteria"] = criteria_of.of_template(content.get("criteria", ()))
        template = Template(name=Path(name).stem, hash=short_hash(source), **content)
        re.compile(template.last_line)
        _check_criteria(template, of_rows)
        _check_fields(template, fields | template.own_fields.keys(), of_rows)
        if template.criteria:
            _check_scores(template)
        elif template.pattern or reads:
            if "replies" not in fields:
                _check_groups(template, two={"first", "second"} <= fields)
            if template.compares or not {"first", "second"} <= fields:
                _check_scores(template)
        _check_examples(template)
    except (TypeError, ValueError, re.error) as error:
        raise OptionError(f"template {name}: {error}") from None
    return template


def _content(name: str) -> tuple[dict[str, Any], str]:
    """Return the keys of a template file, merged over those of the template that it extends, and all source text."""
    path = Path(name) if name.endswith(".toml") else files(__name__) / f"{name}.toml"
    try:
        source = path.read_text(encoding="utf-8-sig")
        content = tomllib.loads(source)
    except OSError:
        raise OptionError(
            f"no template {name!r}", f"a path that ends in .toml, or one of {', '.join(names())}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"template {name}: {error}") from None
    content = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    if (base := content.pop("extends", None)) is None:
        return content, source
    if base not in names():
        raise OptionError(f"template {name} extends {base!r}", f"one of {', '.join(names())}")
    under, under_source = _content(base)
    merged = {**under, **content}
    low, high = merged.get("low"), merged.get("high")
    if "choices" in under and "choices" not in content and is_number(low) and is_number(high):
        merged["choices"] = tuple(choice for choice in under["choices"] if not _beyond(choice, low, high))
    return merged, source + under_source


def _beyond(choice: str, low: float, high: float) -> bool:
    """Return whether a choice is a number outside of a scale."""
    try:
        return not low <= float(choice) <= high
    except ValueError:
        return False


def _check_kinds(content: dict[str, Any]) -> None:
    """Raise TypeError if a value has another type than the default of its key."""
    for key, value in content.items():
        default = getattr(Template, key, "")
        if key == "examples":
            right, kind = isinstance(value, tuple) and all(map(_is_example, value)), "tables with an `answer`"
        elif key == "criteria":
            right, kind = isinstance(value, tuple), "tables with a name, a description and a scale"
        elif isinstance(default, tuple):
            right, kind = isinstance(value, tuple) and all(isinstance(part, str) for part in value), "a list of texts"
        elif isinstance(default, float):
            right, kind = is_number(value), "a number"
        else:
            right, kind = isinstance(value, type(default)), "true or false" if isinstance(default, bool) else "a text"
        if not right:
            raise TypeError(f"its `{key}` has to be {kind}")


def _is_example(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("answer"), str)


def _check_fields(template: Template, fields: set[str], of_rows: bool) -> None:
    """Raise ValueError unless the text has these fields outside of blocks, and no others except those `of_rows`."""
    used, beside = names_in(template.text, needed=True), names_in(template.text) | names_in(template.system)
    begin = Fields(template.prefix)
    if not begin.is_valid() or not set(begin.get_identifiers()) <= {"next"}:
        raise ValueError("its `prefix` takes the field $next only")
    wrong = (fields - used) | (set() if of_rows else beside - fields)
    if wrong:
        other = next((kind for field, kind in JUDGES.items() if field in beside - fields and fields & set(JUDGES)), "")
        other = other and f"; it is a template that judges {other}"
        wanted, wrong = (", ".join(sorted(some)) for some in ({"$" + field for field in fields}, wrong))
        raise ValueError(f"its text has to use the fields {wanted}; missing or not known: {wrong}{other}")


def _check_criteria(template: Template, of_rows: bool) -> None:
    """Raise ValueError if a template has criteria and may not, or has other ways to read a score beside them."""
    if template.aggregate not in AGGREGATES:
        raise ValueError(f"its `aggregate` has to be one of {', '.join(AGGREGATES)}")
    if not template.criteria:
        return
    if not of_rows:
        raise ValueError("only a template that judges one reply has `criteria`")
    if beside := [key for key in ("pattern", "finish", "choices", "last_line") if getattr(template, key)]:
        raise ValueError(f"it has `criteria`, which are read as JSON, and `{beside[0]}`")


def _check_groups(template: Template, two: bool) -> None:
    """Raise TypeError unless the pattern has one group, the verdict, or with `two` the groups of two scores."""
    groups = len(verdict_groups(template.pattern))
    if groups != (2 if two and template.compares else 1):
        named = ", or two named `a` and `b`" if two else ""
        criteria = "" if template.pattern else "; it has no pattern, and no `criteria`"
        raise TypeError(f"its `pattern` needs one group, the verdict{named}{criteria}")


def _check_scores(template: Template) -> None:
    """Raise ValueError if `low` is not below `high`, or a choice is not a number between them."""
    if not template.low < template.high:
        raise ValueError("its `low` has to be below its `high`")
    if template.criteria and not isfinite(template.high - template.low):
        raise ValueError("its `low` and `high` are too far apart")
    for choice in () if template.compares else template.choices:
        try:
            float(choice)
        except ValueError:
            raise ValueError(f"its choice {choice!r} is not a number") from None
        if _beyond(choice, template.low, template.high):
            raise ValueError(f"its choice {choice!r} is not from `low` {template.low:g} to `high` {template.high:g}")


def _check_examples(template: Template) -> None:
    """Raise ValueError if an example lacks a field of the text, or has an answer without a verdict."""
    found = template.verdict if template.compares or not template.high > template.low else template.score
    found = template.last_match if template.of_group else found
    for number, example in enumerate(template.examples, 1):
        try:
            rendered(template.text, example, **template.own_fields)
        except BadRow as error:
            raise ValueError(f"its example {number}: {error}") from None
        if (template.pattern or template.criteria) and found(example["answer"]) is None:
            reads = "reading its `criteria`" if template.criteria else "its `pattern`"
            raise ValueError(f"{reads} finds no verdict in the answer of example {number}")


def names() -> list[str]:
    """Return the names of the built-in templates."""
    return sorted(file.name[:-5] for file in files(__name__).iterdir() if file.name.endswith(".toml"))
