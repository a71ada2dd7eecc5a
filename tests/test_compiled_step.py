"""A compiled step gives what a step of torch gives, whatever rows see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba.core.caching import FunctionCache

from srlm_cli.engines.inprocess import compiled_step, jit, kernels
from srlm_cli.engines.inprocess.compiled_step import CompiledStep
from srlm_cli.engines.inprocess.pages import Pages, Span
from srlm_cli.engines.inprocess.step import Step
from srlm_cli.engines.inprocess.texts import Text

COMMON = 70  # tokens that some rows begin with
HEADS, GROUPS = 2, 3
CLOSE = {torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}, torch.float16: {"rtol": 1e-3, "atol": 1e-3}}


def both(size: int, dtype: torch.dtype, window: int | None, members: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what three rows get from the step of torch in float32, and from the compiled one, which stores a dtype.

    The first two share a prompt of 40 tokens, behind the common text if they are members; the last has one of 5.
    """
    draw = torch.Generator().manual_seed(0)
    starts = [COMMON if 0 in members else 0, COMMON if 2 in members else 0]
    numbers = torch.randn(2, 12, HEADS, 32, size, generator=draw).to(dtype)
    asked = torch.randn(1, GROUPS * HEADS, 3, size, generator=draw).to(dtype)
    fresh = torch.randn(2, 1, HEADS, 3, size, generator=draw).to(dtype)
    before = torch.randn(2, HEADS, COMMON, size, generator=draw).to(dtype)
    given, kept = [], []
    for kind, stored in ((Step, torch.float32), (CompiledStep, dtype)):
        of = torch.float32 if dtype == torch.float16 else stored  # with products in float16 all else is float32
        pages = Pages({0: (torch.Size((HEADS, size)), torch.Size((HEADS, size)))}, 12, stored, "cpu")
        shared = [Span(pages.take(2, shared=True), 40, starts[0], [0, 1])]
        shared += [Span(pages.take(1, shared=True), 5, starts[1], [2])]
        own = [Span(pages.take(3), 65, starts[0] + 40, [0]), Span(pages.take(1), 1, starts[0] + 40, [1])]
        own += [Span(pages.take(2), 64, starts[1] + 5, [2])]
        pages.keys[0][:], pages.values[0][:] = numbers[0].transpose(2, 3), numbers[1]
        common = Text([0] * COMMON, keys={0: before[0].to(of)}, values={0: before[1].to(of)})
        step = kind(pages, own, shared, common, members, *(["cpu"] if kind is Step else []))
        given.append(step.attend(0, asked.to(of), *fresh.to(of), size**-0.5, window))
        kept.append(torch.cat([pages.keys[0].flatten(), pages.values[0].flatten()]).float())
        assert given[-1].dtype == of
        assert step.positions.tolist() == [starts[0] + 104, starts[0] + 40, starts[1] + 68]
    assert torch.equal(*kept)  # the new tokens are stored
    return given[0], given[1].float()


@pytest.mark.parametrize("size", [16, 64, 80])
@pytest.mark.parametrize("members", [[], [0, 1, 2], [0, 1], [2]], ids=str)
@pytest.mark.parametrize("window", [None, 3, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_get_what_the_step_of_torch_gives_them(size, members, window, dtype):
    expected, given = both(size, dtype, window, members)
    torch.testing.assert_close(given, expected, **CLOSE.get(dtype, {}))


def test_weights_are_exact_to_the_last_digits():
    """Of two keys, one of which has `score` more than the other."""
    for score in (0.01, 0.2, 0.34, 0.35, 0.5, 0.69, 0.7, 1.0, 3.3, 12.0):
        pages = Pages({0: (torch.Size((1, 16)), torch.Size((1, 16)))}, 1, torch.float32, "cpu")
        own = [Span(pages.take(1), 2, 0, [0])]
        pages.keys[0].zero_()
        pages.keys[0][0, 0, 0, 0] = score
        query = torch.zeros(1, 1, 1, 16)
        query[..., 0] = 1.0
        step = CompiledStep(pages, own, [], None, [])
        given = step.attend(0, query, torch.zeros_like(query), torch.ones_like(query), 1.0, None)
        assert given[0, 0, 0, 0].item() == pytest.approx(1 / (1 + np.exp(np.float64(np.float32(score)))), rel=1e-6)


def test_large_scores_are_weighed_without_overflow():
    pages = Pages({0: (torch.Size((1, 16)), torch.Size((1, 16)))}, 2, torch.float32, "cpu")
    own = [Span(pages.take(2), 40, 0, [0])]
    pages.keys[0].fill_(1.0)
    pages.values[0].fill_(2.0)
    pages.values[0][1] = 4.0
    pages.keys[0][1, :, :, 3] = 2.0  # the only key that counts, in the last page
    query, new = torch.full((1, 1, 1, 16), 1e4), torch.ones(1, 1, 1, 16)
    step = CompiledStep(pages, own, [], None, [])
    assert torch.equal(step.attend(0, query, new, new, 1.0, None), torch.full((1, 1, 1, 16), 4.0))


def test_what_compiled_code_cannot_read_is_left_to_torch():
    def layers(key: int, value: int) -> dict:
        return {0: (torch.Size((2, key)), torch.Size((2, value)))}

    assert compiled_step.fits(layers(64, 64), torch.float32, "cpu")
    assert compiled_step.fits(layers(64, 64), torch.bfloat16, "cpu")
    assert compiled_step.fits(layers(64, 64), torch.float16, "cpu")
    assert not compiled_step.fits(layers(64, 64), torch.float64, "cpu")
    assert not compiled_step.fits(layers(64, 64), torch.float32, "cuda:0")
    assert not compiled_step.fits(layers(64, 32), torch.float32, "cpu")
    assert not compiled_step.fits(layers(24, 24), torch.float32, "cpu")


def stored(store) -> float:
    """Return the sum of what is in a page behind a store of sixteen ones."""
    keys, values = np.zeros(512, np.float32), np.zeros(512, np.float32)
    store(keys, values, np.ones(16, np.float32), np.ones(16, np.float32), np.array([3]))
    assert (keys == values.reshape(32, 16).T.ravel()).all()
    return keys.sum()


def test_code_is_compiled_where_no_folder_can_keep_it(monkeypatch):
    def decorator(*args, cache: bool = False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    njit = jit.numba.njit
    monkeypatch.setattr(jit.numba, "njit", decorator)
    assert stored(kernels.compiled.__wrapped__(1, 1, 16)[0]) == 16


def test_code_is_compiled_where_the_folder_is_full(monkeypatch):
    def full(*given):
        tried.append(1)
        raise OSError(28, "No space left on device")

    tried = []
    monkeypatch.setattr(FunctionCache, "load_overload", lambda *given: None)
    monkeypatch.setattr(FunctionCache, "save_overload", full)
    assert stored(kernels.compiled.__wrapped__(1, 1, 16)[0]) == 16
    assert tried
