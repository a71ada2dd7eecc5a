"""Several writers side by side write what one writes, and end when they should."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import tiny_models
from srlm_cli import cores
from srlm_cli.engines import EngineSpec, open_engine
from srlm_cli.engines.base import Completion, Request, Sampling
from srlm_cli.engines.inprocess import lanes, memory, pages, refill
from srlm_cli.errors import EngineError

WORDS = ["a", "tell me " * 20 + "more", "tell me " * 20 + "less", "?" * 90, "b b b", "", "z" * 33, "tell me " * 9]
SAMPLING = Sampling(0.9, 0.95, 24)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tiny_models.save(tmp_path_factory.mktemp("tiny"))
    return open_engine(EngineSpec(model=str(folder), dtype="float32", batch_size=6))


@pytest.fixture
def three(monkeypatch):
    """Open three lanes, however few rows there are; return the threads in which steps were made."""
    monkeypatch.setattr(lanes, "count", lambda rows, device: 3)
    monkeypatch.setattr(lanes, "MIN_ROWS", 1)
    seen: set[str] = set()
    step = refill.Writer._step
    monkeypatch.setattr(refill.Writer, "_step", lambda w: seen.add(threading.current_thread().name) or step(w))
    return seen


def requests(count: int = 40) -> list[Request]:
    return [
        Request([{"role": "user", "content": f"{WORDS[at % 8]} {at}"}], SAMPLING, tuple(range(at, at + 1 + at % 4)))
        for at in range(count)
    ]


def texts(completions) -> list[list[str]]:
    return [completion.texts for completion in completions]


def lane_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lane")]


def test_three_lanes_write_the_rows_of_one_in_order(engine, request):
    alone = list(engine.generate(requests()))
    used = request.getfixturevalue("three")
    assert list(engine.generate(requests())) == alone
    assert len(used) == 3
    assert not lane_threads()


def test_choices_behind_a_text_are_answered_in_lanes(engine, three):
    def asking(at: int) -> Request:
        messages = [{"role": "user", "content": f"a{at}"}]

        def then(place: int, text: str) -> Request:
            return Request(messages, Sampling(0.0, 1.0, 1), (0,), prefix=text, choices=("1", "2"))

        return Request(messages, Sampling(1.0, 1.0, 6), (at, 7), then=then)

    told = [answer for completion in engine.generate(map(asking, range(12))) for answer in completion.then]
    answered = [answer for answer in told if answer]
    assert len(answered) >= 12  # a token that is no text is lost in it
    assert all(isinstance(one, Completion) and abs(sum(one.probabilities) - 1) < 1e-5 for one in answered)


def test_lanes_share_the_memory(engine, three, monkeypatch):
    wanted = texts(engine.generate(requests(16)))
    room = engine.reader.token_bytes() * pages.PAGE * 48
    monkeypatch.setattr(memory, "for_cache", lambda device: room)
    made = []
    opened = refill.Pages
    monkeypatch.setattr(refill, "Pages", lambda *given: made.append(given[1]) or opened(*given))
    assert texts(engine.generate(requests(16))) == wanted
    assert made == [16, 16, 16]


def test_a_call_within_a_call_is_answered(engine, three):
    alone = [completion.texts for completion in engine.generate(requests(9))]
    outer = engine.generate(requests(9))
    first = next(outer)
    within = engine.generate(requests(5))
    assert [next(within).texts, first.texts] == [alone[0]] * 2
    within.close()
    assert texts(outer) == alone[1:]
    assert not lane_threads()


def test_a_lane_that_runs_out_of_memory_goes_on_with_fewer_rows(engine, three, monkeypatch):
    wanted = texts(engine.generate(requests()))
    draw, failed = refill.draw, set()

    def short(logits, *settings):
        if len(logits) > 1 and len(failed) < 2 and threading.current_thread().name not in failed:
            failed.add(threading.current_thread().name)
            raise torch.OutOfMemoryError("out of memory")
        return draw(logits, *settings)

    monkeypatch.setattr(refill, "draw", short)
    assert texts(engine.generate(requests())) == wanted
    assert len(failed) == 2


def test_an_error_in_a_lane_ends_the_run(engine, three, monkeypatch):
    draw, calls = refill.draw, []

    def broken(*given):
        calls.append(1)
        if len(calls) > 20:
            raise EngineError("the model has gone")
        return draw(*given)

    monkeypatch.setattr(refill, "draw", broken)
    with pytest.raises(EngineError, match="the model has gone"):
        list(engine.generate(requests()))
    assert not lane_threads()


def test_an_interrupt_ends_a_pass_between_two_layers(engine, three, monkeypatch):
    """A pass over many prompts may take minutes."""
    begun, within, behind = threading.Event(), set(), []
    first, second = engine.net.model.layers

    def slow(*given, forward=first.forward, **more):
        within.add(threading.current_thread())
        begun.set()
        time.sleep(0.5)
        return forward(*given, **more)

    def note(*given, forward=second.forward, **more):
        behind.append(threading.current_thread())
        return forward(*given, **more)

    def interrupted(*given, **more):
        assert begun.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(first, "forward", slow)
    monkeypatch.setattr(second, "forward", note)
    monkeypatch.setattr(lanes, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate(requests()))
    assert within and not behind
    assert not lane_threads()


def test_tasks_are_shared_out_evenly_among_as_many_lanes_as_are_worth_while(engine, monkeypatch):
    monkeypatch.setattr(lanes, "MIN_ROWS", 4)
    handed: list[int] = []

    class Idle(refill.Writer):
        def advance(self):
            handed.append(self.open)
            self.waiting.clear()

    def handed_over(rows: int) -> list[int]:
        del handed[:]
        several = lanes.Lanes(lambda limit: Idle(engine.reader, engine.stops, limit, 512, None), 3, engine.stops, 24)
        for request in requests(40):
            task = refill.Task(request, [1], 1)
            several.add(task)
            if several.backlog >= rows:
                break
        several.advance()
        several.close()
        return handed

    assert len(handed_over(4)) == 1
    assert len(handed_over(8)) == 2
    assert len(handed_over(24)) == 3 and max(handed) <= 8 + 3


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
def test_how_many_lanes_there_are(monkeypatch, rows, device, cores_here, expected):
    monkeypatch.setattr(cores, "most", lambda: cores_here)
    assert lanes.count(rows, device) == expected


def test_a_thread_computes_with_its_part_of_the_cores(monkeypatch):
    monkeypatch.setattr(cores, "_watch", cores.Watch(6))
    before, seen = torch.get_num_threads(), []

    def compute(*of: int) -> None:
        for parts in of:
            cores.compute_with_part(parts)
            seen.append(torch.get_num_threads())

    for of in ((2, 3, 6, 12, 1, 6), (1,)):  # a thread begins with what another one set last
        thread = threading.Thread(target=compute, args=of)
        thread.start()
        thread.join()
    assert seen == [3, 2, 1, 1, 6, 1, 6]
    assert torch.get_num_threads() == before


def test_a_part_follows_what_the_watch_sees(monkeypatch):
    monkeypatch.setattr(cores, "_watch", watch := cores.Watch(8))
    seen = []

    def compute():
        cores.compute_with_part(2)
        watch.count.threads = 4
        watch()
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert seen == [2]
