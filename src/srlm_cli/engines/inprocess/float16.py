"""Products of float32 rows with weights in float16, on a CPU that multiplies in float16 itself (AVX512-FP16).

Such a CPU makes twice as many products a second in float16 as in float32. But sums in float16 lose digits, and end
at 65,504. So only `DEPTH` products are summed in it, and those sums in float32; and rows and weights are scaled by
powers of two, so that no sum can be too large. The error is half of what bfloat16 makes by its rounding alone
(tests/test_float16.py). A row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch.nn.functional import pad

from srlm_cli import cores
from srlm_cli.engines.inprocess.jit import jit
from srlm_cli.engines.inprocess.vectors import FLOAT, HALF, INT, LONG, address, call, each, loop, prefetch

DEPTH = 64  # products that are summed in float16
ROWS_BITS = 9  # rows are scaled to below 2^9, weights to below 1: no sum of so many reaches 2^15
PANEL = 128  # outputs that are computed together: their weights lie side by side
LAST = 64  # outputs of the last panel, where these are enough
HEIGHTS = (6, 4, 2, 1)  # rows that are computed together: 6 x 128 sums are what the registers hold
LANE = 16  # numbers of a row that lie together
BLOCK = 22 * HEIGHTS[0]  # rows that stay in the cache while all weights pass by
UNROLLED = 8
AHEAD = 3  # lines of later weights that are asked for by each `UNROLLED` products of a sum
HALVES_A_LINE = 32
GRAIN = 1 << 24  # products that are worth a thread
FEW = 16  # rows, for which reading the weights takes longer than the products


def multiplies(net: torch.nn.Module) -> bool:
    """Tell whether a model multiplies in float16."""
    return any(isinstance(layer, Float16Linear) for layer in net.modules())


def use_in(net: torch.nn.Module) -> None:
    """Give a float32 model linear layers that multiply in float16; all else stays as it is."""
    for holder in list(net.modules()):
        for name, layer in list(holder.named_children()):
            if type(layer) is torch.nn.Linear:
                setattr(holder, name, Float16Linear(layer))


class Float16Linear(torch.nn.Module):
    """A linear layer of float32 inputs and outputs, (..., inputs) to (..., outputs), whose weights are float16."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.depth = -(-self.in_features // LANE) * LANE
        self.width = -(-self.out_features // LAST) * LAST
        exponent = math.frexp(weight.abs().max().item())[1]
        scaled = (weight * 2.0**-exponent).to(torch.float16)
        padded = pad(scaled, (0, self.depth - self.in_features, 0, self.width - self.out_features))
        panels = [panel.t().flatten() for panel in padded.split(PANEL)]
        self.panels = torch.cat(panels).view(torch.int16).numpy()  # of each panel (depth, its outputs), as bits
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float(), persistent=False)
        self.scale = np.float32(2.0**exponent)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.depth > self.in_features:
            inputs = pad(inputs, (0, self.depth - self.in_features))
        rows = inputs.numel() // self.depth
        outputs = torch.empty(rows, self.width)
        if self.bias is not None:
            outputs[:, : self.out_features] = self.bias
        numbers, sums = inputs.contiguous().view(-1).numpy(), outputs.view(-1).numpy()
        for begin in range(0, rows, BLOCK):
            end = min(rows, begin + BLOCK)
            of_rows, of_sums = slice(begin * self.depth, end * self.depth), slice(begin * self.width, end * self.width)
            self._add(end - begin, numbers[of_rows], sums[of_sums])
        return outputs[:, : self.out_features].view(*inputs.shape[:-1], self.out_features)

    def _add(self, count: int, rows: np.ndarray, outputs: np.ndarray) -> None:
        """Set the outputs of `count` rows, (rows, width), or add to the bias in them; all are flat."""
        packed, scales = torch.empty(len(rows), dtype=torch.int32).numpy(), np.empty(count, np.float32)
        _pack(rows, self.depth, self.scale, packed, scales)
        given = (packed, self.depth, self.panels, outputs, scales, self.bias is None)
        panels = -(-self.width // PANEL)
        parts = min(torch.get_num_threads(), panels, max(FEW, count) * len(self.panels) // GRAIN) or 1
        edges = [panels * part // parts for part in range(parts + 1)]
        others: list[Future] = [
            _helpers().submit(_multiply, *given, *edges[part : part + 2]) for part in range(1, parts)
        ]
        _multiply(*given, *edges[:2])
        for other in others:
            other.result()


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, cores.most() - 1), "product")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # threads are not forked


# --- compiled code ---------------------------------------------------------------------------


@jit()
def _pack(rows, depth, weights_scale, packed, scales):
    """Scale rows, (rows, depth), and lay them in float16 as `_multiply` reads them; set what undoes all scales."""
    at = 0
    while at < len(scales):
        height = _height(len(scales) - at)
        for row in range(at, at + height):
            exponent = ROWS_BITS - math.frexp(_largest(rows, row * depth, depth))[1]
            scale = np.float32(2.0) ** np.float32(min(100, exponent))
            scales[row] = weights_scale / scale
            for lane in range(depth // LANE):
                _save_twice(
                    rows, row * depth + lane * LANE, scale, packed, at * depth + (lane * height + row - at) * LANE
                )
        at += height


@jit()
def _multiply(packed, depth, weights, outputs, scales, empty, first, last):
    """Add the products of packed rows with panels of weights, from the first to before the last, to outputs.

    Set outputs where they are `empty`. The weights that come next are asked for while these are multiplied: a part
    of them by each group of rows.

    packed: int32 with each number twice, by groups of rows: (depth / LANE, rows, LANE).
    weights: of each panel (depth, its outputs), float16 as its bits. outputs: (rows, width), float32. scales: (rows,).
    """
    width = len(outputs) // len(scales)
    for panel in range(first, last):
        left = panel * PANEL
        some = min(PANEL, width - left)
        for begin in range(0, depth, DEPTH):
            deep, keep = min(DEPTH, depth - begin), begin > 0 or not empty
            weight, at = left * depth + begin * some, 0
            while at < len(scales):
                height = _height(len(scales) - at)
                row, output = at * depth + begin * height, at * width + left
                later = weight + some * deep * (len(scales) + at) // len(scales)
                _add_tile(
                    height, some, packed, row, weights, weight, later, deep, outputs, output, width, scales, at, keep
                )
                at += height


@numba.njit(inline="always")
def _height(left):
    """Return how many rows are computed together of those that are left."""
    for height in HEIGHTS:
        if height <= left:
            return height
    return 0


_HALVES, _FLOATS = ir.VectorType(HALF, 32), ir.VectorType(FLOAT, 16)
_PAIRS = ir.VectorType(INT, 16)


@intrinsic
def _largest(typing, numbers, at, count):
    """Return the largest magnitude of `count` numbers."""

    def generate(context, builder, signature, arguments):
        numbers, at, count = arguments
        begin = address(context, builder, signature.args[0], numbers, at, FLOAT)
        zeros = ir.Constant(_FLOATS, [0.0] * 16)

        def body(step, tops):
            place = builder.bitcast(builder.gep(begin, [step]), _FLOATS.as_pointer())
            size = call(builder, "fabs", _FLOATS, builder.load(place, align=4))
            return [call(builder, "maxnum", _FLOATS, tops[0], size)]

        (tops,) = loop(builder, count, LANE, [zeros], body)
        return call(builder, "vector.reduce.fmax", FLOAT, tops)

    return types.float32(numbers, types.intp, types.intp), generate


@intrinsic
def _save_twice(typing, numbers, at, scale, packed, to):
    """Put `LANE` scaled numbers into a packed array as float16, each twice, side by side."""

    def generate(context, builder, signature, arguments):
        numbers, at, scale, packed, to = arguments
        loaded = builder.load(address(context, builder, signature.args[0], numbers, at, _FLOATS), align=4)
        scaled = builder.fptrunc(builder.fmul(loaded, each(builder, scale, 16)), ir.VectorType(HALF, 16))
        once = builder.zext(builder.bitcast(scaled, ir.VectorType(ir.IntType(16), 16)), _PAIRS)
        twice = builder.or_(once, builder.shl(once, ir.Constant(_PAIRS, [16] * 16)))
        builder.store(twice, address(context, builder, signature.args[3], packed, to, _PAIRS), align=4)
        return context.get_dummy_value()

    return types.void(numbers, types.intp, types.float32, packed, types.intp), generate


@intrinsic
def _add_tile(
    typing, height, some, packed, row, weights, weight, later, depth, outputs, output, width, scales, scale, keep
):
    """Add the products of `height` packed rows with `depth` x `some` weights, times the rows' scales, to outputs.

    Set them where nothing is to be kept.
    """

    def generate(context, builder, signature, arguments):
        height, some, packed, row, weights, weight, later, depth, outputs, output, width, scales, scale, keep = (
            arguments
        )
        packed = address(context, builder, signature.args[2], packed, row, INT)
        later = address(context, builder, signature.args[4], weights, later, HALF)
        weights = address(context, builder, signature.args[4], weights, weight, _HALVES)
        outputs = address(context, builder, signature.args[8], outputs, output, FLOAT)
        scales = address(context, builder, signature.args[11], scales, scale, FLOAT)
        done = builder.append_basic_block("done")
        sizes = [(rows, outs // 32) for outs in (PANEL, LAST) for rows in HEIGHTS]
        chosen = builder.switch(builder.add(builder.mul(some, LONG(LANE)), height), done)
        for rows, vectors in sizes:
            block = builder.append_basic_block(f"tile{rows}x{vectors}")
            chosen.add_case(LONG(vectors * 32 * LANE + rows), block)
            builder.position_at_end(block)
            sums = _sums(builder, rows, vectors, packed, weights, later, depth)
            for at in range(rows):
                line = builder.gep(outputs, [builder.mul(width, LONG(at))])
                factor = builder.load(builder.gep(scales, [LONG(at)]), align=4)
                _add_scaled(builder, sums[vectors * at : vectors * (at + 1)], factor, line, keep)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    at = types.intp
    taken = (at, at, packed, at, weights, at, at, at, outputs, at, at, scales, at, types.boolean)
    return types.void(*taken), generate


def _sums(builder, rows: int, vectors: int, packed, weights, later, depth) -> list:
    """Return the sums of the products of rows with weights, so many vectors a row; ask for some of later weights."""

    def body(step, sums):
        lane, within = builder.lshr(step, LONG(LANE.bit_length() - 1)), builder.and_(step, LONG(LANE - 1))
        numbers = builder.gep(packed, [builder.add(builder.mul(lane, LONG(rows * LANE)), within)])
        line = builder.gep(weights, [builder.mul(step, LONG(vectors))])
        for nth in range(AHEAD):
            place = builder.add(builder.mul(step, LONG(AHEAD * HALVES_A_LINE // UNROLLED)), LONG(nth * HALVES_A_LINE))
            prefetch(builder, builder.gep(later, [place]), near=2)
        for at in range(UNROLLED):
            seen = [builder.load(builder.gep(line, [LONG(vectors * at + nth)]), align=2) for nth in range(vectors)]
            for row in range(rows):
                number = builder.load(builder.gep(numbers, [LONG(row * LANE + at)]), align=4)
                everywhere = builder.bitcast(each(builder, number, 16), _HALVES)
                for nth, vector in enumerate(seen, vectors * row):
                    sums[nth] = call(builder, "fma", _HALVES, everywhere, vector, sums[nth])
        return sums

    return loop(builder, depth, UNROLLED, [ir.Constant(_HALVES, [0.0] * 32)] * vectors * rows, body)


def _add_scaled(builder, sums, scale, line, keep) -> None:
    """Add vectors in float16, times a scale, to the numbers in float32 at `line`, or to nothing."""
    scales = each(builder, scale, 16)
    for at in range(2 * len(sums)):
        half = ir.Constant(_PAIRS, list(range(at % 2 * 16, at % 2 * 16 + 16)))
        part = builder.fpext(builder.shuffle_vector(sums[at // 2], ir.Constant(_HALVES, ir.Undefined), half), _FLOATS)
        place = builder.bitcast(builder.gep(line, [LONG(16 * at)]), _FLOATS.as_pointer())
        before = builder.select(keep, builder.load(place, align=4), ir.Constant(_FLOATS, [0.0] * 16))
        added = call(builder, "fma", _FLOATS, part, scales, before)
        builder.store(added, place, align=4)
