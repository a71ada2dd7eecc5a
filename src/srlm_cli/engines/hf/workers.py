"""Several schedulers in parallel, each in its own process with one thread and a share of the cores.

While one waits for memory, the others compute; none waits for other threads or for Python's lock. The processes are
forked, so they share the weights. docs/measurements.md shows the effect.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import count as numbers
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Thread

import torch

from srlm_cli import threads
from srlm_cli.engines.base import Completion
from srlm_cli.engines.hf.scheduler import ROOM_TO_READ, Scheduler
from srlm_cli.engines.hf.stopping import Stops
from srlm_cli.engines.hf.tasks import BaseScheduler, Task
from srlm_cli.errors import EngineError
from srlm_cli.forward import memory
from srlm_cli.forward.prefix import common_prefix_len

# Rows that make one more worker worth while: with fewer, reading all weights once per worker costs more than it brings.
MIN_ROWS = 32
FORKS = sys.platform == "linux"  # elsewhere a process that has threads is not safe to fork

Given = tuple[int, list[tuple[int, Task]]]  # how many workers are at work, and tasks with their numbers
Told = tuple[int, list[tuple[int, Completion]]]  # how many completions have ended, and the answers to tasks


def count(rows: int, device: str) -> int:
    """Return the best number of workers for a number of sequences; all workers have the same number of cores."""
    if device != "cpu" or not FORKS:
        return 1
    most = threads.most()
    workers = max(1, min(most, rows // MIN_ROWS))
    return most // -(-most // workers)


class WorkerPool(BaseScheduler):
    """Generates the completions of many tasks in several worker processes, at most `limit` in total.

    `open_scheduler(limit)` returns a new scheduler.
    """

    def __init__(self, open_scheduler: Callable[[int], Scheduler], workers: int, stops: Stops, limit: int) -> None:
        super().__init__(stops, limit)
        self.workers = [Worker(open_scheduler(-(-limit // workers))) for _ in range(workers)]
        self.least_common = math.inf  # the fewest tokens that a prompt had in common with the one before it

    def add(self, task: Task) -> None:
        if self.waiting:
            self.least_common = min(self.least_common, common_prefix_len(self.waiting[-1].prompt, task.prompt))
        super().add(task)

    def advance(self) -> None:
        """Give tasks to workers with room, and wait until some completions have ended."""
        handed = [self._for_worker(at) for at in range(len(self.workers))]
        busy = sum(worker.open > 0 for worker in self.workers)
        for worker, tasks in zip(self.workers, handed, strict=True):
            worker.give(tasks, busy)
        told = wait([worker.pipe for worker in self.workers if worker.open])
        for worker in self.workers:
            if worker.open and worker.pipe in told:
                worker.hear()

    def close(self) -> None:
        """Stop the workers, also in the middle of a step."""
        started = [worker for worker in self.workers if worker.process]
        for worker in started:
            worker.process.kill()
        for worker in started:
            worker.process.join()
            worker.pipe.close()

    def _for_worker(self, at: int) -> list[Task]:
        """Take waiting tasks for a worker: an equal share of the rest, if that is enough for several workers.

        Tasks with a long common prefix, such as the replies to one prompt that are judged, go to the same worker, which
        reads the prefix once. They are few, and wait there until there is room.
        """
        left = self.backlog + sum(worker.open for worker in self.workers)
        workers = max(1, min(len(self.workers), left // MIN_ROWS))
        worker, tasks = self.workers[at], []
        share = min(worker.limit, -(-left // workers)) if at < workers else 0
        most = share + worker.limit // ROOM_TO_READ
        while self.waiting and (worker.open < share or (tasks and worker.open < most and self._goes_on(tasks[-1]))):
            tasks.append(self.waiting.popleft())
            worker.open += len(tasks[-1].left)
        return tasks

    def _goes_on(self, task: Task) -> bool:
        """Return whether the next task shares a longer prefix with the one before it than all tasks do."""
        return common_prefix_len(task.prompt, self.waiting[0].prompt) > self.least_common


class Worker:
    """One scheduler in its own process, with `open` unfinished completions; the first tasks start the process."""

    pipe: Connection

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.process = scheduler, None
        self.limit, self.open, self.busy = scheduler.limit, 0, 0
        self.tasks: dict[int, Task] = {}
        self.numbers = numbers()

    def start(self) -> None:
        """Start the process."""
        fork = multiprocessing.get_context("fork")
        self.pipe, theirs = fork.Pipe()
        self.process = fork.Process(target=_serve, args=(self.scheduler, theirs, self.pipe), name="worker", daemon=True)
        self.process.start()
        theirs.close()

    def give(self, tasks: list[Task], busy: int) -> None:
        """Give tasks to the worker; `busy` workers are active, including this one."""
        numbered = list(zip(self.numbers, tasks, strict=False))
        self.tasks.update(numbered)
        if self.open and (tasks or busy != self.busy):
            if not self.process:
                self.start()
            self.busy = busy
            with suppress(OSError):  # `hear` says that it has ended
                self.pipe.send((busy, numbered))

    def hear(self) -> None:
        """Store the completions that have ended; raise the error of the process."""
        try:
            told = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise EngineError(
                f"a worker process ended (exit {self.process.exitcode})",
                "out of memory? try a smaller --batch-size",
            ) from None
        if isinstance(told, BaseException):
            raise told
        ended, answers = told
        self.open -= ended
        for number, answer in answers:
            self.tasks.pop(number).answer = answer


# --- in the worker process -------------------------------------------------------------------


def _serve(scheduler: Scheduler, pipe: Connection, other_end: Connection) -> None:
    """Answer tasks until the parent process ends."""
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    memory.keep_freed()
    given: SimpleQueue[Given] = SimpleQueue()
    # Not in this thread: OpenMP takes it for one that has others waiting, and these were not forked.
    Thread(target=_write, args=(scheduler, given, pipe), daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            given.put(pipe.recv())
    os._exit(0)


def _write(scheduler: Scheduler, given: SimpleQueue[Given], pipe: Connection) -> None:
    """Generate the completions of the given tasks, and report those that have ended, or the error."""
    tasks: dict[int, Task] = {}
    try:
        with torch.inference_mode():
            while True:
                while not scheduler.open or not given.empty():
                    busy, numbered = given.get()
                    threads.compute_with_part(busy)
                    tasks.update(numbered)
                    scheduler.waiting.extend(task for _, task in numbered)
                before = scheduler.open
                scheduler.advance()
                if ended := before - scheduler.open:
                    answers = [(number, task.answer) for number, task in tasks.items() if task.answer]
                    for number, _ in answers:
                        del tasks[number]
                    pipe.send((ended, answers))
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))
        with suppress(OSError):
            pipe.send(error)
