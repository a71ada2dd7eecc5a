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


@pytest.mark.slow
def test_the_gpu_script_is_rehearsed_on_a_cpu() -> None:
    """Its tests pass, and each row of its table has a figure, or names the library that is not installed."""
    env = clean_env({"DEVICE": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"})
    command = [str(ROOT / "benchmarks" / "gpu.sh")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        line.strip("| ").split(" | ")
        for line in done.stdout.splitlines()
        if line.startswith(("| sample", "| judge", "| sft", "| dpo"))
    ]
    assert [row[:2] for row in rows] == [
        *([task, engine] for task in ("sample", "judge") for engine in ("hf", "vllm")),
        *([task, who] for task in ("sft", "dpo") for who in ("srlm", "trl")),
    ]
    for _, who, rate, *rest in rows:
        assert float(rate) > 0 if rate[0].isdigit() else who == "vllm" and "vllm is not installed" in rest[-1], rows
