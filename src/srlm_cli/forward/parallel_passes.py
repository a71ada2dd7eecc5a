"""Passes over texts in two threads: one computes while the other is between two operations, which use one core.

A pass reads the keys of a prefix as soon as an earlier pass has them, layer by layer. So passes that depend on each
other run at the same time too, one layer apart, and their results are those of passes one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import TypeVar

import torch

from srlm_cli import threads
from srlm_cli.forward.prefix import CachedPrefix

THREADS = 2

T = TypeVar("T")
R = TypeVar("R")


class Progress:
    """The keys and values of passes that run at the same time. Each may need those of earlier ones."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._stopped = False

    def wait_for(self, prefix: CachedPrefix, layer: int) -> None:
        """Wait until a text has its keys and values of a layer; raise RuntimeError if they will not come."""
        if layer in prefix.values:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or layer in prefix.values)
        if layer not in prefix.values:
            raise RuntimeError("an earlier pass has failed")

    def tell(self) -> None:
        """Report new keys and values."""
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        """Let no pass wait any more."""
        self._stopped = True
        self.tell()


def in_parallel(run: Callable[[T, Progress], R], passes: Sequence[T]) -> list[R]:
    """Return the result of each pass, in order, computed in `THREADS` threads, each with its share of the cores.

    Raises the error of the first pass that failed.
    """
    progress, inference = Progress(), torch.is_inference_mode_enabled()  # each thread has a mode of its own

    def one(some: T) -> R:
        try:
            with torch.inference_mode(inference):
                return run(some, progress)
        except BaseException:
            progress.stop()
            raise

    pool = ThreadPoolExecutor(THREADS, "pass", threads.compute_with_part, (THREADS,))
    try:
        return list(pool.map(one, passes))
    finally:
        progress.stop()
        pool.shutdown(cancel_futures=True)
