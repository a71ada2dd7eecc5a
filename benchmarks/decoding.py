"""What each part of decoding on a CPU brings: tokens a second with all of them, and without one at a time.

    python benchmarks/decoding.py --data FOLDER [--prompts N] [--max-new-tokens N] [--repeats N]

Prompts and settings are those of `engines/sample.py`: N=4, temperature 0.7, top-p 0.9. All ways are run in turn in
one process, each first on a few of the requests.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent / "engines"))

import torch
from sample import PROMPT_DATA, prompt_data, prompts

from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling
from srlm_cli.engines.hf import sampling, workers
from srlm_cli.forward.cpu import decoder_layer, linear, paged_attention
from srlm_cli.forward.cpu import sampling as compiled
from srlm_cli.models.hardware import pick_dtype


def fast(half: torch.dtype) -> bool:
    """Return whether `--dtype` of this name computes by compiled products on this CPU."""
    return linear.type_for(str(half)[6:], "cpu") is half


def draw_by_torch(logits, temperature, top_p, uniform) -> torch.Tensor:
    """Draw as on a GPU."""
    return sampling.draw_nucleus(logits / temperature[:, None], top_p, uniform)


OPENED = {  # the dtype, and what is done otherwise while the model is loaded
    "auto": ("auto", []),
    "float32": ("float32", []),
    "bfloat16 by torch": ("bfloat16", [patch.object(linear, "type_for", lambda dtype, device: None)]),
    **{str(half)[6:]: (str(half)[6:], []) for half in (torch.bfloat16, torch.float16) if fast(half)},
}
WAYS = {  # the model of OPENED, and what is done otherwise
    "all": ("auto", []),
    "one worker": ("auto", [patch.object(workers, "count", lambda rows, device: 1)]),
    "layers by their modules": ("auto", [patch.object(decoder_layer, "current_pass", lambda: None)]),
    "draws by torch": ("auto", [patch.object(compiled, "draw", draw_by_torch)]),
    "float32": ("float32", []),
    "float32, attention by torch": (
        "float32",
        [patch.object(paged_attention, "fits", lambda layers, dtype, device: False)],
    ),
    "products by torch, bfloat16": ("bfloat16 by torch", []),
    **{f"compiled products, {name}": (name, []) for name in OPENED if name in ("bfloat16", "float16")},
}


def main() -> None:
    """Measure in turn and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=prompt_data, required=True, help=PROMPT_DATA)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    engines = {}
    for opened, (dtype, patches) in OPENED.items():
        with ExitStack() as stack:
            for one in patches:
                stack.enter_context(one)
            engines[opened] = open_engine(EngineSpec("hf", given.model, dtype=dtype, batch_size=given.batch_size))
    sampling = Sampling(0.7, 0.9, given.max_new_tokens)
    asked = [
        Request([{"role": "user", "content": row["prompt"]}], sampling, tuple(range(4 * at, 4 * at + 4)))
        for at, row in enumerate(prompts(given.data, given.prompts))
    ]

    def rate(opened: str, requests: list[Request]) -> float:
        started = time.perf_counter()
        tokens = sum(done.tokens_out for done in engines[opened].generate(requests))
        return tokens / (time.perf_counter() - started)

    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    print("python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]))
    auto = pick_dtype("auto", "cpu", float16=True)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {given.model}, {len(asked)} prompts x 4")
    print(f"all is {auto}")
    for _ in range(given.repeats):
        for way, (opened, patches) in WAYS.items():
            with ExitStack() as stack:
                for one in patches:
                    stack.enter_context(one)
                rate(opened, asked[:2])
                rates[way].append(rate(opened, asked))
            print(f"  {way}: {rates[way][-1]:.0f} tokens/s", flush=True)
    for way, found in rates.items():
        ratios = sorted(whole / part for whole, part in zip(rates["all"], found, strict=True))
        print(
            f"{way:28} {statistics.median(found):6.0f} tokens/s; all: {statistics.median(ratios):.2f} times "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
