"""Products of rows with weights of 16 bits, compiled by numba: in float16 and in bfloat16.

A float16 sum loses digits, and ends at 65,504. So only `depth` products are summed in it, and those sums in float32;
and rows and weights are scaled by powers of two, so that no sum can be too large. Its error is half of what bfloat16
makes by its rounding alone (tests/forward/cpu/test_linear.py). Products in bfloat16 are summed in float32, two by two,
by the processor's own instruction, and need no scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from srlm_cli.forward.cpu.elementwise import gated, scaled
from srlm_cli.forward.cpu.jit import jit
from srlm_cli.forward.cpu.llvm import (
    FLOAT,
    FLOATS,
    HALF,
    INT,
    INTS,
    LONG,
    SHORTS,
    add_halves,
    add_pairs,
    address,
    call,
    each,
    largest_size,
    loop,
    prefetch,
    same,
    save_pairs,
    squares,
)

HIGHEST = 6  # rows that are computed together: 6 rows of 4 vectors of sums are what the registers hold
LANE = 16  # steps of a row that lie together
UNROLLED = 8
AHEAD = 3  # lines of later weights that are asked for by each `UNROLLED` steps of a sum
HALVES_A_LINE, FLOATS_A_LINE = 32, 16
ROWS_BITS = 9  # in float16 rows are scaled to below 2^9, weights to below 1: no sum of 64 reaches 2^15


@dataclass(frozen=True, eq=False)
class Kind:
    """How a type of 16 bits is multiplied: `panel` outputs are computed together, whose weights lie side by side.

    A step of a sum is a 32-bit number of a row: `together` inputs, or one in float16, which it has twice.
    """

    name: str
    together: int
    panel: int
    depth: int  # products that are summed before the sums are added to the outputs
    block: int  # rows that stay in the cache while all weights pass by

    @classmethod
    def of(cls, dtype: torch.dtype) -> Kind:
        return {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}[dtype]

    @property
    def last_panel(self) -> int:
        """Outputs of the last panel, where these are enough."""
        return self.panel // 2

    @property
    def outputs_a_vector(self) -> int:
        return 32 // self.together

    def blocks(self, rows: int) -> list[slice]:
        """Return the blocks of so many rows."""
        return [slice(at, min(rows, at + self.block)) for at in range(0, rows, self.block)]

    def scale_of(self, weights: torch.Tensor) -> float:
        """Return the power of two that weights are divided by."""
        return 2.0 ** math.frexp(weights.abs().max().item())[1] if self is FLOAT16 else 1.0


FLOAT16 = Kind("float16", together=1, panel=128, depth=64, block=132)
BFLOAT16 = Kind("bfloat16", together=2, panel=64, depth=256, block=528)  # 32 kB of weights stay in the first cache


class Code(NamedTuple):
    """Compiled code: rows are packed as they are, normed or gated, and multiplied."""

    pack: Callable
    pack_normed: Callable
    pack_gated: Callable
    multiply: Callable


@cache
def compiled(kind: Kind) -> Code:
    """Return the code for a kind."""
    together, panel, most = kind.together, kind.panel, kind.depth
    is_scaled = kind is FLOAT16
    save, add_tile = (_save_twice if is_scaled else save_pairs), _tile_adder(kind)
    near = LANE // together  # steps of 16 numbers
    shape = "_".join(map(str, astuple(kind)))

    def packing(name: str, make: Callable) -> Callable:
        @jit(f"{name}_{shape}")
        def pack(rows, others, number, packed, scales):
            """Lay what is made of rows, (rows, depth), as `multiply` reads it; set what undoes the scale of each.

            It is scaled and rounded to 16 bits.
            """
            depth, at = rows.shape[1], 0
            steps, made = depth // together, np.empty(rows.shape[1], np.float32)
            while at < len(scales):
                height = _height(len(scales) - at)
                for row in range(at, at + height):
                    make(rows, others, number, row * depth, made)
                    scale = np.float32(1)
                    if is_scaled:
                        exponent = ROWS_BITS - math.frexp(largest_size(made, 0, depth))[1]
                        scale = np.float32(2.0) ** np.float32(min(100, exponent))
                    scales[row] = np.float32(1) / scale
                    for lane in range(steps // LANE):
                        place, begin = at * steps + (lane * height + row - at) * LANE, lane * LANE * together
                        for half in range(together):
                            save(made, begin + half * LANE, scale, packed, place + half * near)
                at += height

        return pack

    @jit(shape)
    def multiply(packed, depth, weights, outputs, scales, empty, first, last):
        """Add the products of packed rows with panels of weights, from the first to before the last, to outputs.

        Set outputs where they are `empty`. The weights that come next are asked for while these are multiplied, a
        part of them by each group of rows, and so is the memory of the outputs that come next.

        packed: int32, by groups of rows: (steps / LANE, rows, LANE). weights: of each panel (steps, its outputs,
        `together`), as their bits. outputs: (rows, width), float32. scales: (rows,).
        """
        width = outputs.shape[1]
        for nth in range(first, last):
            left = nth * panel
            some = min(panel, width - left)
            for begin in range(0, depth, most):
                deep, keep = min(most, depth - begin), begin > 0 or not empty
                weight, at = left * depth + begin * some, 0
                while at < len(scales):
                    height = _height(len(scales) - at)
                    row, output = (at * depth + begin * height) // together, at * width + left
                    later = weight + some * deep * (len(scales) + at) // len(scales)
                    steps = deep // together
                    add_tile(
                        height,
                        some,
                        packed,
                        row,
                        weights,
                        weight,
                        later,
                        steps,
                        outputs,
                        output,
                        width,
                        scales,
                        at,
                        keep,
                    )
                    at += height

    packs = (packing("plain", _as_it_is), packing("normed", _normed), packing("gated", _gated))
    return Code(*packs, multiply)


@numba.njit(inline="always")
def _as_it_is(rows, others, number, begin, made):
    """Make a row what it is."""
    for at in range(len(made)):
        made[at] = rows[begin // len(made), at]


@numba.njit(inline="always")
def _normed(rows, weight, epsilon, begin, made):
    """Make of a row what is divided by its root mean square (Zhang and Sennrich, arXiv 1910.07467), times weights."""
    size = len(made)
    share = np.float32(1) / np.sqrt(squares(rows, begin, size) / np.float32(size) + epsilon)
    scaled(rows, begin, size, share, weight, made)


@numba.njit(inline="always")
def _gated(gates, others, number, begin, made):
    """Make of a row of gates g what is g sigmoid(g) times the numbers beside them."""
    gated(gates, others, begin, len(made), made)


@numba.njit(inline="always")
def _height(left):
    """Return how many rows are computed together of those that are left: the last ones about as many as the others."""
    if left >= 2 * HIGHEST:
        return HIGHEST
    return left if left <= HIGHEST else (left + 1) // 2


_HALVES = ir.VectorType(HALF, 32)


@intrinsic
def _save_twice(typing, numbers, at, scale, packed, to):
    """Put `LANE` scaled numbers into a packed array as float16, each twice, side by side."""

    def generate(context, builder, signature, arguments):
        numbers, at, scale, packed, to = arguments
        loaded = builder.load(address(context, builder, signature.args[0], numbers, at, FLOATS), align=4)
        scaled = builder.fptrunc(builder.fmul(loaded, each(builder, scale, 16)), ir.VectorType(HALF, 16))
        once = builder.zext(builder.bitcast(scaled, SHORTS), INTS)
        twice = builder.or_(once, builder.shl(once, ir.Constant(INTS, [16] * 16)))
        builder.store(twice, address(context, builder, signature.args[3], packed, to, INTS), align=4)
        return context.get_dummy_value()

    return types.void(numbers, types.intp, types.float32, packed, types.intp), generate


def _tile_adder(kind: Kind):
    """Return what adds the products of a few rows with a panel of weights to outputs."""

    @intrinsic
    def add_tile(
        typing, height, some, packed, row, weights, weight, later, steps, outputs, output, width, scales, scale, keep
    ):
        """Add the sums of `height` packed rows with `steps` x `some` weights, times the rows' scales, to outputs.

        Set them where nothing is to be kept.
        """

        def generate(context, builder, signature, arguments):
            height, some, packed, row, weights, weight, later, steps, outputs, output, width, scales, scale, keep = (
                arguments
            )
            packed = address(context, builder, signature.args[2], packed, row, INT)
            later = address(context, builder, signature.args[4], weights, later, HALF)
            weights = address(context, builder, signature.args[4], weights, weight, _HALVES)
            outputs = address(context, builder, signature.args[8], outputs, output, FLOAT)
            scales = address(context, builder, signature.args[11], scales, scale, FLOAT)
            done = builder.append_basic_block("done")
            panels = kind.panel, kind.last_panel
            sizes = product(range(1, HIGHEST + 1), (outs // kind.outputs_a_vector for outs in panels))
            chosen = builder.switch(builder.add(builder.mul(some, LONG(LANE)), height), done)
            for rows, vectors in sizes:
                block, wide = builder.append_basic_block(f"tile{rows}x{vectors}"), vectors * kind.outputs_a_vector
                chosen.add_case(LONG(wide * LANE + rows), block)
                builder.position_at_end(block)
                sums = _sums(kind, builder, rows, vectors, packed, weights, later, steps)
                lines = [builder.gep(outputs, [builder.mul(width, LONG(at))]) for at in range(rows)]
                for line, beside in product(lines, range(wide, 2 * wide, FLOATS_A_LINE)):  # of the panel that follows
                    prefetch(builder, builder.gep(line, [LONG(beside)]), write=True)
                for at, line in enumerate(lines):
                    factor = builder.load(builder.gep(scales, [LONG(at)]), align=4)
                    _add_scaled(builder, sums[vectors * at : vectors * (at + 1)], factor, line, keep)
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        at = types.intp
        taken = (at, at, packed, at, weights, at, at, at, outputs, at, at, scales, at, types.boolean)
        return types.void(*taken), generate

    return add_tile


def _sums(kind: Kind, builder, rows: int, vectors: int, packed, weights, later, steps) -> list:
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
                everywhere = each(builder, number, 16)
                for nth, vector in enumerate(seen, vectors * row):
                    sums[nth] = _added(kind, builder, sums[nth], everywhere, vector)
        return sums

    zeros = ir.Constant(_HALVES, [0.0] * 32) if kind is FLOAT16 else same(0.0)
    return loop(builder, steps, UNROLLED, [zeros] * vectors * rows, body)


def _added(kind: Kind, builder, total, numbers, weights):
    """Return a vector of sums after one more step: of 32 sums in float16, or of 16 in float32."""
    if kind is FLOAT16:
        return add_halves(builder, total, builder.bitcast(numbers, _HALVES), weights)
    return add_pairs(builder, total, numbers, builder.bitcast(weights, INTS))


def _add_scaled(builder, sums, scale, line, keep) -> None:
    """Add vectors, times a scale, to the numbers in float32 at `line`, or to nothing."""
    scales = each(builder, scale, 16)
    parts = [part for vector in sums for part in _in_float32(builder, vector)]
    for at, part in enumerate(parts):
        place = builder.bitcast(builder.gep(line, [LONG(16 * at)]), FLOATS.as_pointer())
        before = builder.select(keep, builder.load(place, align=4), same(0.0))
        added = call(builder, "fma", FLOATS, part, scales, before)
        builder.store(added, place, align=4)


def _in_float32(builder, vector) -> list:
    """Return a vector as vectors of 16 numbers in float32."""
    if vector.type == FLOATS:
        return [vector]
    halves = [ir.Constant(INTS, list(range(begin, begin + 16))) for begin in (0, 16)]
    nothing = ir.Constant(_HALVES, ir.Undefined)
    return [builder.fpext(builder.shuffle_vector(vector, nothing, half), FLOATS) for half in halves]
