"""Seeds that do not depend on the order of the work."""

from __future__ import annotations

from hashlib import blake2b


def derive(seed: int, *parts: object) -> int:
    """Return a 63-bit seed for one draw, from the run's seed and the names of the draw.

    `derive(seed, prompt_id, k)` does not depend on other rows, so a resumed,
    sharded or reordered run draws what an uninterrupted one would.
    """
    text = "\x1f".join([str(seed), *map(str, parts)])
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def share(seed: int, *parts: object) -> float:
    """Return a number in [0, 1) for one draw, from the run's seed and the names of the draw."""
    return derive(seed, *parts) / 2**63
