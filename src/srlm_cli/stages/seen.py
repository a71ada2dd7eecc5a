"""Keys that were seen before, by hash, in memory."""

from __future__ import annotations

from collections.abc import Callable


def never_seen() -> Callable[[int], bool]:
    """Return a function that returns True the first time it is called with a number."""
    seen: set[int] = set()
    return lambda key: len(seen) < (seen.add(key) or len(seen))
