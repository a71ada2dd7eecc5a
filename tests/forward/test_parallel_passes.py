"""Passes in two threads give what they give one after the other, and none waits for one that has failed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import Event, current_thread

import pytest
import torch

import tiny_models
from srlm_cli.forward import packed, parallel_passes
from srlm_cli.forward.packed import PackedModel
from srlm_cli.forward.parallel_passes import Progress, in_parallel
from srlm_cli.forward.prefix import CachedPrefix, find_prefixes

PROMPT = list(range(40, 60))
TEXTS = [[*PROMPT[:6], *[10 + at] * 8, *more] for at in range(6) for more in ([1, 2], [3], [1, 4, 5])]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Two threads to compute with, on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def logits(model: PackedModel) -> torch.Tensor:
    """Return the logits after texts, most of which begin as one before them does."""
    texts = [CachedPrefix(tokens) for tokens in TEXTS]
    find_prefixes(texts, [])
    assert sum(bool(text.prefix) for text in texts) == len(texts) - 1
    with torch.inference_mode():
        return model.read(texts)


def test_logits_are_those_of_passes_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from transformers import LlamaConfig, LlamaForCausalLM

    from srlm_cli.forward.cpu import linear

    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**{**tiny_models.SIZES, "hidden_size": 128, "num_hidden_layers": 3})).eval()
    linear.use_in(net, torch.bfloat16)
    monkeypatch.setitem(packed.TOKENS_A_PASS, "cpu", 24)
    used, second = set(), Event()
    before = PackedModel._forward

    def noted(self, *arguments):
        """Run a pass; the first one begins when the second one has run as far as it can."""
        name = current_thread().name
        used.add(name.split("_")[0])
        if name == "pass_0" and not second.is_set():
            second.wait(10)
            time.sleep(0.05)
        elif name == "pass_1":
            second.set()
        return before(self, *arguments)

    monkeypatch.setattr(PackedModel, "_forward", noted)
    model = PackedModel(net, "cpu")
    in_two = logits(model)
    assert used == {"pass"}
    torch.set_num_threads(1)
    in_turn = logits(model)
    assert used == {"pass", "MainThread"}
    assert torch.equal(in_two, in_turn)


def test_a_pass_waits_for_the_keys_of_an_earlier_one() -> None:
    prefix, read = CachedPrefix([1]), []

    def run(number: int, progress: Progress) -> int:
        if number:
            progress.wait_for(prefix, 0)
            read.append(prefix.values[0])
        else:
            prefix.values[0] = torch.ones(1)
            progress.tell()
        return number

    assert in_parallel(run, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert len(read) == 3


def test_the_error_of_the_first_pass_that_fails_is_raised_and_none_waits_for_its_keys() -> None:
    def run(number: int, progress: Progress) -> None:
        if number == 0:
            raise RuntimeError("out of memory")
        progress.wait_for(CachedPrefix([1]), 0)

    with pytest.raises(RuntimeError, match="out of memory"):
        in_parallel(run, range(5))


def test_each_thread_has_its_share_of_the_cores_and_the_mode_of_the_caller() -> None:
    def run(number: int, progress: Progress) -> tuple[int, bool]:
        return torch.get_num_threads(), torch.is_inference_mode_enabled()

    with torch.inference_mode():
        assert {inference for _, inference in in_parallel(run, range(4))} == {True}
    share = max(1, parallel_passes.threads.most() // parallel_passes.THREADS)
    assert {count for count, _ in in_parallel(run, range(4))} == {share}
