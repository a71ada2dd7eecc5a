"""The limit of judgements that cannot be read."""

from __future__ import annotations

from srlm_cli.errors import LimitExceeded
from srlm_cli.runner.tally import Tally


def too_many_unparsed(tally: Tally, limit: float, asked: str = "judgements", hint: str = "") -> LimitExceeded | None:
    """Return an error if the share of judgements without a score, or of verdicts without a winner, is too large.

    `hint` says which option helps this kind of judging.
    """
    rate = tally.counts["unparsed"] / max(tally.counts[asked], 1)
    if rate <= limit:
        return None
    what = "winner" if asked == "verdicts" else "score"
    return LimitExceeded(f"{rate:.1%} of the {asked} have no readable {what}, above --max-unparsed {limit}", hint)
