"""Freed memory between tensors that are kept goes back to the system when it is asked for, and not before."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import torch
from srlm_cli.train.heap import give_back_freed_memory, keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20

keep_freed_memory()
tensors = [torch.ones(2**18) for _ in range(400)]
del tensors[::2]
before = resident()
give_back_freed_memory()
print(before - resident(), tensors[0].sum().item())
"""


def test_holes_between_tensors_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    freed, kept = done.stdout.split()
    assert int(freed) > 150 and float(kept) == 2**18
