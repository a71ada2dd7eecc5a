"""The passes compiled for a CPU by numba, which is optional: ask `available` before importing anything else of it."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


@cache
def available() -> bool:
    """Return whether numba is installed (the extra `cpu`); without it PyTorch computes everything."""
    return find_spec("numba") is not None
