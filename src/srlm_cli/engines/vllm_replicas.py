"""Data parallelism: copies of the model, each in a process of its own, that take windows of requests in turn.

vLLM's offline classes refuse `data_parallel_size` above 1 in one process; the copies of a model whose
parts need not talk to each other are as many independent engines.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Connection

from srlm_cli.engines.base import Completion, EngineSpec, Request
from srlm_cli.errors import EngineError, OptionError, SrlmError

BATCHES_A_WINDOW = 4


class Replicas:
    """`data_parallel_size` engines in processes of their own, which end with this one."""

    def __init__(self, spec: EngineSpec) -> None:
        self.name, self.model = spec.engine, spec.model
        self.rows_a_window = spec.batch_size * BATCHES_A_WINDOW
        self.replicas = [_Replica(replace(spec, data_parallel_size=1), own) for own in device_settings(spec)]
        atexit.register(self.close)  # before multiprocessing, which would wait for them
        for replica in self.replicas:
            replica.collect()  # loaded
        self._numbers = count()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield completions in order; each replica has one window at a time."""
        asked: deque[tuple[_Replica, int]] = deque()
        for window in self._windows(requests):
            if len(asked) == len(self.replicas):
                yield from _answer(*asked.popleft())
            replica = self.replicas[next(self._numbers) % len(self.replicas)]
            asked.append((replica, replica.ask(window)))
        while asked:
            yield from _answer(*asked.popleft())

    def _windows(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Cut requests into windows of a few batches: what a killed run has to do again, times the replicas."""
        window, rows = [], 0
        for request in requests:
            window.append(request)
            rows += len(request.seeds)
            if rows >= self.rows_a_window:
                yield window
                window, rows = [], 0
        if window:
            yield window

    def close(self) -> None:
        """End the processes: idle ones exit by themselves, busy ones are terminated."""
        for replica in self.replicas:
            replica.pipe.close()
            if replica.busy:
                replica.process.terminate()
        for replica in self.replicas:
            replica.process.join()


class _Replica:
    """One engine in a process of its own, and what it has answered."""

    def __init__(self, spec: EngineSpec, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, spec, environment))
        self.process.start()
        theirs.close()
        self.numbers = count()
        self.busy: deque[int] = deque([next(self.numbers)])  # number 0 is the load
        self.answers: dict[int, list[Completion]] = {}

    def ask(self, window: list[Request]) -> int:
        """Hand a window over when the one before it is done: two large messages never cross in the pipe."""
        while self.busy:
            self.collect()
        self.busy.append(next(self.numbers))
        try:
            self.pipe.send(window)
        except OSError as error:
            raise EngineError("a replica of vllm has ended") from error
        return self.busy[-1]

    def collect(self) -> None:
        """Wait for the answer that is due and keep it; raise the replica's error."""
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise EngineError("a replica of vllm has ended") from error
        if isinstance(answer, SrlmError):
            raise answer
        self.answers[self.busy.popleft()] = answer


def _answer(replica: _Replica, number: int) -> list[Completion]:
    """Return the completions of a window, waiting for them if need be."""
    while number not in replica.answers:
        replica.collect()
    return replica.answers.pop(number)


def _serve(pipe: Connection, spec: EngineSpec, environment: dict[str, str]) -> None:
    """Answer windows of requests until the other end of the pipe is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ.update(environment)
    try:
        from srlm_cli.engines.vllm import VllmEngine
        from srlm_cli.models.locate import use

        use(spec.model, spec.revision, spec.trust_remote_code)
        engine = VllmEngine(spec)
        pipe.send([])
        while True:
            pipe.send(list(engine.generate(pipe.recv())))
    except SrlmError as error:
        pipe.send(type(error)(error.message, error.hint))
    except (EOFError, OSError):
        return


def device_settings(spec: EngineSpec) -> list[dict[str, str]]:
    """Return the environment of each replica: GPUs of its own, or processor cores where there are no GPUs."""
    import torch

    size, copies = spec.tensor_parallel_size, spec.data_parallel_size
    if torch.cuda.is_available():
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices, kind = named.split(",") if named else [str(at) for at in range(torch.cuda.device_count())], "GPUs"
    else:
        devices, kind = [str(core) for core in sorted(os.sched_getaffinity(0))], "cores"
    if len(devices) < size * copies:
        raise OptionError(
            f"{copies} copies of the model on {size} {kind} each need {size * copies}, and {len(devices)} are here",
            "a smaller --data-parallel-size or --tensor-parallel-size; --engine openai for more machines",
        )
    if kind == "GPUs":
        return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[at * size : (at + 1) * size])} for at in range(copies)]
    share = len(devices) // (size * copies)
    cores = [",".join(devices[at * share : (at + 1) * share]) for at in range(size * copies)]
    return [{"VLLM_CPU_OMP_THREADS_BIND": "|".join(cores[at * size : (at + 1) * size])} for at in range(copies)]
