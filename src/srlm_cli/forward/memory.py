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
# Options of glibc's mallopt, and the sizes of freed memory that it keeps for the next allocation.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8
KEPT, AT_ONCE, OLDEST_LIMIT = 1 << 30, 1 << 26, 1 << 25


def for_cache(device: str) -> int:
    """Return the maximum size of the KV cache in bytes: a share of the free memory of the device."""
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
    """Return `count` zero bytes, which the operating system allocates when they are first written.

    So a large store costs nothing at first. On Linux it uses huge pages, unless `THP_MEM_ALLOC_ENABLE` is 0, because
    random reads wait as long for the addresses of small pages as for the memory. The ends of the store, which are used
    first, use small pages: to clear a huge page takes as long as a completion.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return np.zeros(count, np.uint8)
    mapped = mmap.mmap(-1, max(1, count), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and os.environ.get("THP_MEM_ALLOC_ENABLE") != "0":
        with suppress(OSError, ValueError):  # a kernel without huge pages, or a store that is not larger than its ends
            mapped.madvise(mmap.MADV_HUGEPAGE, HUGE_PAGE, count // HUGE_PAGE * HUGE_PAGE - 2 * HUGE_PAGE)
    return np.frombuffer(mapped, np.uint8, count)


def floats(*shape: int) -> np.ndarray:
    """Return an uninitialized float32 array that is aligned to a cache line; those of numpy need not be."""
    return torch.empty(shape).numpy()


def keep_freed() -> None:
    """Let glibc keep freed memory for the next allocation of any thread; does nothing with another C library.

    Otherwise the memory of each large tensor is returned to the system and allocated again page by page. Use it in a
    process that ends with its job, because other processes cannot use this memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(ARENA_MAX, 1)
        mallopt(TRIM_THRESHOLD, KEPT)
        mallopt(TOP_PAD, AT_ONCE)
        mallopt(MMAP_THRESHOLD, KEPT) or mallopt(MMAP_THRESHOLD, OLDEST_LIMIT)


def halve(count: int, error: RuntimeError) -> int:
    """Return half of the batch size after an out-of-memory error; raise any other error, or if it was 1."""
    words = str(error).lower()
    if not (isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "can't allocate memory" in words):
        raise error
    if count <= 1:
        raise EngineError("out of memory with one text at a time", "a smaller model, or shorter prompts") from error
    return count // 2
