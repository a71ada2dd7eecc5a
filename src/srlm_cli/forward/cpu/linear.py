"""Linear layers that multiply in 16 bits, on a CPU with such instructions; the rest of the model is float32.

Such a CPU is two to four times faster in its 16-bit type than in float32: float16 with AVX512-FP16, bfloat16 with
AVX512-BF16 (`gemm` explains the sums). The result of a row does not depend on the other rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch.nn.functional import pad

from srlm_cli import threads
from srlm_cli.forward import memory
from srlm_cli.forward.cpu.gemm import LANE, Kind, compiled
from srlm_cli.models import hardware

GRAIN = 1 << 24  # the fewest products per thread
FEW = 16  # with fewer rows, reading the weights takes longer than the products


def type_for(dtype: str, device: str) -> torch.dtype | None:
    """Return the 16-bit type of compiled products for a requested `dtype` on this device, or None."""
    fast = {"float16": hardware.has_float16, "bfloat16": hardware.has_fast_pairs}.get(dtype)
    return getattr(torch, dtype) if fast and fast(device) else None


def type_of(net: torch.nn.Module) -> torch.dtype | None:
    """Return the 16-bit type of the compiled products of a model, or None."""
    return next((layer.dtype for layer in net.modules() if isinstance(layer, HalfLinear)), None)


def use_in(net: torch.nn.Module, dtype: torch.dtype) -> None:
    """Replace the linear layers of a float32 model by layers that multiply in a 16-bit type."""
    for holder in list(net.modules()):
        for name, layer in list(holder.named_children()):
            if type(layer) is torch.nn.Linear:
                setattr(holder, name, HalfLinear(layer, dtype))


class HalfLinear(torch.nn.Module):
    """A linear layer with 16-bit weights; inputs (..., in) and outputs (..., out) are float32."""

    def __init__(self, layer: torch.nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.kind = dtype, Kind.of(dtype)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        deep = LANE * self.kind.together
        self.depth = -(-self.in_features // deep) * deep
        self.width = -(-self.out_features // self.kind.last_panel) * self.kind.last_panel
        weight = layer.weight.detach().float()
        self.scale = np.float32(self.kind.scale_of(weight))
        scaled = (weight if self.scale == 1 else weight / float(self.scale)).to(dtype)
        padded = pad(scaled, (0, self.depth - self.in_features, 0, self.width - self.out_features))
        self.panels = _laid(padded.contiguous(), self.kind).view(torch.int16).numpy()
        self.bias = None if layer.bias is None else layer.bias.detach().float().numpy()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.depth > self.in_features:
            inputs = pad(inputs, (0, self.depth - self.in_features))
        rows = inputs.reshape(-1, self.depth).contiguous().numpy()
        outputs = self.begun(len(rows))
        for at in self.kind.blocks(len(rows)):
            self.add(Packed.of(rows[at], self.kind), outputs[at], keep=self.bias is not None)
        made = torch.from_numpy(outputs)[:, : self.out_features]
        return made.reshape(*inputs.shape[:-1], self.out_features)

    def split(self, *widths: int) -> tuple[HalfLinear, ...]:
        """Return layers of these widths, with the same weights; raise ValueError if one begins within a panel."""
        ends = list(accumulate(widths, initial=0))
        if ends[-1] != self.width or any(end % self.kind.panel for end in ends[:-1]):
            raise ValueError(f"{widths} do not divide {self.width} outputs in panels of {self.kind.panel}")
        return tuple(self._part(*edges) for edges in pairwise(ends))

    def _part(self, first: int, end: int) -> HalfLinear:
        part = copy(self)
        part.out_features = part.width = end - first
        part.panels = self.panels[first * self.depth : end * self.depth]
        part.bias = None if self.bias is None else self.bias[first:end]
        return part

    @property
    def plain(self) -> bool:
        """Return whether inputs and outputs need no padding."""
        return (self.depth, self.width) == (self.in_features, self.out_features)

    def begun(self, rows: int) -> np.ndarray:
        """Return new outputs, (rows, width), float32, initialized with the bias if there is one."""
        outputs = memory.floats(rows, self.width)
        if self.bias is not None:
            outputs[:, : self.out_features] = self.bias
        return outputs

    def add(self, rows: Packed, outputs: np.ndarray, keep: bool) -> None:
        """Add the products of rows to outputs, (rows, width); without `keep` overwrite them."""
        scales = rows.scales if self.scale == 1 else rows.scales * self.scale
        given = (rows.numbers, self.depth, self.panels, outputs, scales, not keep)
        multiply, panels = compiled(self.kind).multiply, -(-self.width // self.kind.panel)
        parts = min(torch.get_num_threads(), panels, max(FEW, len(scales)) * len(self.panels) // GRAIN) or 1
        if parts == 1:
            multiply(*given, 0, panels)
        else:
            in_parts(parts, panels, lambda first, last: multiply(*given, first, last))


@dataclass(frozen=True)
class Packed:
    """Rows in 16 bits in the order of `multiply`, and the factors that undo their scaling."""

    numbers: np.ndarray
    scales: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, kind: Kind) -> Packed:
        """Pack rows, (rows, depth), float32."""
        return cls._by(compiled(kind).pack, rows, rows, 0.0, kind)

    @classmethod
    def normed(cls, rows: np.ndarray, weight: np.ndarray, epsilon: float, kind: Kind) -> Packed:
        """Pack rows, (rows, depth), after RMSNorm with weights, (depth,)."""
        return cls._by(compiled(kind).pack_normed, rows, weight, epsilon, kind)

    @classmethod
    def gated(cls, gates: np.ndarray, up: np.ndarray, activation: str, kind: Kind) -> Packed:
        """Pack the activation (silu or gelu) of gates times `up`, both (rows, depth)."""
        code = compiled(kind)
        return cls._by({"silu": code.pack_silu, "gelu": code.pack_gelu}[activation], gates, up, 0.0, kind)

    @classmethod
    def _by(cls, pack: Callable, rows: np.ndarray, others: np.ndarray, number: float, kind: Kind) -> Packed:
        count, depth = rows.shape
        packed = cls(np.empty(count * depth // kind.together, np.int32), np.empty(count, np.float32))
        pack(rows, others, np.float32(number), packed.numbers, packed.scales)
        return packed


def _laid(weights: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Return weights, (outputs, depth), flat, in the order of `multiply`: per panel (steps, its outputs, `together`).

    What one step reads of an output is copied as one number.
    """
    steps = weights.view(torch.int32) if kind.together == 2 else weights.view(torch.int16)
    whole = len(steps) // kind.panel * kind.panel
    laid = steps.new_empty(steps.numel())
    split = whole * steps.shape[1]
    laid[:split].view(-1, steps.shape[1], kind.panel).copy_(
        steps[:whole].unflatten(0, (-1, kind.panel)).transpose(1, 2)
    )
    laid[split:].view(steps.shape[1], -1).copy_(steps[whole:].t())
    return laid


def in_parts(parts: int, count: int, work: Callable[[int, int], None]) -> None:
    """Run `work(first, end)` over range(count) in `parts` parts in parallel, one per thread."""
    edges = [count * part // parts for part in range(parts + 1)]
    others: list[Future] = [_helpers().submit(work, *edges[part : part + 2]) for part in range(1, parts)]
    work(*edges[:2])
    for other in others:
        other.result()


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads.most() - 1), "product")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # threads are not forked
