"""The in-process engine on tiny random models: exact against `generate`, whatever is packed, shared or moved."""

from __future__ import annotations

import gc
import math
import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny_models
from helpers import slow
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling, end_of
from srlm_cli.engines.hf import choices, scheduler, workers
from srlm_cli.engines.hf.engine import BATCHES_A_WINDOW
from srlm_cli.engines.hf.fallback import FallbackModel
from srlm_cli.errors import EngineError
from srlm_cli.forward import kv_cache, memory
from srlm_cli.forward.attention import NAME, attention_context
from srlm_cli.forward.kv_cache import OutOfBlocks, PagedKVCache, Span
from srlm_cli.forward.packed import PackedModel
from srlm_cli.forward.prefix import CachedPrefix, find_prefixes

GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=40)
# Prompts of very unlike lengths, some of which begin alike, some twice.
PROMPTS = [
    "a",
    "tell me " * 20 + "more",
    "tell me " * 20 + "less",
    "?" * 90,
    "b b b",
    "tell me " * 9,
    "a",
    "",
    "z" * 33,
]
RUBRIC = "Judge this by these rules, one point for each of them that holds. " * 2


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Open a tiny model of a kind, once a module."""
    made = {}

    def open_one(kind: str = "llama", batch_size: int = 6):
        if kind not in made:
            made[kind] = open_engine(
                EngineSpec(model=str(tiny_models.save(tmp_path_factory.mktemp(kind), kind)), dtype="float32")
            )
        made[kind].batch_size = batch_size
        return made[kind]

    return open_one


def ask(text: str, sampling: Sampling = GREEDY, seeds: tuple[int, ...] = (0,), **more) -> Request:
    return Request([{"role": "user", "content": text}], sampling, seeds, **more)


def by_generate(engine, request: Request) -> list[int]:
    """Return what `generate` itself writes, one prompt at a time, without padding."""
    return generated(engine, tuple(engine._tokens(engine.template.turn(request))), request.sampling.max_new_tokens)


@cache
def generated(engine, prompt: tuple[int, ...], length: int) -> list[int]:
    """Return the greedy tokens of `generate`, which many tests compare with."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        whole = engine.net.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
            eos_token_id=sorted(engine.stops.ids), pad_token_id=engine.tokenizer.pad_token_id,
        )  # fmt: skip
    return whole[0, ids.shape[1] :].tolist()


def expect_generate(engine, requests: list[Request]) -> None:
    completions = list(engine.generate(iter(requests)))
    assert len(completions) == len(requests)
    for request, completion in zip(requests, completions, strict=True):
        tokens = by_generate(engine, request)
        text, reason, _, count = engine.stops.finished(tokens, request.sampling)
        assert completion.texts == [text] * len(request.seeds)
        assert completion.finish_reasons == [reason] * len(request.seeds)
        assert completion.tokens_out == count * len(request.seeds)
        assert completion.tokens_in == len(engine._tokens(engine.template.turn(request)))


# --- the same as generate --------------------------------------------------------------------


# What is read in another way each: plain, with windows, without rotary positions; packed or as transformers does it.
FEW = ("llama", "gemma3", "gpt2", "mamba", "lfm2")


@pytest.mark.parametrize(
    "kind", [kind if kind in FEW else slow(kind) for kind in tiny_models.PACKED + tiny_models.PLAIN]
)
def test_greedy_is_generate_token_for_token(opened, kind):
    engine = opened(kind)
    assert isinstance(engine.reader, PackedModel if kind in tiny_models.PACKED else FallbackModel)
    expect_generate(
        engine,
        [
            ask(text, Sampling(0.0, 1.0, 8 + 9 * (at % 5)), (0, 1, 2)[: 1 + at % 3], prefix="So" * (at % 2))
            for at, text in enumerate(PROMPTS)
        ],
    )


@pytest.mark.parametrize(
    ("kind", "batch_size"),
    [
        *(("llama", size) for size in (1, 7, 64)),
        ("gemma3", 7),
        slow("llama", 2),
        *(slow("gemma3", size) for size in (1, 2, 64)),
    ],
)
def test_greedy_is_generate_at_any_batch_size(opened, kind, batch_size):
    expect_generate(opened(kind, batch_size), [ask(text, seeds=(0, 1)) for text in PROMPTS])


