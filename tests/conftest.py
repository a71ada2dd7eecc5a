"""Fixtures of all tests."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from helpers import Srlm


def pytest_configure() -> None:
    """Undo an inherited "ignore Ctrl-C", which background jobs of a shell have and every child would inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def srlm(tmp_path: Path) -> Srlm:
    """The program, run as a subprocess in the test's own folder."""
    return Srlm(tmp_path)
