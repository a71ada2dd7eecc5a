"""The benchmarks begin: what they import and patch has the names that they use."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, clean_env
from tiny import ALONE, tiny_model

SCRIPTS = sorted(path for path in (ROOT / "benchmarks").rglob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
NOT_OURS = ("vllm", "trl", "llama_cpp", "bm25s", "tantivy", "duckdb", "sklearn")  # what some are measured against


def name_of(script: Path) -> str:
    return script.relative_to(ROOT / "benchmarks").as_posix()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
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
    env = clean_env({"DEVICE": "cpu", "LIMIT": "3600", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"})
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


@pytest.mark.slow
def test_the_time_of_workers_is_measured(tmp_path: Path) -> None:
    """The parts of the engine that the benchmark watches exist, and each worker writes its times."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why is the sky blue?"}\n' * 2)
    options = ["--rows", "prompts.jsonl", "--model", str(tiny_model(tmp_path / "m")), "--max-new-tokens", "4"]
    command = [sys.executable, str(ROOT / "benchmarks" / "worker_time.py"), "sample", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean_env(ALONE), check=False)
    assert done.returncode == 0, done.stderr
    assert "8 rows" in done.stdout and " tokens read\n" in done.stdout


PATHS = {"path", "paths", "file", "out", "runs", "--in", "--data", "--file", "--folder", "--replies", "--write"}
PROGRAMS = {"--against", "--bench", "--duckdb"}


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_benchmark_checks_the_paths_that_it_is_given(script: Path) -> None:
    """A path has a type of benchmarks/paths.py: a missing input ends a benchmark before it begins."""
    for call in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
            name, kind = call.args[0].value, [ast.unparse(word.value) for word in call.keywords if word.arg == "type"]
            assert kind not in (["Path"], ["str"]) and (kind or name not in PATHS | PROGRAMS), f"{name}: {kind}"


@pytest.mark.slow
def test_a_folder_to_work_in_is_made_and_a_missing_input_is_named_in_a_line(tmp_path: Path) -> None:
    def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean_env(), check=False)

    done = run("passages.py", "--passages", "50", "--queries", "1", "--folder", "new/folder")
    assert done.returncode == 0, done.stderr
    assert "1 queries" in done.stdout and (tmp_path / "new" / "folder").is_dir()
    done = run("judge/chance.py", "none.jsonl")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "chance.py: error: argument path: none.jsonl does not exist"
    done = run("passages.py", "--folder", str(ROOT / "README.md" / "in"))
    assert done.returncode == 2 and "cannot be made: Not a directory" in done.stderr.splitlines()[-1]
