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
import threading
import time
from collections.abc import Callable

import numba
import numpy as np
import torch
import transformers

from srlm_cli import models
from srlm_cli.engines.inprocess import float16
from srlm_cli.engines.inprocess.packed import PackedModel, lay_by_input
from srlm_cli.engines.inprocess.pages import PAGE, Pages, Span

SHARE = 4
BATCHES = (1, 16, 64, 128)
DEEP, TIMES = 64, 200_000


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


@numba.njit(nogil=True, boundscheck=False)
def small_products(packed, weights, outputs, scales):
    """Multiply the same few rows with the same few weights, again and again."""
    rows, width = len(scales), float16.PANEL
    for _ in range(TIMES):
        float16._add_tile(rows, width, packed, 0, weights, 0, 0, DEEP, outputs, 0, width, scales, 0, False)


def float16_rate() -> float:
    """Return the products a second (FLOP/s) in float16 of all threads at once."""
    rows, width = float16.HEIGHTS[0], float16.PANEL
    given = [
        (np.zeros(rows * DEEP, np.int32), torch.zeros(width * DEEP, dtype=torch.int16).numpy(),
         torch.zeros(rows * width).numpy(), np.ones(rows, np.float32))
        for _ in range(torch.get_num_threads())
    ]  # fmt: skip
    small_products(*given[0])
    best = 0.0
    for _ in range(5):
        threads = [threading.Thread(target=small_products, args=one) for one in given]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, 2 * rows * width * DEEP * TIMES * len(threads) / (time.perf_counter() - started))
    return best


def packed_step(model: PackedModel, rows: int, prompt: int, written: int) -> Callable[[], object]:
    """Return a call that makes one packed step, the last of `written` tokens a row."""
    groups = [list(range(at, min(at + SHARE, rows))) for at in range(0, rows, SHARE)]
    per_prompt, per_row = -(-prompt // PAGE), -(-written // PAGE)
    pages = Pages(model.layers, len(groups) * per_prompt + rows * per_row, model.stored, model.device)
    shared = [Span(pages.take(per_prompt, shared=True), prompt, 0, seen_by) for seen_by in groups]
    own = [Span(pages.take(per_row), written, prompt, [row]) for row in range(rows)]
    for store in (*pages.keys.values(), *pages.values.values()):
        store.normal_()
    return lambda: model.step([7] * rows, pages, own, shared, None, [])


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
    parser.add_argument("--dtype", default="float32", help="float16 is srlm's own; the bare step is float32 then")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--written", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    models.quiet_libraries()
    half = asked.dtype == "float16"
    dtype = "float32" if half else asked.dtype
    net = models.load_model(asked.model, dtype).eval()
    model = PackedModel(models.load_model(asked.model, dtype).eval(), "cpu")
    float16.use_in(model.net) if half else lay_by_input(model.net)
    with torch.inference_mode():
        if not model.fits():
            raise SystemExit(f"{asked.model} does not run packed")
        rate, bandwidth = machine(net.dtype)
        rate = float16_rate() if half else rate
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
