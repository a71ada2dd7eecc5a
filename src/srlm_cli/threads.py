"""Share a CPU's cores: fewer threads while other processes compute too, more when cores are idle again.

Threads that wait for each other's parts of a product do so busily. Two programs with as many threads each as
there are cores then wait for threads that have no core, and each can take many times as long as alone. So
how many threads compute here follows what the system gives them. Processes of lower priority (`nice`) get no core that
is wanted here. OMP_NUM_THREADS, if set, is left as it is.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module

SECONDS = 1.0  # between two looks
IDLE = 0.7  # of a core that nobody uses: room for one more thread
A_THREAD = 1 << 30  # bytes of weights that are worth a thread while a few tokens pass by them
PATIENCE = 3  # looks in a row that have to see it: a thread too many costs more than one too few
AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")


class ThreadCount:
    """How many threads to compute with, `most` at first, by what was seen since the last look.

    They at most halve at a look, since a process that waited for rows used no core either.
    """

    def __init__(self, most: int) -> None:
        self.most = self.threads = most
        self.idle: list[float] = []

    def look(self, used: float, idle: float) -> int:
        """Return the next number of threads, from the cores `used` by this process and the `idle` ones."""
        self.idle = [*self.idle, idle] if idle >= IDLE else []
        if idle < 1 - IDLE:
            self.threads = min(self.threads, max(1, round(used), self.threads // 2))
        elif len(self.idle) == PATIENCE:
            self.threads = min(self.most, self.threads + max(1, int(min(self.idle))))
            self.idle = []
        return self.threads


class Watch:
    """Checks the load once per second, and sets the number of torch threads, in each computing thread that calls it."""

    def __init__(self, most: int) -> None:
        self.count = ThreadCount(most)
        self.seen = _now()
        self.looking = Lock()

    def __call__(self, *unused: Any) -> None:
        """Look, if a second has passed since the last one, and compute with what there is for this thread."""
        if self.looking.acquire(blocking=False):
            try:
                self._look()
            finally:
                self.looking.release()
        threads = self.count.threads
        if threads != (_seen.get() or self.count.most):
            _compute_with(threads)

    def _look(self) -> None:
        if time.monotonic() - self.seen[0] >= SECONDS:
            before, self.seen = self.seen, _now()
            wall, used, idle = (after - earlier for after, earlier in zip(self.seen, before, strict=True))
            self.count.look(_parts.get() * used / wall, idle / wall)  # the other parts are as busy


_watch: Watch | None = None
# Of each thread that computes, which has a context of its own: its part, and all the threads it last heard of.
_parts: ContextVar[int] = ContextVar("parts", default=1)
_seen: ContextVar[int] = ContextVar("seen", default=0)


def most() -> int:
    """Return how many threads may compute here when nothing else computes."""
    return _watch.count.most if _watch else _at_start()


def compute_with_part(parts: int) -> None:
    """Let this thread use one of several equal shares of all threads from now on."""
    _parts.set(parts)
    _compute_with(_watch.count.threads if _watch else _at_start())


@contextmanager
def few(size: int) -> Iterator[None]:
    """Use few threads for a short computation with weights of `size` bytes; more would cost more than they save."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 1 + size // A_THREAD))
    try:
        yield
    finally:
        _compute_with(_watch.count.threads if _watch else before)


@cache
def _at_start() -> int:
    """Return the number of threads at the first call."""
    import torch

    return torch.get_num_threads()


def _compute_with(threads: int) -> None:
    """Let this thread compute with its share of `threads` threads."""
    import torch

    _seen.set(threads)
    mine = max(1, threads // _parts.get())
    if mine != torch.get_num_threads():
        torch.set_num_threads(mine)


def share_cores(net: Module) -> None:
    """Share the cores with other processes whenever a model on the CPU reads tokens."""
    import torch

    global _watch
    if "OMP_NUM_THREADS" in os.environ or (_watch is None and torch.get_num_threads() < 2):
        return
    _watch = _watch or Watch(torch.get_num_threads())
    net.get_input_embeddings().register_forward_pre_hook(_watch)


def _now() -> tuple[float, float, float]:
    """Return the seconds of the clock, of this process on all cores, and of the idle cores it may use.

    A core that computes for a process of lower priority is as good as idle.
    """
    import psutil  # late: it takes a command 6 ms

    cores = psutil.cpu_times(percpu=True)
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(cores))
    free = ("idle", "iowait", "nice") if _comes_first() else ("idle", "iowait")
    idle = sum(getattr(cores[at], kind, 0.0) for at in mine if at < len(cores) for kind in free)
    return time.monotonic(), time.process_time(), idle


def _comes_first() -> bool:
    """Whether Linux gives this process nearly all of a core that one of lower priority (`nice`) wants too.

    It does not where each session gets an equal part of the cores (autogroup).
    """
    try:
        by_session = AUTOGROUP.read_text(encoding="ascii").strip() != "0"
    except OSError:  # a kernel without it
        by_session = False
    return sys.platform == "linux" and os.nice(0) <= 0 and not by_session
