"""How fast this processor multiplies in bfloat16 against float32, at the sizes of the embedded model.

    python benchmarks/bfloat16.py

Decides what `--dtype auto` should be: `srlm_cli.models.has_bfloat16` says what it is.
"""

from __future__ import annotations

import statistics
import time

import torch

from srlm_cli.models import has_bfloat16

LAYERS, WIDE, NARROW = 60, 1536, 576


def seconds(dtype: torch.dtype, rows: int) -> float:
    """Return the time of one product of (rows, 576) with (576, 1536)."""
    weights = [torch.randn(WIDE, NARROW).to(dtype) for _ in range(LAYERS)]
    inputs = torch.randn(rows, NARROW).to(dtype)
    started = time.perf_counter()
    for weight in weights:
        torch.nn.functional.linear(inputs, weight)
    return (time.perf_counter() - started) / LAYERS


def main() -> None:
    """Time both in turn and print the ratio for each number of rows."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, has_bfloat16: {has_bfloat16('cpu')}")
    with torch.inference_mode():
        for rows in (1, 16, 64, 256, 1024):
            seconds(torch.float32, rows), seconds(torch.bfloat16, rows)
            ratios = sorted(seconds(torch.bfloat16, rows) / seconds(torch.float32, rows) for _ in range(7))
            middle = statistics.median(ratios)
            print(f"{rows:5} rows: bfloat16 takes {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) of float32's time")


if __name__ == "__main__":
    main()
