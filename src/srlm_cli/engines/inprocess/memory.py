"""How much memory there is, and what its lack looks like."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from srlm_cli.errors import EngineError

SHARE = 0.5


def for_cache(device: str) -> int:
    """Return how many bytes keys and values may take: a share of what is free on the device now."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0] * SHARE)
    return int(_free_on_host() * SHARE)


def _free_on_host() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: half of all that there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def halve(count: int, error: RuntimeError) -> int:
    """Return half of what was tried together when memory ran out; raise what is another error, or at the end."""
    words = str(error).lower()
    if not (isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "can't allocate memory" in words):
        raise error
    if count <= 1:
        raise EngineError("out of memory, with one text at a time", "a smaller model, or shorter prompts") from error
    return count // 2
