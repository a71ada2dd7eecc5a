"""How many tokens a second a machine can write at most in the races of `engines/`, whatever program writes them.

    python benchmarks/bound.py sample --rows prompts.jsonl --each 4 --tokens-a-row 213
    python benchmarks/bound.py judge --rows responses.jsonl --each 3 --tokens-a-row 100

Counted are the products with all weights for each generated token, those of reading each prompt (without the part
that it shares with an earlier one, and without the head), and the keys and values of each row read once a token,
those of a prompt once for all its rows. The rates of products and of a long read are measured first: in float32
that of a large product by PyTorch, in 16 bits that of a small one by srlm's own code, whose numbers never leave
the cache. `--tokens-a-row` is what the race printed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "engines"))

import torch
from paths import existing_file
from race import hardware, tokens
from step import machine, own_rate
from work import requests_of

from srlm_cli.forward.cpu import linear
from srlm_cli.forward.packed import PackedModel
from srlm_cli.forward.prefix import CachedPrefix, find_prefixes
from srlm_cli.models.hardware import pick_dtype
from srlm_cli.models.load import load_model, load_tokenizer, quiet_libraries


def main() -> None:
    """Count, measure, and print the bound."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["sample", "judge"])
    parser.add_argument("--rows", type=existing_file, required=True, help="prompts or replies, JSONL")
    parser.add_argument("--each", type=int, required=True, help="completions a prompt, judgements a reply")
    parser.add_argument("--tokens-a-row", type=float, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto", help="auto as in srlm"
    )
    given = parser.parse_args()
    quiet_libraries()
    tokenizer = load_tokenizer(given.model)
    sampling = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 256}
    asked = requests_of(given.task, str(given.rows), given.each, sampling)
    texts = [CachedPrefix(tokens(tokenizer, request)) for request in asked]
    find_prefixes(texts, [])
    net = load_model(given.model, "float32").eval()
    weights = sum(weight.numel() for weight in net.parameters())
    head = net.get_output_embeddings().weight.numel()
    kind = pick_dtype(given.dtype, "cpu", float16=True)
    half = linear.type_for(kind, "cpu")
    rate, bandwidth = machine(net.dtype)
    if half:
        linear.use_in(net, half)
        rate = own_rate(half)
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
