"""How many tokens a second a machine can write at most in the races of `engines/`, whatever program writes them.

    python benchmarks/bound.py sample --rows prompts.jsonl --each 4 --tokens-a-row 213
    python benchmarks/bound.py judge --rows responses.jsonl --each 3 --tokens-a-row 100

Counted are the products with all weights for each generated token, those of reading each prompt (without the part
that it shares with an earlier one, and without the head), and the keys and values of each row read once a token,
those of a prompt once for all its rows. The rates of products and of a long read are measured first: in float32
that of a large product by PyTorch, in float16 that of a small one by srlm's own code, whose numbers never leave
the cache.
`--tokens-a-row` is what the race printed.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "engines"))

import numba
import numpy as np
import torch
from race import hardware, tokens
from step import machine
from work import requests_of

from srlm_cli import models
from srlm_cli.engines.inprocess import float16
from srlm_cli.engines.inprocess.packed import PackedModel
from srlm_cli.engines.inprocess.texts import Text, find_parents

DEEP, TIMES = 64, 200_000


@numba.njit(nogil=True, boundscheck=False)
def small_products(packed, weights, outputs, scales):
    """Multiply the same few rows with the same few weights, again and again."""
    rows, width = len(scales), float16.PANEL
    for _ in range(TIMES):
        float16._add_tile(rows, width, packed, 0, weights, 0, DEEP, outputs, 0, width, scales, 0, False)


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


def main() -> None:
    """Count, measure, and print the bound."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["sample", "judge"])
    parser.add_argument("--rows", type=Path, required=True, help="prompts or replies, JSONL")
    parser.add_argument("--each", type=int, required=True, help="completions a prompt, judgements a reply")
    parser.add_argument("--tokens-a-row", type=float, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=["auto", "float32", "float16"], default="auto", help="auto as in srlm")
    given = parser.parse_args()
    models.quiet_libraries()
    tokenizer = models.load_tokenizer(given.model)
    sampling = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 256}
    asked = requests_of(given.task, str(given.rows), given.each, sampling)
    texts = [Text(tokens(tokenizer, request)) for request in asked]
    find_parents(texts, [])
    net = models.load_model(given.model, "float32").eval()
    weights = sum(weight.numel() for weight in net.parameters())
    head = net.get_output_embeddings().weight.numel()
    half = models.pick_dtype(given.dtype, "cpu", float16=True) == "float16"
    rate, bandwidth = machine(net.dtype)
    if half:
        float16.use_in(net)
        rate = float16_rate()
    model = PackedModel(net, "cpu")
    with torch.inference_mode():
        if not model.fits():
            raise SystemExit(f"{given.model} does not run packed")
    written = len(asked) * given.each * given.tokens_a_row
    fresh = sum(len(text.fresh) for text in texts)
    seen = given.tokens_a_row / 2 + sum(len(text.tokens) for text in texts) / len(texts) / given.each
    parts = {
        f"products with {weights / 1e6:.1f}M weights": 2 * weights / rate,
        f"its share of reading {fresh} prompt tokens": 2 * (weights - head) / rate * fresh / written,
        f"keys and values of {seen:.0f} tokens of {model.token_bytes() / 1e3:.0f} kB": seen
        * model.token_bytes()
        / bandwidth,
    }
    print("python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]))
    print(hardware())
    kind = "float16" if half else "float32"
    print(f"{kind}: {rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    print(f"{len(asked)} requests x {given.each}, {written:.0f} tokens written")
    for name, seconds in parts.items():
        print(f"  {name}: {seconds * 1e3:.2f} ms a token")
    products, reading, memory = parts.values()
    for name, seconds in {
        "one after the other": products + reading + memory,
        "memory read beside the products": max(products + reading, memory),
    }.items():
        print(f"{name}: at most {1 / seconds:.0f} tokens/s, {1 / seconds / given.tokens_a_row:.2f} rows/s")


if __name__ == "__main__":
    main()
