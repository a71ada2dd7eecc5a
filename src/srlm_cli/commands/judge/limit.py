"""The limit of judgements that cannot be read."""

from __future__ import annotations

from srlm_cli.errors import LimitExceeded
from srlm_cli.runner.tally import Tally


def too_many_unparsed(tally: Tally, limit: float, asked: str = "judgements") -> LimitExceeded | None:
    """Return an error if the share of judgements without a score, or of verdicts without a winner, is too large."""
    rate = tally.counts["unparsed"] / max(tally.counts[asked], 1)
    if rate <= limit:
        return None
    what, hint = "score", "--force-score lets the model choose a missing score"
    if asked == "verdicts":
        what, hint = "winner", "--direct takes the more probable one"
    return LimitExceeded(f"{rate:.1%} of the {asked} have no readable {what}, above --max-unparsed {limit}", hint)
