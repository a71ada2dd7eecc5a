"""Run the tests as on processors of other kinds: `python tests/instruction_sets.py [ARGUMENTS OF PYTEST]`.

Instruction sets are taken away from PyTorch (ATEN_CPU_CAPABILITY), oneDNN (ONEDNN_MAX_CPU_ISA), code compiled by numba
(NUMBA_CPU_FEATURES) and the choices of srlm (SRLM_CPU). One that this processor lacks can only be played: srlm chooses
as if it were there, and the libraries compute by other instructions.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

# What computes: the rest is the same on every processor.
COMPUTES = ["tests/test_model.py", *(f"tests/{folder}" for folder in ("engines/hf", "forward", "models", "train"))]
ARGUMENTS = ["-q", "-n", "2", "--dist", "loadfile", "-m", "not slow and not vllm", *COMPUTES]


@dataclass(frozen=True)
class Arm:
    """A kind of processor: what srlm takes it for, and the most that oneDNN and PyTorch use."""

    name: str
    capabilities: str
    onednn: str
    aten: str = "avx512"


ARMS = [
    Arm("Intel with AMX", "Intel avx512_f avx512_bf16 avx512_fp16 amx_bf16", "DEFAULT"),
    Arm("Intel without AMX", "Intel avx512_f avx512_bf16 avx512_fp16", "AVX512_CORE_FP16"),
    Arm("Intel without AVX512-FP16", "Intel avx512_f avx512_bf16", "AVX512_CORE_BF16"),
    Arm("AMD with AVX512-BF16", "AMD avx512_f avx512_bf16", "AVX512_CORE_BF16"),
    Arm("AVX512 without 16 bits", "Intel avx512_f", "AVX512_CORE_VNNI"),
    Arm("AVX2 alone", "Intel", "AVX2", "avx2"),
]


def compiled_features(arm: Arm) -> str:
    """Return the features of this processor, for numba, without those that the arm lacks."""
    from llvmlite import binding

    wide = "avx512_f" in arm.capabilities
    taken = {name for name in ("avx512fp16", "avx512bf16") if name.replace("avx512", "avx512_") not in arm.capabilities}
    taken |= {"amx-bf16", "amx-int8", "amx-tile"} if "amx" not in arm.capabilities else set()

    def kept(feature: str) -> str:
        lacks = feature[1:] in taken or (not wide and feature[1:].startswith(("avx512", "avx10", "avxvnni")))
        return "-" + feature[1:] if lacks else feature

    return ",".join(map(kept, binding.get_host_cpu_features().flatten().split(",")))


def lacking(arm: Arm) -> list[str]:
    """Return what this processor lacks of an arm."""
    import torch

    can = torch.cpu.get_capabilities()
    wanted = {*arm.capabilities.split()} - {"AMD", "Intel"}
    return sorted(name for name in wanted if not can.get(name))


def main() -> int:
    arguments, failed = sys.argv[1:] or ARGUMENTS, []
    for arm in ARMS:
        lacks = lacking(arm)
        how = f"played, this processor lacks {', '.join(lacks)}" if lacks else "as this processor can be"
        print(f"=== {arm.name}: {how}", flush=True)
        environment = {
            **os.environ,
            "SRLM_CPU": arm.capabilities,
            "ONEDNN_MAX_CPU_ISA": arm.onednn,
            "ATEN_CPU_CAPABILITY": arm.aten,
            "NUMBA_CPU_FEATURES": compiled_features(arm),
        }
        if subprocess.run([sys.executable, "-m", "pytest", *arguments], env=environment, check=False).returncode:
            failed.append(arm.name)
    print(f"{len(ARMS) - len(failed)} of {len(ARMS)} kinds of processor passed" + "".join(f"; not {x}" for x in failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
