"""What a judge said of two texts: A, the one shown first, B, a tie, or nothing that can be read."""

from __future__ import annotations

from srlm_cli.engines.base import Completion
from srlm_cli.templates import Template


def verdict_of(completion: Completion, template: Template, direct: bool) -> str | None:
    """Return `A`, `B`, `tie`, or None; with `direct` the completion is the verdict, drawn from the choices."""
    text = completion.texts[0]
    verdict = text if direct and text else template.verdict(text)
    return verdict and {"a": "A", "b": "B"}.get(verdict.lower(), "tie")
