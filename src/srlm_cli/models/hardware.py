"""Devices and data types: what `auto` means on this machine."""

from __future__ import annotations

import os
from typing import Any

from srlm_cli.errors import OptionError

TRAINING_DTYPES = ("float32", "bfloat16")


def pick_device(device: str) -> str:
    """Return the device for `auto`: CUDA, then Apple's, then the CPU."""
    import torch

    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype: str, device: str, *, float16: bool = False) -> str:
    """Return the dtype for `auto`: a 16-bit type if the processor is faster in it, else float32.

    `float16` allows float16 on a CPU, for an engine with compiled float16 products; PyTorch has none.
    """
    if dtype != "auto":
        return dtype
    if has_bfloat16(device) or has_fast_pairs(device):
        return "bfloat16"
    return "float16" if float16 and has_float16(device) else "float32"


def pick_training_dtype(dtype: str, device: str) -> str:
    """Return the dtype of a training step's products for `auto`: bfloat16 where the device is faster in it.

    Raises OptionError for a dtype that the device cannot train in. Weights, gradients and the optimizer are
    float32 in either case.
    """
    if dtype == "auto":
        return "bfloat16" if has_bfloat16(device) or has_fast_pairs(device) else "float32"
    if dtype not in TRAINING_DTYPES:
        raise OptionError(f"--dtype {dtype}: training uses {' or '.join(TRAINING_DTYPES)}", "--dtype auto")
    if dtype == "bfloat16" and device.startswith("cuda") and not has_bfloat16(device):
        raise OptionError("--dtype bfloat16: this GPU has no bfloat16 units", "--dtype float32")
    return dtype


def cpu_capabilities() -> dict[str, Any]:
    """Return the capabilities of the CPU, with the names of `torch.cpu.get_capabilities`.

    The environment variable SRLM_CPU, such as `AMD avx512_bf16`, replaces them, to test the decisions for that CPU.
    """
    if (named := os.environ.get("SRLM_CPU")) is not None:
        return {"cpu_name": named, **dict.fromkeys(named.split(), True)}
    import torch

    return torch.cpu.get_capabilities()


def has_bfloat16(device: str) -> bool:
    """Return whether a device multiplies bfloat16 matrices by units made for that: a GPU's, or AMX in a CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bool(cpu_capabilities().get("amx_bf16"))


def has_fast_pairs(device: str) -> bool:
    """Return whether a device is a CPU that is faster in bfloat16 by products of pairs (AVX512-BF16).

    AMD's are, four times on Zen 5; with Intel's most products take longer, as benchmarks/dtypes.py shows.
    """
    can = cpu_capabilities()
    return device == "cpu" and bool(can.get("avx512_bf16")) and "AMD" in str(can.get("cpu_name"))


def has_float16(device: str) -> bool:
    """Return whether a device is a CPU that multiplies in float16 itself, as AVX512-FP16 does: twice as fast.

    `forward.cpu.gemm` uses it.
    """
    return device == "cpu" and bool(cpu_capabilities().get("avx512_fp16"))
