"""The benchmarks begin: what they import and patch has the names that they use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, clean_env

SCRIPTS = sorted(path for path in (ROOT / "benchmarks").rglob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
NOT_OURS = ("vllm", "trl", "llama_cpp", "bm25s", "tantivy", "duckdb", "sklearn")  # what some are measured against


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT / "benchmarks").as_posix())
def test_a_benchmark_begins(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean_env(), check=False)
    missing = done.stderr.rpartition("No module named ")[2].strip(" '\n")
    if done.returncode and missing in NOT_OURS:
        pytest.skip(f"{missing} is not installed")
    assert done.returncode == 0, done.stderr
