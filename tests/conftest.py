"""Fixtures of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import Srlm


@pytest.fixture
def srlm(tmp_path: Path) -> Srlm:
    """The program, run as a subprocess in the test's own folder."""
    return Srlm(tmp_path)
