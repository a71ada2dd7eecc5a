"""Fixtures of all tests."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from pathlib import Path

import pytest

from forked import make_session
from helpers import Srlm


def pytest_configure(config: pytest.Config) -> None:
    """Make a folder for all workers, and undo an inherited "ignore Ctrl-C", which every child would inherit.

    Workers side by side compute with one thread each, and so do their commands: more threads than cores wait for
    each other.
    """
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not hasattr(config, "workerinput"):
        folder = make_session()
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# What takes longest comes first, so that no worker is left with it at the end; `--dist loadfile` keeps this order.
LONGEST_FIRST = ("test_model.py", "engines/hf", "train", "recipes", "forward", "commands", "report")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, and mark the tests that run commands."""

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((at for at, start in enumerate(LONGEST_FIRST) if path.startswith(start)), len(LONGEST_FIRST))

    items.sort(key=place)
    for item in items:
        if "srlm" in getattr(item, "fixturenames", ()) or item.path.parent.name in ("recipes", "examples"):
            item.add_marker("command")


def pytest_collection_finish() -> None:
    """Keep what was imported out of each later garbage collection, which trainings ask for: a third of a small one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_dtype_of_another_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training tells accelerate its dtype by this variable, and TRL's own trainers in later tests would take it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def srlm(tmp_path: Path) -> Srlm:
    """The program, run as a subprocess in the test's own folder."""
    return Srlm(tmp_path)