@pytest.mark.parametrize("kind", ["llama", "gemma3", slow("mistral"), slow("gpt2")])
def test_a_rubric_that_prompts_share_is_read_once_and_shared(opened, kind, monkeypatch):
    """Also by prompts that come later, and beside prompts that do not begin with it."""
    engine = opened(kind)
    read = []
    reading = PackedModel.read
    monkeypatch.setattr(PackedModel, "read", lambda *a: read.extend(len(t.fresh) for t in a[1]) or reading(*a))
    requests = [ask(RUBRIC + text, seeds=(0, 1, 2)) for text in PROMPTS] + [ask("none"), ask(RUBRIC + "late")]
    expect_generate(engine, requests)
    whole = [len(engine._tokens(engine.template.turn(request))) for request in requests]
    assert sum(read) < sum(whole) - 8 * len(RUBRIC)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_prompt_goes_on_from_the_one_before_it_when_that_has_been_answered(opened, kind, monkeypatch):
    engine, read = opened(kind, batch_size=1), []
    reading = PackedModel.read
    monkeypatch.setattr(PackedModel, "read", lambda *a: read.extend(len(t.fresh) for t in a[1]) or reading(*a))
    requests = [ask(RUBRIC + text, Sampling(0.0, 1.0, 5)) for text in "abc"]
    expect_generate(engine, requests)
    assert read[0] > len(RUBRIC) > 5 * max(read[1:])


