"""An installation without torch: what works by a server, and what names the packages that it needs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import ROOT, Result, as_lines, clean_env
from stub_server import Stub

REQUIREMENTS = ROOT / "requirements-server.txt"
LOCAL_MODELS = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "gguf", "numba"}
PROMPTS = as_lines([{"prompt": f"Name a prime above {number}."} for number in (10, 20)])
RANKED = as_lines(
    [{"id": "r", "prompt": "Up?", "responses": [{"text": "Yes.", "rank": 0}, {"text": "No.", "rank": 1}]}]
)
Run = Callable[..., Result]

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(MISSING))  # as if they were not installed
from srlm_cli.cli import run
sys.exit(run(sys.argv[1:]))
"""


def runner(program: list[str], folder: Path) -> Run:
    def run(*args: str, stdin: str = "") -> Result:
        done = subprocess.run(
            [*program, *args], input=stdin.encode(), capture_output=True, cwd=folder, env=clean_env(), timeout=120
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


def check_server_only(run: Run) -> None:
    """Run each command that needs no model of its own; a training has to name what is missing."""
    with Stub() as stub:
        server = ("--quiet", "--engine", "openai", "--base-url", stub.url, "--model", "m")
        sampled = run("sample", *server, "-n", "2", stdin=PROMPTS)
        assert len(sampled.rows) == 4, sampled.err
        judged = run("judge", *server, stdin=sampled.out)
        assert len(judged.rows) == 4 and judged.rows[0]["judge"]["model"] == "m", judged.err
        assert len(run("gen-prompts", *server, "--count", "2", stdin=PROMPTS).rows) == 2
        assert run("make-eft", *server, stdin=RANKED).code == 0
    scored = as_lines([{**row, "score": place} for place, row in enumerate(judged.rows)])
    assert len(run("make-pairs", "--quiet", stdin=scored).rows) == 2
    human = as_lines([{**row, "score": row["k"], "human": row["k"]} for row in judged.rows])
    metrics = {row["metric"] for row in run("eval", "reward", stdin=human).rows}
    assert "pairwise_accuracy" in metrics
    assert run("eval", "health", stdin=scored).rows
    assert "engine hf    missing: pip install srlm-cli" in run("doctor").out
    for command in (("sft", "--in", "-", "--out", "m1"), ("sample",)):
        failed = run(*command, "--model", "smollm2-135m-instruct", stdin='{"prompt": "Hi?", "completion": "Hello."}\n')
        assert failed.code == 1 and re.fullmatch(
            rf"srlm {command[0]}: error: this command needs (\w+), which is not installed; "
            r"install srlm-cli with its dependencies\n",
            failed.err,
        ), failed.err


@pytest.mark.slow
def test_nothing_for_a_server_imports_what_a_local_model_needs(tmp_path: Path) -> None:
    program = [sys.executable, "-c", WITHOUT.replace("MISSING", repr(LOCAL_MODELS))]
    check_server_only(runner(program, tmp_path))


def test_the_requirements_are_those_of_the_package_without_local_models() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {line for line in project["dependencies"] if re.match(r"[\w-]+", line)[0] not in LOCAL_MODELS}
    assert set(REQUIREMENTS.read_text().splitlines()[3:]) == wanted


@pytest.mark.slow
def test_a_bare_environment_with_these_requirements_runs_by_a_server(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, "--requirement", REQUIREMENTS], check=True)
    subprocess.run([*pip, "--no-deps", ROOT], check=True)
    assert not list((tmp_path / "venv").glob("lib/*/site-packages/torch*"))
    run = runner([str(python), "-m", "srlm_cli"], tmp_path)
    check_server_only(run)
