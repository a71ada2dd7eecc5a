"""Ask for the values of a template's criteria: piece by piece, or again after an answer in JSON.

vLLM and servers write the whole answer under a JSON schema. The engines in `PIECEWISE` cannot be constrained, so each
reason is a text of its own, and each value is chosen after it by its probability.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from srlm_cli.engines.base import Completion, Engine, Request, Sampling, template_refusal
from srlm_cli.errors import EngineError
from srlm_cli.records import ENDS, Message, encodable
from srlm_cli.seeds import derive
from srlm_cli.templates import Template
from srlm_cli.templates.criteria import NOT_APPLICABLE, Criterion, Finding, before_value, begun, expected, finding
from srlm_cli.thoughts import SWITCHES, Thought

PIECEWISE = ("hf", "echo")
REASON = re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)
AFTER_REASON = ('",', '"}', '"\n')


def piecewise(engine: Engine, template: Template, template_kwargs: Mapping[str, Any]) -> bool:
    """Return whether criteria are asked for piece by piece: not where the judge has to think first."""
    return bool(template.criteria) and engine.name in PIECEWISE and not any(map(template_kwargs.get, SWITCHES))


@dataclass(frozen=True)
class Asking:
    """How values are asked for: the sampling of the whole answer, and whether `expected` values are wanted.

    A value is not read if all values of its criterion have less than `min_mass` of the probability; this is for
    `expected` only.
    """

    template: Template
    sampling: Sampling
    seed: int
    expected: bool
    min_mass: float


@dataclass
class Draft:
    """One judgement of a response in progress; `id` and `k` name it, `thought` comes before it, as it was written.

    Those of one response share the list of `messages`.
    """

    id: str
    k: int
    messages: list[Message]
    found: dict[str, Finding] = field(default_factory=dict)
    masses: list[float] = field(default_factory=list)
    thought: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    failed: str = ""
    refusal: str = ""

    def add(self, completion: Completion) -> None:
        """Count the tokens of a completion."""
        self.tokens_in += completion.tokens_in
        self.tokens_out += completion.tokens_out

    def fail(self, completion: Completion, reason: str) -> None:
        """End the judgement without an answer."""
        self.failed, self.refusal = reason, template_refusal(completion)


@dataclass(frozen=True)
class AskValue:
    """The `follow_up` of a reason: the value of its criterion. It is a class, so that it can be pickled."""

    ids: tuple[tuple[str, int], ...]
    messages: list[Message]
    prefix: str
    criterion: Criterion
    asking: Asking

    def __call__(self, place: int, text: str, thought: Thought | None = None) -> Request:
        """Return the request for a value, after a reason."""
        prefix = self.prefix if self.asking.template.direct else self.prefix + before_value(reason_in(text))
        return value_request(*self.ids[place], self.messages, prefix, self.criterion, self.asking)


def value_request(
    id_: str, k: int, messages: list[Message], prefix: str, criterion: Criterion, asking: Asking, thought: str = ""
) -> Request:
    """Return the request for the value of a criterion after the text before it."""
    single = asking.expected and asking.template.direct
    sampling = replace(asking.sampling, last_line="", **({"temperature": 0.0} if single else {}))
    seed = derive(asking.seed, "value", id_, k, criterion.name)
    more = asking.template.direct and criterion != asking.template.criteria[-1]
    return Request(
        messages, sampling, (seed,), prefix=prefix, choices=criterion.choices, thought=thought, continued=more
    )


def reason_in(text: str) -> str:
    """Return a reason from the text that follows its quotation mark: what comes before the next one, unescaped."""
    said = REASON.match(text)[0]
    try:
        said = json.loads(f'"{said}"', strict=False)
    except ValueError:  # an escape that JSON does not have
        said = said.replace("\\", "")
    return encodable(" ".join(said.split()))


def write(drafts: list[Draft], engine: Engine, asking: Asking) -> None:
    """Write judgements in place, criterion by criterion: each reason, and the value that is chosen after it.

    A reason gets its share of `max_new_tokens`, and is cut there.
    """
    template = asking.template
    reason = replace(
        asking.sampling,
        max_new_tokens=max(1, asking.sampling.max_new_tokens // len(template.criteria)),
        stop=AFTER_REASON,
        last_line="",
    )
    for criterion in template.criteria:
        open_drafts = [draft for draft in drafts if not draft.failed]
        if template.direct:
            asked = [(draft, begun(template.criteria, draft.found, criterion, True), "", None) for draft in open_drafts]
        else:
            asked = with_reasons(open_drafts, engine, criterion, asking, reason)
        values = [
            value_request(
                draft.id, draft.k, draft.messages, prefix + ("" if template.direct else before_value(said)), criterion,
                asking,
            )
            for draft, prefix, said, _ in asked
        ]  # fmt: skip
        late = engine.generate(value for value, (*_, answer) in zip(values, asked, strict=True) if answer is None)
        for draft, _, said, answer in asked:
            take(draft, answer or next(late), criterion, said, asking)


def with_reasons(
    drafts: list[Draft], engine: Engine, criterion: Criterion, asking: Asking, sampling: Sampling
) -> list[tuple[Draft, str, str, Completion | None]]:
    """Return each draft with the text before its reason, the reason, and its value if the engine gave it, too.

    Drafts that are equal so far are one request. One whose reason could not be written is left out, as failed.
    """
    alike: dict[tuple[int, str], list[Draft]] = {}
    for draft in drafts:
        before = begun(asking.template.criteria, draft.found, criterion, False)
        alike.setdefault((id(draft.messages), before), []).append(draft)

    def request(prefix: str, same: list[Draft]) -> Request:
        seeds = tuple(derive(asking.seed, "reason", draft.id, draft.k, criterion.name) for draft in same)
        ids = tuple((draft.id, draft.k) for draft in same)
        follow_up = AskValue(ids, same[0].messages, prefix, criterion, asking)
        return Request(same[0].messages, sampling, seeds, prefix=prefix, follow_up=follow_up)

    made = []
    completions = engine.generate(request(prefix, same) for (_, prefix), same in alike.items())
    for ((_, prefix), same), completion in zip(alike.items(), completions, strict=True):
        same[0].add(completion)
        answers = completion.follow_ups or [None] * len(same)
        for draft, text, end, answer in zip(same, completion.texts, completion.finish_reasons, answers, strict=True):
            if end in (*ENDS.values(), "empty"):
                made.append((draft, prefix, reason_in(text), answer))
            else:
                draft.fail(completion, end)
    return made


def take(draft: Draft, completion: Completion, criterion: Criterion, reason: str, asking: Asking) -> None:
    """Add the value of a criterion to a draft; without one the draft fails, or lacks it if values are `expected`."""
    draft.add(completion)
    value = completion.texts[0]
    if not value:
        draft.found.pop(criterion.name, None)
        draft.fail(completion, completion.finish_reasons[0])
        return
    if completion.mass is not None:
        draft.masses.append(completion.mass)
    chances = completion.probabilities
    if asking.expected:
        if not chances:
            raise EngineError(
                "the engine gives no log-probabilities, which an expected score is made of", "--score text"
            )
        if completion.mass is not None and completion.mass < asking.min_mass:
            draft.found.pop(criterion.name, None)
            return
        made = expected(criterion, value, reason, chances)
    else:
        made = finding(criterion, value, reason)
    likely = chances[criterion.choices.index(made.value or NOT_APPLICABLE)] if chances else None
    draft.found[criterion.name] = replace(made, probability=likely, mass=completion.mass)


def ask_again(drafts: Iterable[tuple[Draft, list[Criterion]]], engine: Engine, asking: Asking) -> None:
    """Ask again for some values of answers in JSON, each after the findings that come before it."""
    asked = []
    for draft, criteria in drafts:
        for criterion in criteria:
            said = draft.found.get(criterion.name)
            prefix = begun(asking.template.criteria, draft.found, criterion, asking.template.direct)
            prefix += "" if asking.template.direct else before_value(said.reason if said else "")
            request = value_request(draft.id, draft.k, draft.messages, prefix, criterion, asking, draft.thought)
            asked.append((draft, criterion, said, request))
    completions = engine.generate(request for *_, request in asked)
    for (draft, criterion, said, _), completion in zip(asked, completions, strict=True):
        written = completion.texts[0] and said and asking.expected  # the value that the judge wrote stays
        take(draft, completion, criterion, said.reason if said else "", asking)
        if written and criterion.name in draft.found:
            draft.found[criterion.name] = kept(criterion, said, draft.found[criterion.name], completion)


def kept(criterion: Criterion, said: Finding, found: Finding, completion: Completion) -> Finding:
    """Return an expectation with the value that the judge wrote, if both say that the criterion applies."""
    if said.value is None or found.value is None:
        return found
    return replace(found, value=said.value, probability=completion.probabilities[criterion.choices.index(said.value)])
