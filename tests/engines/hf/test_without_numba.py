"""The in-process engine where numba is not installed: PyTorch computes everything, and the texts are the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import tiny_models
from helpers import Srlm, as_lines

PROMPTS = as_lines([{"prompt": text} for text in ("tell me " * 9 + "more", "tell me " * 9 + "less", "b b b")])
WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None  # as if it were not installed
from srlm_cli.cli import run
code = run(sys.argv[1:])
assert not any(name.startswith("llvmlite") for name in sys.modules)
sys.exit(code)
"""


@pytest.mark.slow
def test_without_numba_the_texts_are_the_same(srlm: Srlm, tmp_path: Path) -> None:
    sample = ["sample", "--quiet", "--model", str(tiny_models.save(tmp_path / "model")), "--max-new-tokens", "20"]
    exact = [*sample, "--dtype", "float32", "--top-p", "0.8"]
    without = srlm.run([sys.executable, "-c", WITHOUT_NUMBA, *exact], PROMPTS)
    assert (without.code, without.err) == (0, "")
    assert len(without.rows) == 12 and without.rows == srlm(*exact, stdin=PROMPTS).rows
    assert len(srlm.run([sys.executable, "-c", WITHOUT_NUMBA, *sample], PROMPTS).rows) == 12
