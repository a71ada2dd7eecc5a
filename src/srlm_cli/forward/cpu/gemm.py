"""Matrix products in float16 and bfloat16 (GEMM), compiled by numba.

A float16 sum loses precision and overflows at 65,504. So at most `depth` products are added in float16, and these sums
are added in float32. Rows and weights are scaled by powers of two, so that no sum overflows. The error is half of the
rounding error of bfloat16 (tests/forward/cpu/test_linear.py). In bfloat16 the processor adds pairs of products in
float32 by one instruction, and no scales are needed.
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

from srlm_cli.forward.cpu.elementwise import gate, scaled
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

HIGHEST = 6  # rows per tile: the registers hold 6 rows of 4 vectors of sums
LANE = 16  # consecutive steps of a row in packed order
UNROLLED = 8
AHEAD = 3  # cache lines of later weights that are prefetched per `UNROLLED` steps of a sum
HALVES_A_LINE, FLOATS_A_LINE = 32, 16
SILU = (1.0, 0.0)
GELU = (1.5957691216057308, 0.07135481627260025)  # 2 sqrt(2 / pi), and this times 0.044715: the form with tanh
ROWS_BITS = 9  # float16: rows are scaled below 2^9 and weights below 1, so a sum of 64 stays below 2^15


@dataclass(frozen=True, eq=False)
class Kind:
    """The parameters of the products in one 16-bit type; a panel is `panel` outputs, whose weights are contiguous.

    One step of a sum reads 32 bits of a row: `together` inputs. In float16 this is one input, written twice.
    """

    name: str
    together: int
    panel: int
    depth: int  # products per sum before it is added to the outputs
    block: int  # rows that stay in the cache while all weights are read

    @classmethod
    def of(cls, dtype: torch.dtype) -> Kind:
        return {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}[dtype]

    @property
    def last_panel(self) -> int:
        """The size of the last panel, if this is enough."""
        return self.panel // 2

    @property
    def outputs_a_vector(self) -> int:
        return 32 // self.together

    def blocks(self, rows: int) -> list[slice]:
        """Return the slices of `rows` rows, block by block."""
        return [slice(at, min(rows, at + self.block)) for at in range(0, rows, self.block)]

    def scale_of(self, weights: torch.Tensor) -> float:
        """Return the power of two by which weights are divided."""
        return 2.0 ** math.frexp(weights.abs().max().item())[1] if self is FLOAT16 else 1.0


FLOAT16 = Kind("float16", together=1, panel=128, depth=64, block=132)
BFLOAT16 = Kind("bfloat16", together=2, panel=64, depth=256, block=528)  # 32 kB of weights fit in the L1 cache


class Code(NamedTuple):
    """Compiled functions: they pack rows (unchanged, normalized or gated) and multiply them."""

    pack: Callable
    pack_normed: Callable
    pack_silu: Callable
    pack_gelu: Callable
    multiply: Callable


@cache
def compiled(kind: Kind) -> Code:
    """Return the compiled functions for a kind."""
    together, panel, most = kind.together, kind.panel, kind.depth
    is_scaled = kind is FLOAT16
    save, add_tile = (_save_twice if is_scaled else save_pairs), _tile_adder(kind)
    near = LANE // together  # steps per 16 numbers
    shape = "_".join(map(str, astuple(kind)))

    def packing(name: str, make: Callable) -> Callable:
        @jit(f"{name}_{shape}")
        def pack(rows, others, number, packed, scales):
            """Apply `make` to rows, (rows, depth), and write them in 16 bits, scaled, in the order of `multiply`.

            Set `scales` to the factors that undo the scaling.
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
        """Add the products of packed rows with the panels `first` to `last - 1` of the weights to outputs.

        If `empty`, outputs are overwritten. Each group of rows prefetches a part of the next weights, and the memory of
        the next outputs.

        packed: int32, per group of rows (steps / `LANE`, rows, `LANE`). weights: per panel (steps, its outputs,
        `together`), as bits. outputs: (rows, width), float32. scales: (rows,).
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

    packs = (
        packing("plain", _as_it_is),
        packing("normed", _normed),
        packing("silu", _gated_by(SILU)),
        packing("gelu", _gated_by(GELU)),
    )
    return Code(*packs, multiply)


@numba.njit(inline="always")
def _as_it_is(rows, others, number, begin, made):
    """Copy a row unchanged."""
    for at in range(len(made)):
        made[at] = rows[begin // len(made), at]


@numba.njit(inline="always")
def _normed(rows, weight, epsilon, begin, made):
    """Divide a row by its root mean square and multiply by weights (Zhang and Sennrich, arXiv 1910.07467)."""
    size = len(made)
    share = np.float32(1) / np.sqrt(squares(rows, begin, size) / np.float32(size) + epsilon)
    scaled(rows, begin, size, share, weight, made)


def _gated_by(curve: tuple[float, float]) -> Callable:
    """Return a function that computes g sigmoid(a g + b g^3) of a row of gates g, times the row of `others`."""
    gated = gate(*curve)

    @numba.njit(inline="always")
    def make(gates, others, number, begin, made):
        gated(gates, others, begin, len(made), made)

    return make


@numba.njit(inline="always")
def _height(left):
    """Return the height of the next tile for `left` remaining rows; the last two tiles are about equal."""
    if left >= 2 * HIGHEST:
        return HIGHEST
    return left if left <= HIGHEST else (left + 1) // 2


_HALVES = ir.VectorType(HALF, 32)


@intrinsic
def _save_twice(typing, numbers, at, scale, packed, to):
    """Write `LANE` scaled numbers to a packed array as float16, each of them twice in a row."""

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
    """Return an intrinsic that adds the products of a few rows with a panel of weights to outputs."""

    @intrinsic
    def add_tile(
        typing, height, some, packed, row, weights, weight, later, steps, outputs, output, width, scales, scale, keep
    ):
        """Add the products of `height` packed rows with `steps` x `some` weights, times the rows' scales, to outputs.

        Without `keep` outputs are overwritten.
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
                for line, beside in product(lines, range(wide, 2 * wide, FLOATS_A_LINE)):  # of the next panel
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
    """Return the sums of products of rows with weights, `vectors` per row, and prefetch later weights."""

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
    """Return a vector of sums after one more step: 32 float16 sums, or 16 float32 sums."""
    if kind is FLOAT16:
        return add_halves(builder, total, builder.bitcast(numbers, _HALVES), weights)
    return add_pairs(builder, total, numbers, builder.bitcast(weights, INTS))


def _add_scaled(builder, sums, scale, line, keep) -> None:
    """Add vectors, times a scale, to the float32 numbers at `line`; without `keep` overwrite them."""
    scales = each(builder, scale, 16)
    parts = [part for vector in sums for part in _in_float32(builder, vector)]
    for at, part in enumerate(parts):
        place = builder.bitcast(builder.gep(line, [LONG(16 * at)]), FLOATS.as_pointer())
        before = builder.select(keep, builder.load(place, align=4), same(0.0))
        added = call(builder, "fma", FLOATS, part, scales, before)
        builder.store(added, place, align=4)


def _in_float32(builder, vector) -> list:
    """Return a vector as vectors of 16 float32 numbers."""
    if vector.type == FLOATS:
        return [vector]
    halves = [ir.Constant(INTS, list(range(begin, begin + 16))) for begin in (0, 16)]
    nothing = ir.Constant(_HALVES, ir.Undefined)
    return [builder.fpext(builder.shuffle_vector(vector, nothing, half), FLOATS) for half in halves]
