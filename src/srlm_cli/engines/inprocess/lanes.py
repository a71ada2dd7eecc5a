"""Several writers side by side, each of which computes in one thread at a time, with a part of the cores.

While one waits for memory the other computes, and none waits for the threads of a product to meet. What it
brings: docs/measurements.md.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Event

import torch

from srlm_cli import cores
from srlm_cli.engines.inprocess.attention import giving_up
from srlm_cli.engines.inprocess.refill import Writer
from srlm_cli.engines.inprocess.stops import Stops
from srlm_cli.engines.inprocess.tasks import TaskWriter

# Rows that make a lane of their own worth while: with fewer, reading all weights once a lane costs more than it brings.
MIN_ROWS = 32


def count(rows: int, device: str) -> int:
    """Return in how many lanes so many rows are best written, each with as many of the cores as the others."""
    if device != "cpu":
        return 1
    most = cores.most()
    lanes = max(1, min(most, rows // MIN_ROWS))
    return most // -(-most // lanes)


class Lanes(TaskWriter):
    """Completions of many tasks by `lanes` writers, at most `limit` in all; a task is handed to a lane that has room.

    `open_writer`, given its limit, returns a writer that nothing else uses.
    """

    def __init__(self, open_writer: Callable[[int], Writer], lanes: int, stops: Stops, limit: int) -> None:
        super().__init__(stops, limit)
        self.writers = [open_writer(-(-limit // lanes)) for _ in range(lanes)]
        self.open = [0] * lanes  # completions that a lane has to write, as known when it last stood still
        self.pool = ThreadPoolExecutor(lanes, "lane")
        self.running: dict[Future[None], int] = {}  # which lane it is
        self.ended = Event()

    def advance(self) -> None:
        """Let each lane go on that has something to write, and wait until one of them has gone on."""
        idle = [lane for lane in range(len(self.writers)) if lane not in self.running.values()]
        for lane in idle:
            self._hand_over(lane)
        going_on = [lane for lane in idle if self.open[lane]]
        busy = len(self.running) + len(going_on)
        for lane in going_on:
            self.running[self.pool.submit(self._advance, self.writers[lane], busy)] = lane
        for done in wait(self.running, return_when=FIRST_COMPLETED).done:
            lane = self.running.pop(done)
            done.result()
            self.open[lane] = self.writers[lane].open

    def close(self) -> None:
        """End what is under way, in the middle of a step."""
        self.ended.set()
        self.pool.shutdown()

    def _advance(self, writer: Writer, busy: int) -> None:
        cores.compute_with_part(busy)
        with torch.inference_mode(), giving_up(self.ended):
            writer.advance()

    def _hand_over(self, lane: int) -> None:
        """Hand tasks that wait over to a lane: an equal share of all that is left, where that is enough for several."""
        left = self.backlog + sum(self.open)
        lanes = max(1, min(len(self.writers), left // MIN_ROWS))
        if lane >= lanes:
            return
        writer = self.writers[lane]
        share = min(writer.limit, -(-left // lanes))
        while self.waiting and self.open[lane] < share:
            writer.waiting.append(self.waiting.popleft())
            self.open[lane] += len(writer.waiting[-1].left)
