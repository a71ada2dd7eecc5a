"""A compiled step gives what a step of torch gives, whatever rows see."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numba.core.caching import FunctionCache

from helpers import slow
from srlm_cli.forward.attention import Prefill
from srlm_cli.forward.cpu import attention_kernels, jit, llvm, paged_attention
from srlm_cli.forward.cpu.paged_attention import CompiledDecode, CompiledPrefill, _Paged
from srlm_cli.forward.kv_cache import BLOCK_SIZE, PagedKVCache, Span, blocks_for
from srlm_cli.forward.paged_attention import Decode
from srlm_cli.forward.prefix import CachedPrefix

COMMON = 70  # tokens that some rows begin with
HEADS, GROUPS = 2, 3
CLOSE = {torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}, torch.float16: {"rtol": 1e-3, "atol": 1e-3}}


LAYER = {size: {0: (torch.Size((HEADS, size)), torch.Size((HEADS, size)))} for size in (16, 64, 80)}


def fill(cache: PagedKVCache, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Store keys and values, (blocks, heads, BLOCK_SIZE, size), as compiled code reads them."""
    slots = np.arange(cache.count * BLOCK_SIZE)
    of_tokens = (of.transpose(1, 2).flatten(0, 1).flatten(1).float().numpy() for of in (keys, values))
    _Paged(cache, [], slots).store(0, *of_tokens, slots, slots)


