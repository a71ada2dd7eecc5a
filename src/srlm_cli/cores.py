"""Share a CPU's cores: fewer threads while other processes compute too, more when cores are idle again.

Threads that wait for each other's parts of a product do so busily. Two programs with as many threads each as
there are cores then wait for threads that have no core, and each can take many times as long as alone. So
how many threads compute here follows what the system gives them. OMP_NUM_THREADS, if set, is left as it is.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from torch.nn import Module

SECONDS = 1.0  # between two looks
IDLE = 0.7  # of a core that nobody uses: room for one more thread
PATIENCE = 3  # looks in a row that have to see it: a thread too many costs more than one too few


class ThreadCount:
    """How many threads to compute with, `most` at first, by what was seen since the last look.

    They at most halve at a look, since a process that waited for rows used no core either.
    """

    def __init__(self, most: int) -> None:
        self.most = self.threads = most
        self.idle: list[float] = []

    def look(self, used: float, idle: float) -> int:
        """Return the threads to go on with, after `used` cores by this process and `idle` ones that nobody used."""
        self.idle = [*self.idle, idle] if idle >= IDLE else []
        if idle < 1 - IDLE:
            self.threads = min(self.threads, max(1, round(used), self.threads // 2))
        elif len(self.idle) == PATIENCE:
            self.threads = min(self.most, self.threads + max(1, int(min(self.idle))))
            self.idle = []
        return self.threads


class Watch:
    """Takes a look once a second, and sets torch's threads by it. The calling thread must be the one that computes."""

    def __init__(self, most: int) -> None:
        self.count = ThreadCount(most)
        self.seen = _now()

    def __call__(self, *unused: Any) -> None:
        """Look, if a second has passed since the last one."""
        if time.monotonic() - self.seen[0] < SECONDS:
            return
        before, self.seen = self.seen, _now()
        wall, used, idle = (after - earlier for after, earlier in zip(self.seen, before, strict=True))
        had = self.count.threads
        if (threads := self.count.look(used / wall, idle / wall)) != had:
            import torch

            torch.set_num_threads(threads)


_watch: Watch | None = None


def share_cores(net: Module) -> None:
    """Share the cores with other processes whenever a model on the CPU reads tokens."""
    import torch

    global _watch
    if "OMP_NUM_THREADS" in os.environ or (_watch is None and torch.get_num_threads() < 2):
        return
    _watch = _watch or Watch(torch.get_num_threads())
    net.get_input_embeddings().register_forward_pre_hook(_watch)


def _now() -> tuple[float, float, float]:
    """Return the seconds of the clock, of this process on all cores, and of the idle cores it may use."""
    cores = psutil.cpu_times(percpu=True)
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(cores))
    idle = sum(cores[at].idle + getattr(cores[at], "iowait", 0.0) for at in mine if at < len(cores))
    return time.monotonic(), time.process_time(), idle
