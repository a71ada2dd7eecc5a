"""What a stage has met before, by a hash; in memory, where no other store is given."""

from __future__ import annotations

from collections.abc import Callable


def never_seen() -> Callable[[int], bool]:
    """Return a function that tells whether it is called with a number for the first time."""
    seen: set[int] = set()
    return lambda key: len(seen) < (seen.add(key) or len(seen))
