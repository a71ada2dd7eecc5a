"""How long one decoding step takes, against what the machine allows and against a bare step of transformers.

    python benchmarks/step.py [--model MODEL] [--prompt TOKENS] [--written TOKENS] [--rounds N]

A step writes one token a row. Four rows share a prompt, and every row has written as many tokens. The
bound is the larger of two times, both measured in this run: all weights read once from memory, and all
products at the rate of a large matrix product. Keys and values are not in the bound; the time to read
them once is shown beside it. The bare step is the model's own forward pass with a `DynamicCache`, which
copies all keys and values and holds the prompt once a row; the draw of the tokens is in neither.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import transformers

from srlm_cli.forward.cpu import linear
from srlm_cli.forward.cpu.gemm import Kind, compiled
from srlm_cli.forward.kv_cache import BLOCK_SIZE, PagedKVCache, Span
from srlm_cli.forward.packed import PackedModel, lay_by_input
from srlm_cli.models.load import load_model, quiet_libraries

SHARE = 4
BATCHES = (1, 16, 64, 128)
ROWS, DEEP, WIDE, TIMES = 132, 256, 1024, 1000


def seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def machine(dtype: torch.dtype) -> tuple[float, float]:
    """Return the products a second (FLOP/s) of a large matrix product, and the bytes a second of a long read."""
    square = torch.randn(2048, 2048).to(dtype)
    long = torch.ones(1 << 27)
    rate = max(2 * 2048**3 / seconds(lambda: square @ square) for _ in range(5))
    return rate, max(long.nbytes / seconds(long.sum) for _ in range(5))


def own_rate(half: torch.dtype) -> float:
    """Return the products a second (FLOP/s) of all threads at once by srlm's own code, on what is in the cache."""
    kind = Kind.of(half)
    threads = torch.get_num_threads()
    given = [
        (np.zeros(ROWS * DEEP // kind.together, np.int32), DEEP, torch.zeros(WIDE * DEEP, dtype=torch.int16).numpy(),
         torch.zeros(ROWS, WIDE).numpy(), np.ones(ROWS, np.float32), True, 0, WIDE // kind.panel)
        for _ in range(threads)
    ]  # fmt: skip

    def work(which: int) -> None:
        for _ in range(TIMES):
            compiled(kind).multiply(*given[which])

    work(0)
    with ThreadPoolExecutor(threads) as pool:
        took = min(seconds(lambda: list(pool.map(work, range(threads)))) for _ in range(5))
    return 2 * ROWS * WIDE * DEEP * TIMES * threads / took


def packed_step(model: PackedModel, rows: int, prompt: int, written: int) -> Callable[[], object]:
    """Return a call that makes one packed step, the last of `written` tokens a row."""
    groups = [list(range(at, min(at + SHARE, rows))) for at in range(0, rows, SHARE)]
    per_prompt, per_row = -(-prompt // BLOCK_SIZE), -(-written // BLOCK_SIZE)
    cache = PagedKVCache(model.layers, len(groups) * per_prompt + rows * per_row, model.stored, model.device)
    shared = [Span(cache.allocate(per_prompt, shared=True), prompt, 0, seen_by) for seen_by in groups]
    own = [Span(cache.allocate(per_row), written, prompt, [row]) for row in range(rows)]
    for store in (*cache.keys.values(), *cache.values.values()):
        store.normal_()
    return lambda: model.step([7] * rows, cache, own, shared, None, [])


def bare_step(net, rows: int, context: int) -> Callable[[], object]:
    """Return a call that makes one step of the model's own, behind `context` - 1 tokens a row."""
    config = net.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = transformers.DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, rows, config.num_key_value_heads, context - 1, size, dtype=net.dtype), layer)
    ids = torch.full((rows, 1), 7)

    def step() -> None:
        net(ids, past_key_values=cache, logits_to_keep=1)
        cache.crop(-1)

    return step


def main() -> None:
    """Time both steps in turn at every batch size, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32", help="the bare step has it by torch")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--written", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    quiet_libraries()
    half = linear.type_for(asked.dtype, "cpu")
    net = load_model(asked.model, "float32" if asked.dtype == "float16" else asked.dtype).eval()
    model = PackedModel(load_model(asked.model, "float32" if half else asked.dtype).eval(), "cpu")
    linear.use_in(model.net, half) if half else lay_by_input(model.net)
    with torch.inference_mode():
        if not model.fits():
            raise SystemExit(f"{asked.model} does not run packed")
        rate, bandwidth = machine(net.dtype)
        rate = own_rate(half) if half else rate
        weights = sum(weight.numel() for weight in net.parameters())  # a tied embedding is one, and used as the head
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
        print(f"{asked.model}, {asked.dtype}: {weights / 1e6:.0f}M weights, {model.token_bytes() / 1e3:.0f} kB a token")
        print(f"{asked.prompt} prompt tokens, shared by {SHARE} rows, and {asked.written} written ones a row")
        print(f"matrix product {rate / 1e9:.0f} GFLOP/s, reading {bandwidth / 1e9:.1f} GB/s; times in ms, medians")
        print("  rows  bound  keys and values  packed  of the bound     bare  bare/packed (spread)")
        for rows in BATCHES:
            ours = packed_step(model, rows, asked.prompt, asked.written)
            theirs = bare_step(net, rows, asked.prompt + asked.written)
            ours(), theirs()
            pairs = [(seconds(ours), seconds(theirs)) for _ in range(asked.rounds)]
            ratios = sorted(bare / packed for packed, bare in pairs)
            packed, bare = (statistics.median(times) for times in zip(*pairs, strict=True))
            bound = max(weights * model.stored.itemsize / bandwidth, 2 * weights * rows / rate)
            tokens = rows * asked.written + -(-rows // SHARE) * asked.prompt
            reading = tokens * model.token_bytes() / bandwidth
            print(
                f"{rows:6} {bound * 1e3:6.0f} {reading * 1e3:16.0f} {packed * 1e3:7.0f} {packed / bound:13.2f} "
                f"{bare * 1e3:8.0f}  {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )


if __name__ == "__main__":
    main()
