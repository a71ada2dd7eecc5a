"""The verdict of a judge on two texts: A (shown first), B, tie, or unreadable."""

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
    """Return the meaning of a verdict: `A`, `B` or `tie`; of "A>B" and "B>>A" the better one."""
    if compared := COMPARED.fullmatch(verdict):
        first, sign, second = compared.groups()
        verdict = "tie" if first.lower() == second.lower() else first if sign[0] == ">" else second
    return NAMES.get(verdict.strip().lower(), "tie")


def probability_of(side: str, completion: Completion, template: Template) -> float:
    """Return the probability that a side, `A` or `B`, wins, plus half of the probability of a tie."""
    shares = {"A": 0.0, "B": 0.0, "tie": 0.0}
    for choice, share in zip(template.choices, completion.probabilities, strict=True):
        shares[named(choice)] += share
    return shares[side] + shares["tie"] / 2
