"""Equal questions that have one answer reach the engine once, and every request has its completion, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import pytest

from srlm_cli.engines import equal_questions as module
from srlm_cli.engines.base import Completion, Request, Sampling
from srlm_cli.engines.equal_questions import asked_once


def question(text: str, temperature: float = 0.0, seed: int = 0) -> Request:
    messages = [{"role": "user", "content": text}]
    return Request(messages, Sampling(temperature), (seed,), prefix="Score: ", choices=("0", "5"))


class Batches:
    """An engine that reads `size` requests at a time, and numbers those that reach it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.asked: list[Request] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        pending = iter(requests)
        while batch := list(islice(pending, self.size)):
            for request in batch:
                self.asked.append(request)
                yield Completion([f"{request.messages[0]['content']}:{len(self.asked)}"], ["stop"], 1, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_question_is_asked_once(size: int) -> None:
    engine = Batches(size)
    requests = [question(text, seed=seed) for seed, text in enumerate("aabacbbaa")]
    texts = [one.texts[0] for one in asked_once(requests, engine.generate)]
    assert [request.messages[0]["content"] for request in engine.asked] == ["a", "b", "c"]
    assert texts == ["a:1", "a:1", "b:2", "a:1", "c:3", "b:2", "b:2", "a:1", "a:1"]


@pytest.mark.parametrize(
    "other",
    [
        question("a", temperature=0.5),  # drawn by its seed
        replace(question("a"), choices=()),  # a text
        replace(question("a"), follow_up=lambda place, text, thought: None),
        replace(question("a"), prefix="Grade: "),
        replace(question("a"), choices=("0", "1")),
        replace(question("a"), thought="<think>So.</think>"),
        replace(question("a"), template_kwargs={"enable_thinking": True}),
        replace(question("a"), sampling=Sampling(0.0, repetition_penalty=1.5)),
        replace(question("a"), seeds=(0, 1)),
    ],
)
def test_another_question_is_asked(other: Request) -> None:
    engine = Batches(4)
    assert len(list(asked_once([question("a"), other, question("a")], engine.generate))) == 3
    assert engine.asked == [question("a"), other]


def test_texts_are_drawn_each_time() -> None:
    engine = Batches(2)
    list(asked_once([question("a", temperature=1.0)] * 3, engine.generate))
    assert len(engine.asked) == 3


def test_few_requests_wait_and_few_questions_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 3)
    read = 0

    def all_alike() -> Iterator[Request]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield question("a")

    engine = Batches(2)
    done = asked_once(all_alike(), engine.generate)
    next(done)
    assert read == 4  # the first, two that wait for it, and a second one that fills the batch
    assert len(list(done)) == 99

    engine = Batches(1)
    list(asked_once([question(text) for text in "abcda"], engine.generate))
    assert [request.messages[0]["content"] for request in engine.asked] == ["a", "b", "c", "d", "a"]


def test_an_error_of_the_engine_comes_through() -> None:
    def broken(requests: Iterable[Request]) -> Iterator[Completion]:
        next(iter(requests))
        raise OSError("gone")
        yield

    with pytest.raises(OSError, match="gone"):
        list(asked_once([question("a")], broken))
