"""Freed memory of a training on a CPU: kept for the next pass, or given back to the system between long ones."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: a CPU training step otherwise loses much time to page faults."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    try:
        libc = ctypes.CDLL(None)
        for parameter, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**28), (mmap_threshold, 2**31 - 1)):
            libc.mallopt(parameter, value)
    except (AttributeError, OSError):  # not glibc
        pass


def give_back_freed_memory() -> None:
    """Let glibc give back all whole pages that are free.

    Tensors of unlike sizes leave holes in the memory that is kept, which the next ones do not fit into: a step of a
    pair of 2,048 tokens per reply had 4.6 GB in use, and 3.0 GB of holes. To fill the pages again takes about a
    second per 4 GB, which only a long pass is worth.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # not glibc
        pass
