"""Models that several tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import tiny_model


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("other") / "m", seed=7)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "m")
