"""Fixtures of all tests."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from helpers import Srlm
from srlm_cli import models


def pytest_configure() -> None:
    """Undo an inherited "ignore Ctrl-C", which background jobs of a shell have and every child would inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def srlm(tmp_path: Path) -> Srlm:
    """The program, run as a subprocess in the test's own folder."""
    return Srlm(tmp_path)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trainings in this process be float32 on any CPU, so that their numbers can be compared closely."""
    monkeypatch.setattr(models, "has_bfloat16", lambda device: False)