def test_greedy_is_generate_with_a_merged_adapter(opened, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny_models.save(tmp_path / "base")
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    net.save_pretrained(tmp_path / "adapter")
    opened().tokenizer.save_pretrained(tmp_path / "adapter")
    engine = open_engine(EngineSpec(model=str(tmp_path / "adapter"), dtype="float32", batch_size=4))
    assert isinstance(engine.reader, PackedModel)
    requests = [ask(text, seeds=(0, 1)) for text in PROMPTS]
    expect_generate(engine, requests)
    plain = [completion.texts for completion in opened().generate(requests)]
    assert plain != [completion.texts for completion in engine.generate(requests)]


def test_moving_blocks_together_changes_nothing(opened, monkeypatch):
    """With holes filled at once; rows of very unlike lengths leave many."""
    moved = []
    compact = PagedKVCache.compact
    monkeypatch.setattr(PagedKVCache, "compact", lambda self: moved.append(compact(self)) or moved[-1])
    expect_generate(
        opened(batch_size=8),
        [ask(text, Sampling(0.0, 1.0, (3, 90, 5, 120)[at % 4])) for at, text in enumerate(PROMPTS * 2)],
    )
    assert any(moved)


def test_a_configuration_within_a_configuration_is_put_back(opened):
    """To set what a configuration names sets it in those within it, too."""
    from transformers import AutoConfig

    whole = AutoConfig.for_model("gemma3")
    configs = [whole, whole.text_config]
    for config in configs:
        config._attn_implementation = "sdpa"
    with attention_context(None, configs), attention_context(None, configs):
        assert [config._attn_implementation for config in configs] == [NAME, NAME]
    assert [config._attn_implementation for config in configs] == ["sdpa", "sdpa"]


# --- memory ----------------------------------------------------------------------------------


def test_few_blocks_hold_rows_back_and_change_nothing(opened, monkeypatch):
    engine = opened(batch_size=8)
    monkeypatch.setattr(memory, "for_cache", lambda device: engine.reader.token_bytes() * kv_cache.BLOCK_SIZE * 16)
    taken_back = []
    keep = scheduler.Scheduler._keep
    monkeypatch.setattr(scheduler.Scheduler, "_keep", lambda *a: taken_back.append(a[1]) or keep(*a))
    expect_generate(engine, [ask(text, Sampling(0.0, 1.0, 100), (0, 1)) for text in PROMPTS])
    assert taken_back


def test_a_prompt_that_fits_into_no_memory_is_an_error(opened, monkeypatch):
    engine = opened()
    monkeypatch.setattr(memory, "for_cache", lambda device: engine.reader.token_bytes() * kv_cache.BLOCK_SIZE * 2)
    with pytest.raises(EngineError, match="does not fit in memory"):
        list(engine.generate([ask("word " * 60)]))


@pytest.mark.parametrize(("kind", "most"), [("llama", 4), ("mamba", 2)])
def test_out_of_memory_halves_the_rows_until_it_works(opened, monkeypatch, kind, most):
    engine = opened(kind, batch_size=16)
    requests = [ask(text, Sampling(0.0, 1.0, 12), (0, 1)) for text in PROMPTS]
    wanted = [completion.texts for completion in engine.generate(requests)]
    sizes = []

    packed = kind == "llama"
    real = engine.net.forward if packed else engine.net.generate

    def small(*args, **kwargs):
        decoding = not packed or isinstance(kwargs["logits_to_keep"], int)
        rows = kwargs["input_ids"].shape[1 if packed else 0]
        sizes.append(rows if decoding else 0)
        if sizes[-1] > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(engine.net, "forward" if packed else "generate", small)
    assert [completion.texts for completion in engine.generate(requests)] == wanted
    assert max(sizes) > most


def test_what_prompts_begin_with_is_found_where_its_blocks_are_moved(opened, monkeypatch):
    engine, step, moves = opened(batch_size=8), scheduler.Scheduler._step, []
    requests = [ask(RUBRIC + text, Sampling(0.0, 1.0, 12), (0,)) for text in PROMPTS]
    wanted = [completion.texts for completion in engine.generate(requests)]

    def moving(writer):
        old, store = writer.common.blocks, writer.cache
        new = store.allocate(len(old), shared=True)
        for part in (*store.keys.values(), *store.values.values()):
            part[new] = part[old]
            part[old] = 9.0
        store.free(old, shared=True)
        writer._move(dict(zip(old, new, strict=True)))
        moves.append(len(old))
        step(writer)

    monkeypatch.setattr(scheduler.Scheduler, "_step", moving)
    assert [completion.texts for completion in engine.generate(requests)] == wanted
    assert len(moves) > 5 and min(moves) > 0


def test_out_of_memory_where_prompts_begin_alike_keeps_no_blocks(opened, monkeypatch):
    engine, stores, tries = opened(batch_size=8), [], []
    open_cache, read = scheduler.Scheduler._open_cache, PackedModel.read
    monkeypatch.setattr(
        scheduler.Scheduler, "_open_cache", lambda writer: (open_cache(writer), stores.append(writer.cache))
    )

    def short(self, texts, into=None):
        tries.append(stores[-1].num_free if stores else 0)
        if len(tries) < 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return read(self, texts, into)

    monkeypatch.setattr(PackedModel, "read", short)
    requests = [ask(RUBRIC + text, Sampling(0.0, 1.0, 5), (0, 1)) for text in PROMPTS[:4]]
    assert len(list(engine.generate(requests))) == 4
    assert tries[0] == tries[1] == tries[2] < stores[0].count


def test_out_of_memory_with_one_row_is_told(opened, monkeypatch):
    def never(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = opened()
    monkeypatch.setattr(engine.net, "forward", never)
    for request in (ask("a", seeds=(0, 1)), ask("a", choices=("1", "2"))):
        with pytest.raises(EngineError, match="out of memory"):
            list(engine.generate([request]))


@pytest.mark.parametrize("at", [slow(0), 1, slow(3)])
def test_completions_go_on_when_a_draw_ran_out_of_memory(opened, monkeypatch, at):
    engine = opened(batch_size=4)
    requests = [ask(text, replace(GREEDY, temperature=1.0), seeds=(at, 7)) for text in PROMPTS]
    wanted = [done.texts for done in engine.generate(requests)]
    calls = []

    def once(*args):
        calls.append(1)
        if len(calls) == at + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(*args)

    draw = scheduler.draw
    monkeypatch.setattr(scheduler, "draw", once)
    assert [done.texts for done in engine.generate(requests)] == wanted


def test_another_error_is_not_taken_for_a_lack_of_memory(opened, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    engine = opened()
    monkeypatch.setattr(engine.net, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        list(engine.generate([ask("a")]))


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # the latter is taken for a GPU
def test_blocks_are_taken_from_both_ends_and_filled_up(device):
    store = PagedKVCache({0: (torch.Size((1, 2)), torch.Size((1, 2)))}, 8, torch.float32, device)
    assert store.allocate(3) == [0, 1, 2] and sorted(store.allocate(2, shared=True)) == [6, 7]
    with pytest.raises(OutOfBlocks):
        store.allocate(4)
    store.keys[0][2] = 5.0
    store.keys[0][6] = 7.0
    store.free([0])
    store.free([7], shared=True)
    assert store.compact() == {2: 0, 6: 7}
    assert (store.low, store.high) == (2, 7)
    assert (store.keys[0][0] == 5).all() and (store.keys[0][7] == 7).all()
    assert store.allocate(4) == [2, 3, 4, 5] and not store.keys[0][2:6].any()
    assert store.keys[0].isfinite().all() and store.values[0].isfinite().all()  # a masked key must not be NaN
    store.keys[0].fill_(9.0)
    store.free([2, 3, 4, 5])
    assert store.compact() == {} and store.low == 2
    assert store.allocate(4, shared=True) == [3, 4, 5, 6] and not store.keys[0][3:7].any()  # they were others' before


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # the latter is taken for a GPU
def test_a_page_is_free_when_all_that_hold_it_gave_it_back(device):
    store = PagedKVCache({0: (torch.Size((1, 2)), torch.Size((1, 2)))}, 8, torch.float32, device)
    first = store.allocate(4, shared=True)
    second, third = store.incref(first[1:3]), store.incref(first[2:3])
    store.keys[0][second[0]], store.keys[0][third[0]] = 5.0, 7.0
    store.free(first, shared=True)
    assert store.num_free == 8 - 4 and sorted(store.ref_counts) == third
    moved = store.compact()
    assert store.num_free == 8 - 2
    second, third = ([moved.get(block, block) for block in of] for of in (second, third))
    assert (store.keys[0][second[0]] == 5).all() and (store.keys[0][third[0]] == 7).all()
    store.free(third, shared=True)
    assert store.num_free == 8 - 2 and not store.ref_counts
    store.free(second, shared=True)
    store.compact()
    assert store.num_free == 8


@pytest.mark.parametrize(
    ("kind", "few_blocks"), [("llama", True), ("mistral", False), slow("llama", False), slow("mistral", True)]
)
def test_prompts_that_begin_alike_have_blocks_in_common(opened, monkeypatch, kind, few_blocks):
    """Replies to one prompt: some share a block more, one is another's beginning, and one comes when it is gone."""
    engine, used = opened(kind, batch_size=8), []
    monkeypatch.setattr(workers, "count", lambda rows, device: 1)
    if few_blocks:
        monkeypatch.setattr(memory, "for_cache", lambda device: engine.reader.token_bytes() * kv_cache.BLOCK_SIZE * 24)
    step = scheduler.Scheduler._step
    monkeypatch.setattr(
        scheduler.Scheduler,
        "_step",
        lambda writer: (used.append(writer.cache.count - writer.cache.num_free), step(writer)),
    )
    texts = [RUBRIC + str(family) * 70 + tail for family in range(3) for tail in ("a" * 80 + "b", "a" * 80, "c", "a")]
    texts += [RUBRIC + "0" * 70 + "d"]
    samplings = [Sampling(1.0, 0.95, most) for most in (6, 90, 30, 60, 12)]
    requests = [ask(text, samplings[at % 5], seeds=(at, at + 50)) for at, text in enumerate(texts)]
    together, blocks_together = [done.texts for done in engine.generate(requests)], sum(used)
    used.clear()
    monkeypatch.setattr(scheduler.Scheduler, "_known", lambda writer: [writer.common] if writer.common else [])
    monkeypatch.setattr(
        scheduler, "find_prefixes", lambda texts, known: [find_prefixes([text], known) for text in texts]
    )
    assert [done.texts for done in engine.generate(requests)] == together
    assert few_blocks or blocks_together < sum(used)  # with few of them rows are taken back, at other steps


def test_rows_see_the_blocks_of_several_texts_once_and_each_what_is_behind():
    store = PagedKVCache({0: (torch.Size((1, 2)), torch.Size((1, 2)))}, 20, torch.float32, "cpu")
    common = CachedPrefix([0] * 70)
    first = CachedPrefix([0] * (70 + 3 * kv_cache.BLOCK_SIZE + 5), common=common)
    second = CachedPrefix([0] * (70 + 2 * kv_cache.BLOCK_SIZE + 9), first, 70 + 2 * kv_cache.BLOCK_SIZE, common=common)
    other = CachedPrefix([0] * 40)
    for text in (first, second, other):
        text.allocate_blocks(store, join=True)
    store.incref(other.blocks)  # as the text that was read last
    writer = SimpleNamespace(cache=store)
    spans = scheduler.Scheduler._spans(writer, {first: [0, 2], second: [1], other: [3]})
    assert second.blocks[:2] == first.blocks[:2]
    assert spans == [
        Span(first.blocks[:1], kv_cache.BLOCK_SIZE, 70, [0, 2, 1]),
        Span(first.blocks[1:2], kv_cache.BLOCK_SIZE, 70 + kv_cache.BLOCK_SIZE, [0, 2, 1]),
        Span(first.blocks[2:], kv_cache.BLOCK_SIZE + 5, 70 + 2 * kv_cache.BLOCK_SIZE, [0, 2]),
        Span(second.blocks[2:], 9, 70 + 2 * kv_cache.BLOCK_SIZE, [1]),
        Span(other.blocks, 40, 0, [3]),
    ]


def test_the_store_goes_when_its_requests_are_answered(opened, monkeypatch):
    """A server's next job, or the next pair of files, must find its memory free without waiting for a collector."""
    engine = opened("llama")
    monkeypatch.setattr(workers, "count", lambda rows, device: 1)
    made = []

    def remembered(*args):
        made.append(weakref.ref(cache := PagedKVCache(*args)))
        return cache

    monkeypatch.setattr(scheduler, "PagedKVCache", remembered)
    gc.collect()
    gc.disable()
    try:
        list(engine.generate([ask(text, seeds=(0, 1)) for text in PROMPTS]))
    finally:
        gc.enable()
    assert len(made) == 1 and made[0]() is None


# --- seeds and order -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", slow("gemma3"), slow("mamba")])
def test_a_seed_gives_its_row_whatever_stands_beside_it(opened, kind):
    engine = opened(kind)
    sampling = Sampling(0.9, 0.95, 24)
    together = list(engine.generate([ask(text, sampling, (5, 6, 7)) for text in PROMPTS]))
    for text, completion in zip(PROMPTS, together, strict=True):
        alone = [next(engine.generate([ask(text, sampling, (seed,))])).texts[0] for seed in (5, 6, 7)]
        assert completion.texts == alone
    assert len({text for completion in together for text in completion.texts}) > 16 or kind != "llama"


def test_completions_that_are_alike_so_far_are_computed_once(opened, monkeypatch):
    engine, rows, step = opened(batch_size=8), [], PackedModel.step
    monkeypatch.setattr(PackedModel, "step", lambda *of: (rows.append(len(of[1])), step(*of))[1])
    once, twice = (next(engine.generate([ask("a", Sampling(0.9, 0.95, 24), (seed,))])).texts[0] for seed in (5, 6))
    assert once != twice
    rows.clear()
    (done,) = engine.generate([ask("a", Sampling(0.9, 0.95, 24), (5, 5, 6, 5))])
    assert done.texts == [once, once, twice, once] and done.tokens_out == 4 * 24
    assert len(rows) == 23 and set(rows) == {2}
    rows.clear()
    (greedy,) = engine.generate([ask("a", replace(GREEDY, max_new_tokens=24), (5, 6, 7))])
    assert len(set(greedy.texts)) == 1 and set(rows) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_completions_part_where_they_draw_different_tokens(opened, monkeypatch, kind):
    engine, taken_back, numbers, keep = opened(kind, batch_size=12), [], scheduler.uniforms, scheduler.Scheduler._keep
    monkeypatch.setattr(
        scheduler, "uniforms", lambda seed, count: numbers(0, count)[: seed * 20] + numbers(seed, count)[seed * 20 :]
    )
    sampling, seeds = Sampling(2.0, 0.98, 100), (3, 1, 4, 2)  # the third parts from the first behind a whole block
    requests = [ask(text, sampling, seeds) for text in PROMPTS]
    alone = [[next(engine.generate([replace(one, seeds=(seed,))])).texts[0] for seed in seeds] for one in requests]
    monkeypatch.setattr(scheduler.Scheduler, "_keep", lambda *a: taken_back.append(a[1]) or keep(*a))
    assert [done.texts for done in engine.generate(requests)] == alone and not taken_back
    monkeypatch.setattr(memory, "for_cache", lambda device: engine.reader.token_bytes() * kv_cache.BLOCK_SIZE * 14)
    assert [done.texts for done in engine.generate(requests)] == alone and taken_back
    assert len({text for texts in alone for text in texts}) > 3 * len(PROMPTS)


def test_requests_of_every_kind_in_one_stream_keep_their_order(opened):
    engine = opened(batch_size=4)
    requests = [
        ask("a", Sampling(0.8, 0.9, 30), (1, 2, 3, 4, 5, 6, 7)),
        ask("b", GREEDY),
        ask("c", choices=("1", "2")),
        ask("word " * 200),
        ask("d", Sampling(1.2, 0.5, 3), (1,)),
        ask("e", Sampling(0.0, 1.0, 1), (1, 2)),
    ]
    alone = [next(engine.generate([request])) for request in requests]
    together = list(engine.generate(requests))
    assert [c.texts for c in together] == [c.texts for c in alone]
    assert [c.finish_reasons[0] for c in together][3] == "prompt-too-long"
    assert [len(c.texts) for c in together] == [7, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_a_long_completion_before_many_short_ones_loses_none_of_them(opened, kind, batch_size):
    """The short ones behind it are all done, and no more are read, when the long one ends: the next have to follow."""
    engine = opened(kind, batch_size)
    lengths = [30] + [1] * (3 * BATCHES_A_WINDOW * batch_size)
    asked = [ask(f"prompt {n}", replace(GREEDY, max_new_tokens=length)) for n, length in enumerate(lengths)]
    assert len(list(engine.generate(asked))) == len(asked)


def test_few_requests_are_read_ahead_of_the_oldest_one(opened):
    engine, taken = opened(batch_size=4), []

    def requests():
        for at in range(100):
            taken.append(at)
            yield ask(f"number {at}", Sampling(0.0, 1.0, 4))

    stream = engine.generate(requests())
    for number in range(10):
        next(stream)
        assert len(taken) <= number + 1 + 4 * 4
    stream.close()


def test_a_call_within_a_call_is_answered(opened):
    engine = opened(batch_size=4)
    outer = engine.generate([ask(text, seeds=(0, 1)) for text in PROMPTS])
    first = next(outer)
    assert next(engine.generate([ask(PROMPTS[1])])).texts[0] == list(outer)[0].texts[0]
    assert first.texts[0] == next(engine.generate([ask(PROMPTS[0])])).texts[0]


def test_completions_end_where_the_context_does(opened):
    engine = opened()
    room = engine.context - len(engine._tokens(engine.template.turn(ask(""))))
    fits, over = engine.generate([ask("x" * (room - 5)), ask("x" * room)])
    assert fits.finish_reasons == ["length"] and fits.tokens_out == 5
    assert over.finish_reasons == ["prompt-too-long"] and over.texts == [""]


# --- stops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_a_stop_text_over_several_tokens_ends_a_row(opened, kind):
    engine = opened(kind)
    whole = next(engine.generate([ask("a")])).texts[0]
    middle = re.search("[^\ufffd]{2}", whole).group()
    (completion,) = engine.generate([ask("a", Sampling(0.0, 1.0, 40, stop=("never there", middle)))])
    assert completion.texts[0] == whole[: whole.index(middle)]
    assert completion.finish_reasons == ["stop"] and completion.tokens_out < 40


def test_where_a_completion_is_cut_off():
    closing = Sampling(stop=("END",), last_line=r"(?i)score: \d")
    assert end_of("no score yet", closing) is None
    assert end_of("reasons\nScore: 4", closing) is None, "the line is not complete: 4 may become 45"
    assert end_of("reasons\nScore: 4\nmore\nScore: 2\n", closing) == len("reasons\nScore: 4")
    assert end_of("I say Score: 4\nthen", closing) is None
    assert end_of("a END b\nScore: 4\n", closing) == 2
    assert end_of("Score: 4\n END", closing) == 8
    assert end_of("a END", Sampling()) is None


def test_a_last_line_ends_a_row(opened, monkeypatch):
    engine = opened()
    whole = next(engine.generate([ask("a")])).texts[0]
    monkeypatch.setattr(engine.stops, "_piece", lambda token: "\n")
    sign = whole[20]
    spelled = whole.replace(sign, "\n")
    decode = engine.tokenizer.decode
    monkeypatch.setattr(type(engine.tokenizer), "decode", lambda self, *a, **k: decode(*a, **k).replace(sign, "\n"))
    (completion,) = engine.generate([ask("a", Sampling(0.0, 1.0, 40, last_line=".*"))])
    assert completion.texts == [spelled[: spelled.index("\n")]] and completion.finish_reasons == ["stop"]
    assert completion.tokens_out < 40


# --- choices ---------------------------------------------------------------------------------


def whole_probability(engine, request: Request, choice: str) -> float:
    """Return the probability of a text behind the prompt, from one plain pass over all."""
    before, whole = (
        engine._tokens(engine.template.turn(request)),
        engine._tokens(engine.template.turn(request) + choice),
    )
    with torch.inference_mode():
        steps = torch.log_softmax(engine.net(torch.tensor([whole])).logits[0].double(), -1)
    return math.exp(sum(float(steps[at - 1, whole[at]]) for at in range(len(before), len(whole))))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", slow("mamba")])
@pytest.mark.parametrize("texts", [("0", "1", "2"), ("yes", "no", "perhaps")])
def test_choices_have_their_whole_probability(opened, kind, texts):
    engine = opened(kind)
    requests = [ask(RUBRIC + text, GREEDY, prefix="Score: ", choices=texts) for text in PROMPTS]
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        whole = [whole_probability(engine, request, choice) for choice in texts]
        assert completion.probabilities == pytest.approx([p / sum(whole) for p in whole], abs=1e-5)
        assert completion.mass == pytest.approx(sum(whole), rel=1e-3)
        assert completion.texts == [texts[whole.index(max(whole))]]


def behind(text: str, prompt: str) -> Request:
    """Ask for a score behind what of a text is whole characters: bytes that are none would be other tokens."""
    return ask(prompt, GREEDY, (7,), prefix=text.split("\ufffd")[0] + "Score: ", choices=("0", "1", "2"))


@pytest.mark.parametrize(
    ("kind", "few_blocks"),
    [
        ("llama", True),
        ("gemma3", False),
        *(slow(kind, False) for kind in ("llama", "mistral", "gpt2")),
        *(slow(kind, True) for kind in ("mistral", "gpt2", "gemma3")),
    ],
)
def test_a_choice_behind_a_written_text_is_that_of_a_new_reading(opened, kind, few_blocks, monkeypatch):
    engine = opened(kind, batch_size=8)
    rubric, taken_back = "" if few_blocks else RUBRIC, []
    if few_blocks:
        monkeypatch.setattr(memory, "for_cache", lambda device: engine.reader.token_bytes() * kv_cache.BLOCK_SIZE * 12)
        keep = scheduler.Scheduler._keep
        monkeypatch.setattr(scheduler.Scheduler, "_keep", lambda *a: taken_back.append(a[1]) or keep(*a))
    lengths = [Sampling(1.0, 1.0, (3, 80, 200)[at % 3]) for at in range(len(PROMPTS))]
    requests = [
        ask(rubric + text, length, (0, 1, 2), follow_up=lambda _, made, thought, text=text: behind(made, rubric + text))
        for text, length in zip(PROMPTS, lengths, strict=True)
    ]
    plain = [completion.texts for completion in engine.generate(replace(asked, follow_up=None) for asked in requests)]
    told = list(engine.generate(requests))
    assert [completion.texts for completion in told] == plain
    answered = 0
    for text, completion in zip(PROMPTS, told, strict=True):
        for made, answer in zip(completion.texts, completion.follow_ups, strict=True):
            if answer:
                (expected,) = engine.generate([behind(made, rubric + text)])
                assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
                assert (answer.texts, answer.tokens_in) == (expected.texts, expected.tokens_in)
                answered += 1
    assert answered >= 3 * len(PROMPTS) - 2  # a token that is no text, such as padding, is lost in it
    assert bool(taken_back) == few_blocks


def test_what_cannot_be_answered_at_once_is_left_to_be_asked(opened):
    engine = opened(batch_size=8)
    about = {
        0: lambda made: None,
        1: lambda made: behind("x" * 40, PROMPTS[0]),  # another text
        2: lambda made: ask(PROMPTS[0], choices=("yes", "no")),  # choices of several tokens
        3: lambda made: behind(made, PROMPTS[1]),  # another prompt
        4: lambda made: ask(PROMPTS[0], prefix="x" * 600, choices=("0", "1")),  # longer than the context
        5: lambda made: behind(made, PROMPTS[0]),
    }
    (completion,) = engine.generate(
        [ask(PROMPTS[0], seeds=tuple(about), follow_up=lambda k, made, thought: about[k](made))]
    )
    assert [answer is not None for answer in completion.follow_ups] == [False] * 5 + [True]
    (plain,) = opened("mamba").generate([ask(PROMPTS[0], follow_up=lambda k, made, thought: behind(made, PROMPTS[0]))])
    assert plain.follow_ups == ()


def test_prompts_of_choices_share_their_beginning_from_one_reading_to_the_next(opened, monkeypatch):
    engine = opened()
    read = []
    reading = PackedModel.read
    monkeypatch.setattr(PackedModel, "read", lambda *a: read.extend(len(t.fresh) for t in a[1]) or reading(*a))
    monkeypatch.setattr(choices, "MAX_TOKENS", 400)
    requests = [ask(RUBRIC + text, GREEDY, choices=("0", "1")) for text in PROMPTS]
    together = [completion.probabilities for completion in engine.generate(requests)]
    whole = sum(len(engine._tokens(engine.template.turn(request))) for request in requests)
    assert len(read) == len(PROMPTS) and sum(read) < whole - (len(PROMPTS) - 1) * len(RUBRIC)
    for request, probabilities in zip(requests, together, strict=True):
        assert next(engine.generate([request])).probabilities == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.parametrize("most", [choices.KEPT_TOKENS, 400], ids=["kept", "no room for all"])
def test_what_a_later_request_continues_is_not_read_again(opened, monkeypatch, most):
    engine = opened()
    engine.scorer = choices.ChoiceScorer(engine.reader)
    read = []
    reading = PackedModel.read
    monkeypatch.setattr(PackedModel, "read", lambda *a: read.extend(len(t.fresh) for t in a[1]) or reading(*a))
    monkeypatch.setattr(choices, "KEPT_TOKENS", most)
    wanted = [
        [ask(text, GREEDY, prefix=prefix, choices=("0", "1")) for text in PROMPTS] for prefix in ("a: ", "a: 1, b: ")
    ]
    plain = [[one.probabilities for one in engine.generate(requests)] for requests in wanted]
    first, second = wanted
    told = [list(engine.generate([replace(one, continued=True) for one in first]))]
    held = sum(len(text.tokens) for text in engine.scorer.continued)
    read.clear()
    told.append(list(engine.generate(second)))
    for expected, found in zip(plain, told, strict=True):
        for probabilities, one in zip(expected, found, strict=True):
            assert one.probabilities == pytest.approx(probabilities, abs=1e-5)
    new = len("1, b: ") + 1
    if most > 400:
        assert max(read) <= new, "only what is new is read"
        assert len(engine.scorer.continued) < len(PROMPTS) / 2, "what was continued is let go"
    else:
        assert held <= most < sum(len(engine._tokens(engine.template.turn(one))) for one in first)
        assert 0 < sum(count <= new for count in read) < len(read)


def test_a_text_finds_the_longest_beginning_it_shares():
    known = CachedPrefix([1, 2, 3])
    texts = [CachedPrefix([1, 2, 9, 9]), CachedPrefix([1, 2, 9, 8]), CachedPrefix([1, 2, 9, 8]), CachedPrefix([7])]
    find_prefixes(texts, [known])
    assert [text.shared for text in texts] == [2, 3, 3, 0]
    assert [text.prefix for text in texts] == [known, texts[0], texts[0], None]


HUGE = """
import re, torch
from srlm_cli.engines.hf import engine
from srlm_cli.forward import memory

kept = torch.zeros(1 << 24), torch.from_numpy(memory.zeros(1 << 26))
maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read(), flags=re.MULTILINE)[1:]
for tensor in kept:
    middle = tensor.data_ptr() + tensor.nbytes // 2
    [flags] = [one for one in maps if int(one.split("-")[0], 16) <= middle < int(re.split("[- ]", one)[1], 16)]
    print("hg" in flags.split("VmFlags:")[1].split())
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here")
@pytest.mark.slow
@pytest.mark.parametrize("asked", [{}, {"THP_MEM_ALLOC_ENABLE": "0"}], ids=["by default", "against"])
def test_large_tensors_are_given_huge_pages(monkeypatch, asked):
    """Of torch's own making and of ours, in a process of their own: torch reads the variable when it starts."""
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    seen = subprocess.run([sys.executable, "-c", HUGE], env=os.environ | asked, capture_output=True, text=True)
    assert seen.stdout.split() == [str(not asked)] * 2, seen.stderr


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_penalties_and_filters_hold_in_every_scheduler(opened, kind):
    """Greedy text with a repetition penalty is that of `generate`; the one most probable token is greedy."""
    engine = opened(kind)
    request = ask("tell me more", replace(GREEDY, repetition_penalty=20.0))
    prompt = torch.tensor([engine._tokens(engine.template.turn(request))])
    with torch.inference_mode():
        wanted = engine.net.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, repetition_penalty=20.0,
            eos_token_id=sorted(engine.stops.ids), pad_token_id=0,
        )[0, prompt.shape[1] :].tolist()  # fmt: skip
    plain, penalized, filtered, scarce = engine.generate(
        [
            ask("tell me more"),
            request,
            ask("tell me more", replace(GREEDY, temperature=1.5, top_k=1)),
            ask("tell me more", replace(GREEDY, temperature=1.5, min_p=1.0)),
        ]
    )
    assert penalized.texts[0] == engine.stops.finished(wanted, GREEDY).text != plain.texts[0]
    assert filtered.texts == scarce.texts == plain.texts
