"""examples/pipes.md: every line runs, in a shell that stops at the first failure of a pipe."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT, clean_env, read_rows, write_rows

BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "examples" / "pipes.md").read_text(), re.DOTALL)
MADE = {  # file: rows it has where the page's claim is a number, else at least one
    "pairs.jsonl": None, "responses.jsonl": 32, "judged.jsonl": 32, "judged-other.jsonl": 1, "judge.jsonl": None,
    "longest.jsonl": None, "as-rating.jsonl": 32, "human-pairs.jsonl": 99, "judged-messy.jsonl": 1, "bad.jsonl": 1,
}  # fmt: skip


@pytest.mark.skipif(not shutil.which("jq"), reason="the page's pipes use jq")
def test_the_pipes_run_as_they_stand(tmp_path):
    for file in ("ift.jsonl", "ranked.jsonl", "ranked_eval.jsonl"):
        shutil.copy(ROOT / "examples" / "quickstart" / file, tmp_path)
    write_rows(tmp_path / "other.jsonl", [{"question": "Why?", "answer": "Because."}])
    write_rows(tmp_path / "messy.jsonl", [{"prompt": "Why?", "response": "Because."}, "{broken"])
    program = tmp_path / "bin" / "srlm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m srlm_cli "$@"\n')
    program.chmod(0o755)
    env = clean_env({"SRLM_ENGINE": "echo"})
    env["PATH"] = f"{program.parent}:{env['PATH']}"
    for block in BLOCKS:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stderr}"
    for file, rows in MADE.items():
        found = len(read_rows(tmp_path / file))
        assert found == rows if rows is not None else found, file
