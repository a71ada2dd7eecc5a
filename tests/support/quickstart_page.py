"""docs/quickstart.md shows each command with its output: `--write` runs its `sh` blocks and writes what they print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import ROOT, clean_env

PAGE = ROOT / "docs" / "quickstart.md"
# An `sh` block, and the `text` block with its output where there is one. Blocks in `bash` are not run.
BLOCK = re.compile(r"```sh\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def render() -> str:
    """Return the page with the output of each `sh` block after it; the blocks run in one folder, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for file in (ROOT / "examples" / "quickstart").glob("*.jsonl"):
            shutil.copy(file, here)
        bin_ = here.joinpath(".bin")
        bin_.mkdir()
        bin_.joinpath("srlm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m srlm_cli "$@"\n')
        bin_.joinpath("srlm").chmod(0o755)
        env = clean_env({"PATH": f"{bin_}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"})
        return BLOCK.sub(lambda found: with_output(found[1], here, env), PAGE.read_text(encoding="utf-8"))


def with_output(commands: str, folder: Path, env: dict[str, str]) -> str:
    """Return an `sh` block and, where the commands print something, a `text` block with it."""
    done = subprocess.run(
        ["bash", "-c", commands], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    shown = f"\n```text\n{done.stdout.rstrip()}\n```\n" if done.stdout.strip() else ""
    return f"```sh\n{commands}```\n{shown}"


def without_times(text: str) -> str:
    """Return a page without its speeds and seconds, which differ from run to run."""
    return re.sub(r" \(\d+/s\)|; \d+s$", "", text, flags=re.MULTILINE)


if __name__ == "__main__":
    made = render()
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(made, encoding="utf-8")
    else:
        print(made)
