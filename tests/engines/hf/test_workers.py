"""Several writers side by side write what one writes, and end when they should."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

import psutil
import pytest
import torch

import tiny_models
from srlm_cli import threads
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import Completion, EngineSpec, Request, Sampling
from srlm_cli.engines.hf import scheduler, workers
from srlm_cli.errors import EngineError
from srlm_cli.forward import kv_cache, memory

WORDS = ["a", "tell me " * 20 + "more", "tell me " * 20 + "less", "?" * 90, "b b b", "", "z" * 33, "tell me " * 9]
SAMPLING = Sampling(0.9, 0.95, 24)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tiny_models.save(tmp_path_factory.mktemp("tiny"))
    return open_engine(EngineSpec(model=str(folder), dtype="float32", batch_size=6))


@pytest.fixture
def three(monkeypatch):
    """Open three workers, however few rows there are; return the processes that have told of completions."""
    monkeypatch.setattr(workers, "count", lambda rows, device: 3)
    monkeypatch.setattr(workers, "MIN_ROWS", 1)
    seen: set[int] = set()
    hear = workers.Worker.hear
    monkeypatch.setattr(workers.Worker, "hear", lambda worker: seen.add(worker.process.pid) or hear(worker))
    return seen


def requests(count: int = 40) -> list[Request]:
    return [
        Request([{"role": "user", "content": f"{WORDS[at % 8]} {at}"}], SAMPLING, tuple(range(at, at + 1 + at % 4)))
        for at in range(count)
    ]


def texts(completions) -> list[list[str]]:
    return [completion.texts for completion in completions]


def test_three_workers_write_the_rows_of_one_in_order(engine, request):
    alone = list(engine.generate(requests()))
    used = request.getfixturevalue("three")
    assert list(engine.generate(requests())) == alone
    assert len(used) == 3
    assert not multiprocessing.active_children()


def test_a_worker_is_started_when_it_has_something_to_do(engine, three):
    one = Request([{"role": "user", "content": "a"}], SAMPLING, (1,))
    assert len(list(engine.generate([one]))) == 1
    assert len(three) == 1
    started = []
    for _ in engine.generate(requests(9)):
        started.append(len(multiprocessing.active_children()))
    assert max(started) == 3


@dataclass
class Ask:
    """Ask which of two digits goes on from a text."""

    messages: list

    def __call__(self, place: int, text: str, thought: object) -> Request:
        return Request(self.messages, Sampling(0.0, 1.0, 1), (0,), prefix=text, choices=("1", "2"))


def test_choices_behind_a_text_are_answered_in_lanes(engine, three):
    def asking(at: int) -> Request:
        messages = [{"role": "user", "content": f"a{at}"}]
        return Request(messages, Sampling(1.0, 1.0, 6), (at, 7), follow_up=Ask(messages))

    told = [answer for completion in engine.generate(map(asking, range(12))) for answer in completion.follow_ups]
    answered = [answer for answer in told if answer]
    assert len(answered) >= 12  # a token that is no text is lost in it
    assert all(isinstance(one, Completion) and abs(sum(one.probabilities) - 1) < 1e-5 for one in answered)


def test_workers_share_the_memory(engine, three, monkeypatch, tmp_path):
    wanted = texts(engine.generate(requests(16)))
    room = engine.reader.token_bytes() * kv_cache.BLOCK_SIZE * 48
    monkeypatch.setattr(memory, "for_cache", lambda device: room)
    opened = scheduler.PagedKVCache

    def noting(layers, count, *more):
        (tmp_path / str(os.getpid())).write_text(str(count))
        return opened(layers, count, *more)

    monkeypatch.setattr(scheduler, "PagedKVCache", noting)
    assert texts(engine.generate(requests(16))) == wanted
    assert [file.read_text() for file in tmp_path.iterdir()] == ["16", "16", "16"]


def test_a_call_within_a_call_is_answered(engine, three):
    alone = [completion.texts for completion in engine.generate(requests(9))]
    outer = engine.generate(requests(9))
    first = next(outer)
    within = engine.generate(requests(5))
    assert [next(within).texts, first.texts] == [alone[0]] * 2
    within.close()
    assert texts(outer) == alone[1:]
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_lane_that_runs_out_of_memory_goes_on_with_fewer_rows(engine, three, monkeypatch, tmp_path):
    wanted = texts(engine.generate(requests()))
    draw = scheduler.draw

    def short(logits, *settings):
        if len(logits) > 1 and not (failed := tmp_path / str(os.getpid())).exists():
            failed.touch()
            raise torch.OutOfMemoryError("out of memory")
        return draw(logits, *settings)

    monkeypatch.setattr(scheduler, "draw", short)
    assert texts(engine.generate(requests())) == wanted
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("error", [EngineError("the model has gone", "look for it"), ZeroDivisionError("a fault")])
def test_an_error_in_a_lane_ends_the_run(engine, three, monkeypatch, error):
    draw, calls = scheduler.draw, []

    def broken(*given):
        calls.append(1)
        if len(calls) > 20:
            raise error
        return draw(*given)

    monkeypatch.setattr(scheduler, "draw", broken)
    with pytest.raises(type(error), match=str(error.args[0])) as met:
        list(engine.generate(requests()))
    assert "in broken" in met.value.__notes__[0]
    assert str(met.value) == str(error)
    assert not multiprocessing.active_children()


def test_a_lane_that_is_killed_is_told_in_one_line(engine, three, monkeypatch):
    generated = engine.generate(requests())
    next(generated)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"worker process ended \(exit -9\)"):
        list(generated)
    assert not multiprocessing.active_children()


def test_an_interrupt_ends_a_pass_between_two_layers(engine, three, monkeypatch, tmp_path):
    """A pass over many prompts may take minutes."""
    first, second = engine.net.model.layers
    begun, behind = tmp_path / "begun", tmp_path / "behind"

    def slow(*given, forward=first.forward, **more):
        begun.touch()
        time.sleep(2)
        return forward(*given, **more)

    def note(*given, forward=second.forward, **more):
        behind.touch()
        return forward(*given, **more)

    def interrupted(*given, **more):
        while not begun.exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(first, "forward", slow)
    monkeypatch.setattr(second, "forward", note)
    monkeypatch.setattr(workers, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate(requests()))
    assert begun.exists() and not behind.exists()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_workers_end_when_the_process_that_asks_is_killed(srlm, engine, tmp_path):
    code = f"""
