"""When two trainings are the same one: exactly in float32, within the rounding of bfloat16 there.

bfloat16 keeps 8 bits of a number, so a loss is right to one part in 256. A gradient near 0 may take another sign by
rounding, and AdamW then moves that weight the other way: of all that the weights moved, by root mean square, such
differences are a tenth at most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

DTYPES = ("float32", "bfloat16")
WEIGHT = 2e-4
MOVED = 0.1


def near(value: Any, dtype: str = "float32", tolerance: float = 1e-4) -> Any:
    """Return what a loss, or a dict of figures, is compared with."""
    return pytest.approx(value, abs=tolerance, rel={"float32": 0.0, "bfloat16": 2**-8}[dtype])


def weights_of(folder: Path) -> dict[str, Any]:
    """Return the weights of a model or adapter folder; a tied head that is named counts once."""
    found = load_file(next(folder.glob("*.safetensors")))
    return {name: weight for name, weight in found.items() if name != "lm_head.weight"}


def assert_same_weights(one: Path, other: Path, start: Path, dtype: str = "float32", tolerance: float = WEIGHT) -> None:
    """Assert that two trainings from a model, or an adapter, have ended at the same weights."""
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    if dtype == "float32":
        assert max(float((a[name] - b[name]).abs().max()) for name in a) <= tolerance
        return
    before = weights_of(start)
    moved = sum(float((b[name] - before.get(name, 0)).square().sum()) for name in b)
    assert sum(float((a[name] - b[name]).square().sum()) for name in a) <= MOVED**2 * moved
