"""The scripts of examples/cluster, run for real with the echo engine: shards, a lost one, and the join."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import FORKED, ROOT, Srlm, clean_env, write_rows

CLUSTER = ROOT / "examples" / "cluster"
SHARDS = 3
RAY = """
def init(): pass
def get(made): return made
def wait(waiting): return waiting[:1], waiting[1:]
def remote(**options):
    assert options["max_retries"] and options["num_gpus"] == 2
    def task(call):
        task.remote = call
        return task
    return task
"""


@pytest.fixture
def env(srlm: Srlm) -> dict[str, str]:
    """An environment with `srlm` on the path, where a batch job finds its prompts and its folder."""
    write_rows(srlm.folder / "prompts.jsonl", [{"prompt": f"Question {n}?"} for n in range(8)])
    program = srlm.folder / "bin" / "srlm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {" ".join(FORKED)} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = f"{program.parent}:{os.environ['PATH']}"
    settings = {"PROMPTS": "prompts.jsonl", "OUT": "shards", "SHARDS": str(SHARDS), "ENGINE": "--engine echo"}
    return clean_env({"PATH": path, **settings})


def call(srlm: Srlm, env: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=srlm.folder, env=env, capture_output=True, text=True, timeout=120)


def run_task(srlm: Srlm, env: dict[str, str], shard: int) -> None:
    """Run the body of the SLURM script as one task of its array."""
    done = call(srlm, {**env, "SLURM_ARRAY_TASK_ID": str(shard)}, "bash", str(CLUSTER / "slurm_array.sh"))
    assert done.returncode == 0, done.stderr


def join(srlm: Srlm, env: dict[str, str]) -> subprocess.CompletedProcess:
    return call(srlm, env, "bash", str(CLUSTER / "join.sh"), "shards", str(SHARDS), ".")


def check_whole(srlm: Srlm) -> None:
    """The joined files are what one run over all prompts makes."""
    assert srlm("sample", "--engine", "echo", "--in", "prompts.jsonl", "--out", "r.jsonl").code == 0
    assert srlm("judge", "--engine", "echo", "--in", "r.jsonl", "--out", "j.jsonl").code == 0
    assert srlm("make-pairs", "--in", "j.jsonl", "--out", "p.jsonl").code == 0
    for joined, whole in (("responses", "r"), ("judged", "j"), ("pairs", "p")):
        made = (srlm.folder / f"{joined}.jsonl").read_bytes()
        assert made == (srlm.folder / f"{whole}.jsonl").read_bytes() != b""


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_the_shell_reads_the_scripts(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).stderr == b""


def test_a_slurm_array_with_a_lost_task_makes_the_whole(srlm: Srlm, env: dict[str, str]) -> None:
    for shard in (1, 3):
        run_task(srlm, env, shard)
    early = join(srlm, env)
    assert early.returncode == 1 and "shard 2/3 is not finished" in early.stderr
    (srlm.folder / "shards").mkdir(exist_ok=True)
    part = ["--in", "prompts.jsonl", "--shard", "2/3", "--out", "shards/responses-00002.jsonl"]
    assert srlm.mortal(2, signal.SIGKILL, "sample", "--engine", "echo", *part).code == -signal.SIGKILL
    times = {path: path.stat().st_mtime_ns for path in (srlm.folder / "shards").glob("*-0000[13].jsonl")}
    for shard in (2, 1, 3):
        run_task(srlm, env, shard)
    assert len(times) == 4 and all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert join(srlm, env).returncode == 0
    check_whole(srlm)


def test_ray_tasks_make_the_whole(srlm: Srlm, env: dict[str, str]) -> None:
    (srlm.folder / "ray.py").write_text(RAY)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(srlm.folder), os.environ.get("PYTHONPATH")]))
    options = ["--prompts", "prompts.jsonl", "--out", "shards", "--shards", str(SHARDS), "--gpus", "2"]
    done = call(srlm, env, sys.executable, str(CLUSTER / "ray_shards.py"), *options, "--", "--engine", "echo")
    assert done.returncode == 0 and "0 shards to go" in done.stdout, done.stderr
    assert join(srlm, env).returncode == 0
    check_whole(srlm)
