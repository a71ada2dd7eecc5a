"""What `srlm init` copies out: the Makefile of the loop, and the quickstart's settings and seed data."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path


def recipe_files() -> dict[str, Traversable]:
    """Return the files of a run by name: from the wheel, or from the checkout of this code."""
    packaged = files(__name__) / "quickstart"
    quickstart = packaged if packaged.is_dir() else Path(__file__).parents[3] / "examples" / "quickstart"
    found = {file.name: file for file in quickstart.iterdir() if file.name.endswith((".jsonl", ".toml"))}
    return {"Makefile": files(__name__) / "Makefile", **dict(sorted(found.items()))}