import multiprocessing
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling
from srlm_cli.engines.hf import workers
workers.count = lambda rows, device: 3
workers.MIN_ROWS = 1
engine = open_engine(EngineSpec(model={engine.model!r}, dtype="float32"))
asked = [Request([dict(role="user", content="a")], Sampling(1.0, 1.0, 400), tuple(range(9)))] * 999
generated = engine.generate(asked)
next(generated)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
list(generated)
"""
    script = tmp_path / "ask.py"
    script.write_text(code)
    asking = srlm.start(command=[sys.executable, str(script)])
    pids = [int(pid) for pid in asking.stdout.readline().split()]
    assert len(pids) == 3 and all(map(psutil.pid_exists, pids))
    asking.kill()
    asking.wait()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)
    assert not alive


@pytest.fixture
def idle(monkeypatch):
    """Lanes that write nothing; returns the tasks that each is given."""
    given: list[list[scheduler.Task]] = []
    monkeypatch.setattr(workers, "MIN_ROWS", 4)
    monkeypatch.setattr(workers, "wait", lambda pipes: [])

    class Idle:
        def __init__(self, limit):
            self.limit, self.open, self.pipe, self.tasks = limit, 0, None, []
            given.append(self.tasks)

        def give(self, tasks, busy):
            self.tasks += tasks
            assert self.open == sum(len(task.left) for task in self.tasks)

    monkeypatch.setattr(workers, "Worker", Idle)
    return given


def test_tasks_are_shared_out_evenly_among_as_many_workers_as_are_worth_while(engine, idle):
    def handed_over(rows: int) -> list[int]:
        several = workers.WorkerPool(lambda limit: limit, 3, engine.stops, 24)
        for at, request in enumerate(requests(40)):
            several.add(scheduler.Task(request, [at], 1))
            if several.backlog >= rows:
                break
        several.advance()
        return [worker.open for worker in several.workers if worker.open]

    assert len(handed_over(4)) == 1
    assert len(handed_over(8)) == 2
    assert len(handed_over(24)) == 3 and max(handed_over(24)) <= 8 + 3


@pytest.mark.parametrize(("alike", "first", "second"), [(1, 32, 64), (5, 35, 70), (50, 36, 72), (1000, 32, 64)])
def test_tasks_that_begin_alike_go_to_one_worker_if_they_are_few(engine, idle, alike, first, second):
    several = workers.WorkerPool(lambda limit: limit, 2, engine.stops, 64)
    for at in range(100):
        several.add(scheduler.Task(Request([], SAMPLING, (1,)), [7, 7, at // alike, at], 1))
    several.advance()
    assert [[task.prompt[-1] for task in tasks] for tasks in idle] == [[*range(first)], [*range(first, second)]]


def test_a_lane_is_given_no_more_rows_than_it_has_room_for(engine, three, monkeypatch):
    most = []
    give = workers.Worker.give

    def noting(worker, tasks, busy):
        give(worker, tasks, busy)
        most.append(worker.open)

    monkeypatch.setattr(workers.Worker, "give", noting)
    list(engine.generate(requests()))
    assert max(most) <= 2 + 3  # of six rows two a worker, and the last task as it is


@pytest.mark.parametrize(
    ("rows", "device", "cores_here", "expected"),
    [
        (256, "cpu", 2, 2),
        (256, "cpu", 64, 8),
        (256, "cpu", 12, 6),
        (256, "cpu", 15, 7),
        (63, "cpu", 2, 1),
        (64, "cpu", 2, 2),
        (1, "cpu", 2, 1),
        (256, "cuda", 2, 1),
    ],
)
def test_how_many_workers_there_are(monkeypatch, rows, device, cores_here, expected):
    monkeypatch.setattr(workers, "FORKS", True)
    monkeypatch.setattr(threads, "most", lambda: cores_here)
    assert workers.count(rows, device) == expected


def test_a_system_that_does_not_fork_has_one_worker(monkeypatch):
    monkeypatch.setattr(workers, "FORKS", False)
    monkeypatch.setattr(threads, "most", lambda: 8)
    assert workers.count(256, "cpu") == 1


def test_a_thread_computes_with_its_part_of_the_cores(monkeypatch):
    monkeypatch.setattr(threads, "_watch", threads.Watch(6))
    before, seen = torch.get_num_threads(), []

    def compute(*of: int) -> None:
        for parts in of:
            threads.compute_with_part(parts)
            seen.append(torch.get_num_threads())

    for of in ((2, 3, 6, 12, 1, 6), (1,)):  # a thread begins with what another one set last
        thread = threading.Thread(target=compute, args=of)
        thread.start()
        thread.join()
    assert seen == [3, 2, 1, 1, 6, 1, 6]
    assert torch.get_num_threads() == before


def test_a_part_follows_what_the_watch_sees(monkeypatch):
    monkeypatch.setattr(threads, "_watch", watch := threads.Watch(8))
    seen = []

    def compute():
        threads.compute_with_part(2)
        watch.count.threads = 4
        watch()
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert seen == [2]
