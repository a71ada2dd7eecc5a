"""What a judge said of two texts: A, the one shown first, B, a tie, or nothing that can be read."""

from __future__ import annotations

import re

from srlm_cli.engines.base import Completion
from srlm_cli.templates import Template


def verdict_of(completion: Completion, template: Template, direct: bool) -> str | None:
    """Return `A`, `B`, `tie`, or None; with `direct` the completion is the verdict, drawn from the choices."""
    text = completion.texts[0]
    verdict = text if direct and text else template.verdict(text)
    return verdict and named(verdict)


COMPARED = re.compile(r"(?i)\W*([ab])\s*(<+|>+)\s*(?:\w+\s+)?([ab])\W*")  # "A>B", and "A>>B" for much better
NAMES = {"a": "A", "b": "B", "1": "A", "2": "B", "first": "A", "second": "B"}


def named(verdict: str) -> str:
    """Return what a verdict means: `A`, `B`, or else `tie`; of "A>B" and "B>>A" the better one."""
    if compared := COMPARED.fullmatch(verdict):
        first, sign, second = compared.groups()
        verdict = "tie" if first.lower() == second.lower() else first if sign[0] == ">" else second
    return NAMES.get(verdict.strip().lower(), "tie")


def probability_of(side: str, completion: Completion, template: Template) -> float:
    """Return how probable it is that one side wins, `A` or `B`, half of a tie included, by those of the choices."""
    shares = {"A": 0.0, "B": 0.0, "tie": 0.0}
    for choice, share in zip(template.choices, completion.probabilities, strict=True):
        shares[named(choice)] += share
    return shares[side] + shares["tie"] / 2