def contents(cache: PagedKVCache) -> torch.Tensor:
    """Return the keys and values in blocks, (2, blocks, heads, BLOCK_SIZE, size), as float32."""
    keys, values = cache.keys[0], cache.values[0]
    if cache.dtype == torch.bfloat16:
        count, heads, size, _ = keys.shape
        keys = keys.view(count, heads, size // 2, BLOCK_SIZE, 2).transpose(3, 4).reshape(keys.shape)
        values = values.view(count, heads, BLOCK_SIZE // 2, size, 2).transpose(3, 4).reshape(values.shape)
    return torch.stack([keys.transpose(2, 3), values]).float()


def both(
    size: int, dtype: torch.dtype, window: int | None, members: list[int], given_in: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what three rows get from the step of torch in float32, and from the compiled one, which stores a dtype.

    It is `given_in` another one where a whole model has it.

    The first two share a prompt of 40 tokens, behind the common text if they are members; the last has one of 5.
    """
    draw = torch.Generator().manual_seed(0)
    starts = [COMMON if 0 in members else 0, COMMON if 2 in members else 0]
    numbers = torch.randn(2, 12, HEADS, BLOCK_SIZE, size, generator=draw).to(dtype).float()
    asked = torch.randn(1, GROUPS * HEADS, 3, size, generator=draw).to(dtype).float()
    fresh = torch.randn(2, 1, HEADS, 3, size, generator=draw).to(dtype).float()
    given, kept = [], []
    for kind, stored in ((Decode, torch.float32), (CompiledDecode, dtype)):
        cache = PagedKVCache(LAYER[size], 12, stored, "cpu")
        shared = [Span(cache.allocate(blocks_for(40), shared=True), 40, starts[0], [0, 1])]
        shared += [Span(cache.allocate(1, shared=True), 5, starts[1], [2])]
        own = [
            Span(cache.allocate(blocks_for(65)), 65, starts[0] + 40, [0]),
            Span(cache.allocate(1), 1, starts[0] + 40, [1]),
        ]
        own += [Span(cache.allocate(blocks_for(64)), 64, starts[1] + 5, [2])]
        common = CachedPrefix([0] * COMMON, blocks=cache.allocate(blocks_for(COMMON), shared=True))
        before = numbers[:, common.blocks].transpose(1, 2).flatten(2, 3)[:, :, :COMMON]
        common.keys[0], common.values[0] = before
        if kind is CompiledDecode:
            fill(cache, *numbers)
        else:
            cache.keys[0][:], cache.values[0][:] = numbers[0].transpose(2, 3), numbers[1]
        step = kind(cache, own, shared, common, members, *(["cpu"] if kind is Decode else []))
        of = torch.float32 if kind is Decode else given_in
        given.append(step.attend(0, asked.to(of), *fresh.to(of), size**-0.5, window))
        assert given[-1].dtype == of
        kept.append(
            torch.stack([cache.keys[0].transpose(2, 3), cache.values[0]]) if kind is Decode else contents(cache)
        )
        assert step.positions.tolist() == [starts[0] + 104, starts[0] + 40, starts[1] + 68]
    assert torch.equal(*kept)  # the new tokens are stored
    return given[0], given[1].float()


@pytest.mark.parametrize("members", [[], [0, 1, 2], [0, 1], [2]], ids=str)
@pytest.mark.parametrize("window", [None, 3, 33, 100])
@pytest.mark.parametrize(
    ("size", "dtype", "given_in"),
    [
        (16, torch.float32, torch.float32),
        (64, torch.bfloat16, torch.float32),
        (64, torch.bfloat16, torch.bfloat16),
        (80, torch.float16, torch.float32),
        *(slow(size, torch.float32, torch.float32) for size in (64, 80)),
        *(slow(size, torch.bfloat16, given) for size in (16, 80) for given in (torch.float32, torch.bfloat16)),
        *(slow(size, torch.float16, torch.float32) for size in (16, 64)),
    ],
    ids=str,
)
def test_rows_get_what_the_step_of_torch_gives_them(size, members, window, dtype, given_in):
    expected, given = both(size, dtype, window, members, given_in)
    torch.testing.assert_close(given, expected, **CLOSE.get(dtype, {}))


@pytest.mark.parametrize("window", [None, 3, 33, 100])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (16, torch.float32),
        (64, torch.bfloat16),
        (16, torch.float16),
        slow(64, torch.float32),
        slow(16, torch.bfloat16),
        slow(64, torch.float16),
    ],
    ids=str,
)
def test_texts_get_what_the_reading_of_torch_gives_them(size, window, dtype):
    """Behind a common text: one alone, and others that go on from it, in its pass or a later one, and from these."""
    draw = torch.Generator().manual_seed(0)
    cache = {Prefill: None, CompiledPrefill: PagedKVCache(LAYER[size], 30, dtype, "cpu")}
    lengths = (COMMON, 150, 129, COMMON + 1)
    given: dict[type, list[torch.Tensor]] = {Prefill: [], CompiledPrefill: []}
    numbers = [torch.randn(3, GROUPS * HEADS, sum(lengths), size, generator=draw).to(dtype).float() for _ in range(3)]
    for kind, of in given.items():
        common = CachedPrefix([0] * COMMON, kept=True)
        first = CachedPrefix([*common.tokens, *range(1, 81)], common, COMMON, kept=True, common=common)
        beside = CachedPrefix([*first.tokens[:100], 7, 7], first, 100, common=common)
        second = CachedPrefix([*first.tokens[:120], *range(9)], first, 120, common=common)
        behind = CachedPrefix([*second.tokens[:125], 7, 7], second, 125, common=common)
        third = CachedPrefix([*common.tokens, 5], common, COMMON, common=common)
        passes = [common], [first, beside], [second, behind, third]
        for texts, (asked, keys, values) in zip(passes, numbers, strict=True):
            fresh = sum(len(text.fresh) for text in texts)
            new = (asked[None, :, :fresh], keys[None, :HEADS, :fresh], values[None, :HEADS, :fresh])
            for text in texts if cache[kind] else ():
                text.allocate_blocks(cache[kind], join=True)
            run = kind(texts, cache[kind])
            of.append(run.attend(0, *new, size**-0.5, window))
    for expected, compiled in zip(*given.values(), strict=True):
        assert compiled.shape == expected.shape
        torch.testing.assert_close(compiled, expected, **CLOSE.get(dtype, {}))


@pytest.mark.parametrize("members", [slow([]), [0, 1, 2]], ids=str)
def test_a_processor_without_products_of_pairs_gives_the_same(monkeypatch, members):
    expected, given = both(64, torch.bfloat16, None, members)
    monkeypatch.setattr(llvm, "has_pairs", lambda: False)
    attending = attention_kernels.attending.__wrapped__
    monkeypatch.setattr(attention_kernels, "attending", attending)
    monkeypatch.setattr(attention_kernels, "jit", lambda shape: jit.numba.njit(error_model="numpy", fastmath=True))
    torch.testing.assert_close(both(64, torch.bfloat16, None, members)[1], given, rtol=1e-3, atol=1e-3)


def test_weights_are_exact_to_the_last_digits():
    """Of two keys, one of which has `score` more than the other."""
    for score in (0.01, 0.2, 0.34, 0.35, 0.5, 0.69, 0.7, 1.0, 3.3, 12.0):
        cache = PagedKVCache({0: (torch.Size((1, 16)), torch.Size((1, 16)))}, 1, torch.float32, "cpu")
        own = [Span(cache.allocate(1), 2, 0, [0])]
        cache.keys[0].zero_()
        cache.keys[0][0, 0, 0, 0] = score
        query = torch.zeros(1, 1, 1, 16)
        query[..., 0] = 1.0
        step = CompiledDecode(cache, own, [], None, [])
        given = step.attend(0, query, torch.zeros_like(query), torch.ones_like(query), 1.0, None)
        assert given[0, 0, 0, 0].item() == pytest.approx(1 / (1 + np.exp(np.float64(np.float32(score)))), rel=1e-6)


def test_large_scores_are_weighed_without_overflow():
    cache = PagedKVCache({0: (torch.Size((1, 16)), torch.Size((1, 16)))}, 2, torch.float32, "cpu")
    own = [Span(cache.allocate(2), BLOCK_SIZE + 8, 0, [0])]
    cache.keys[0].fill_(1.0)
    cache.values[0].fill_(2.0)
    cache.values[0][1] = 4.0
    cache.keys[0][1, :, :, 3] = 2.0  # the only key that counts, in the last block
    query, new = torch.full((1, 1, 1, 16), 1e4), torch.ones(1, 1, 1, 16)
    step = CompiledDecode(cache, own, [], None, [])
    assert torch.equal(step.attend(0, query, new, new, 1.0, None), torch.full((1, 1, 1, 16), 4.0))


def test_what_compiled_code_cannot_read_is_left_to_torch():
    def layers(key: int, value: int) -> dict:
        return {0: (torch.Size((2, key)), torch.Size((2, value)))}

    assert paged_attention.fits(layers(64, 64), torch.float32, "cpu")
    assert paged_attention.fits(layers(64, 64), torch.bfloat16, "cpu")
    assert paged_attention.fits(layers(64, 64), torch.float16, "cpu")
    assert not paged_attention.fits(layers(64, 64), torch.float64, "cpu")
    assert not paged_attention.fits(layers(64, 64), torch.float32, "cuda:0")
    assert not paged_attention.fits(layers(64, 32), torch.float32, "cpu")
    assert not paged_attention.fits(layers(24, 24), torch.float32, "cpu")


def stored(store) -> float:
    """Return the sum of what is in a block behind a store of sixteen ones."""
    both = np.zeros(2 * BLOCK_SIZE * 16, np.float32)
    store(both, *np.ones((2, 1, 16), np.float32), np.array([0]), np.array([3]))
    keys, values = both.reshape(2, -1)
    assert (keys == values.reshape(BLOCK_SIZE, 16).T.ravel()).all()
    return keys.sum()


def test_code_is_compiled_where_no_folder_can_keep_it(monkeypatch):
    def nowhere(function):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(jit, "_Kept", nowhere)
    assert stored(attention_kernels.storing.__wrapped__(1, 16, False)) == 16


def test_code_is_compiled_where_the_folder_is_full(monkeypatch):
    def full(*given):
        tried.append(1)
        raise OSError(28, "No space left on device")

    tried = []
    monkeypatch.setattr(FunctionCache, "load_overload", lambda *given: None)
    monkeypatch.setattr(FunctionCache, "save_overload", full)
    assert stored(attention_kernels.storing.__wrapped__(1, 16, False)) == 16
    assert tried


COMPILE = """
import numpy as np
from srlm_cli.forward.cpu import sampling, decoder_layer, attention_kernels, gemm

ones, first = np.ones((1, 32), np.float32), np.zeros(1, np.int64)
attention_kernels.storing(1, 32, False)(np.zeros(128 * 32, np.float32), ones, ones, first, first)
seen = np.array([[0, 1, 0, 1, 1, 0]]), first, first, first, first
attending = attention_kernels.attending(1, 1, 32, False)
attending(ones, np.float32(1), ones[0].repeat(128), ones, ones, first, *seen, ones.copy())
code = gemm.compiled(gemm.BFLOAT16)
for pack, other in ((code.pack, ones), (code.pack_normed, ones[0]), (code.pack_silu, ones), (code.pack_gelu, ones)):
    pack(ones, other, np.float32(1), np.zeros(16, np.int32), ones[0, :1].copy())
weights, outputs = np.zeros(32 * 64, np.int16), np.zeros((1, 64), np.float32)
code.multiply(np.zeros(16, np.int32), 32, weights, outputs, ones[0, :1], True, 0, 1)
decoder_layer.normalize(ones, ones[0], np.float32(1))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing_again(tmp_path):
    def kept() -> set[str]:
        subprocess.run(
            [sys.executable, "-c", COMPILE], env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}, check=True
        )
        return {file.name for file in tmp_path.rglob("*.nbc")}

    first = kept()
    assert len(first) == 8
    assert kept() == first
