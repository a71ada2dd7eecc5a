"""Passes compiled for a CPU by numba, which is optional: call `available` before importing a module of this package."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


@cache
def available() -> bool:
    """Return whether numba is installed (the extra `cpu`); without it PyTorch computes everything."""
    return find_spec("numba") is not None
