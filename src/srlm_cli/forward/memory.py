"""How much memory there is, and what its lack looks like."""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from srlm_cli.errors import EngineError

SHARE = 0.5
HUGE_PAGE = 1 << 21
# Options of glibc's mallopt, and how large what is freed may be that it keeps for the next allocation.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8
KEPT, AT_ONCE, OLDEST_LIMIT = 1 << 30, 1 << 26, 1 << 25


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


def zeros(count: int) -> np.ndarray:
    """Return so many bytes, all zero, which an operating system gives when they are first written to.

    So a large store costs nothing yet. On Linux it comes in huge pages, unless PyTorch is told to take none: what is
    read from all over a store waits as long for the addresses of small ones as for the memory. Its ends, where little
    lies at first, do not: to make a huge page of zeros takes as long as a row takes to be written.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return np.zeros(count, np.uint8)
    mapped = mmap.mmap(-1, max(1, count), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and os.environ.get("THP_MEM_ALLOC_ENABLE") != "0":
        with suppress(OSError, ValueError):  # a kernel that has none, or a store that is no larger than its ends
            mapped.madvise(mmap.MADV_HUGEPAGE, HUGE_PAGE, count // HUGE_PAGE * HUGE_PAGE - 2 * HUGE_PAGE)
    return np.frombuffer(mapped, np.uint8, count)


def floats(*shape: int) -> np.ndarray:
    """Return an array of float32, not set, that begins with a line of the cache, as numpy's own need not."""
    return torch.empty(shape).numpy()


def keep_freed() -> None:
    """Let the C library keep what is freed for the next allocation, of any thread, where that library is glibc.

    Else the memory of each large tensor is given back, and asked for anew page by page. For a process that ends with
    its job: what is kept is of no use to the next one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(ARENA_MAX, 1)
        mallopt(TRIM_THRESHOLD, KEPT)
        mallopt(TOP_PAD, AT_ONCE)
        mallopt(MMAP_THRESHOLD, KEPT) or mallopt(MMAP_THRESHOLD, OLDEST_LIMIT)


def halve(count: int, error: RuntimeError) -> int:
    """Return half of what was tried together when memory ran out; raise what is another error, or at the end."""
    words = str(error).lower()
    if not (isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "can't allocate memory" in words):
        raise error
    if count <= 1:
        raise EngineError("out of memory with one text at a time", "a smaller model, or shorter prompts") from error
    return count // 2
