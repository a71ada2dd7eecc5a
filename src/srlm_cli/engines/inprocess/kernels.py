"""Attention of one new token a row over keys and values in pages, on a processor, compiled by numba.

A page is read from memory once for all rows that see it. What a row has gathered from its pages so far is
rescaled whenever a larger score comes, which is exact (Milakov and Gimelshein, arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from srlm_cli.engines.inprocess.jit import jit
from srlm_cli.engines.inprocess.pages import PAGE

WIDTH = 16  # floats in a vector: one or several registers, as the processor has them
LOWEST = np.float32(-1e30)  # the score of a key that is not seen
LOG2_E = 1.4426950408889634
EXP2 = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2,
        2.402264791363012e-1, 6.931472028550421e-1, 1.0)  # fmt: skip
ONE = np.float32(1)
assert PAGE == 2 * WIDTH, "the scores of a page are two vectors"


def fits(size: int) -> bool:
    """Tell whether heads of a size can be computed here."""
    return size % WIDTH == 0


@cache
def compiled(heads: int, groups: int, size: int) -> tuple[Callable, Callable]:
    """Return `store` and `attend` for models of `heads` heads of keys and values, each asked by `groups` queries.

    All arrays are flat. keys: (pages, heads, size, PAGE), values: (pages, heads, PAGE, size), both float32, or
    bfloat16 as its bits in uint16.
    """
    page_size, shape = PAGE, f"{heads}_{groups}_{size}"

    @jit(shape)
    def store(keys, values, new_keys, new_values, slots):
        """Put the key and value, (rows, heads, size), of each row's token at its slot: page times PAGE plus offset."""
        for row in range(len(slots)):
            page, offset = divmod(slots[row], page_size)
            for head in range(heads):
                here, there = (row * heads + head) * size, (page * heads + head) * page_size * size
                for at in range(size):
                    keys[there + at * page_size + offset] = new_keys[here + at]
                    values[there + offset * size + at] = new_values[here + at]

    @jit(shape)
    def attend(queries, keys, values, spans, pages, rows, lowest, outputs, tops, sums):
        """Add to what rows have gathered what they see in spans of tokens, and divide by the sum of their weights.

        queries, outputs: (rows, heads x groups, size), float32, the queries scaled already. tops, sums: (rows,
        heads x groups), the largest score so far and the sum of the weights. spans: (spans, 6), of each where
        its pages begin and end in `pages` and its rows in `rows`, its tokens, and the position of the first.
        lowest: (rows,), the first position that a row sees.
        """
        weights = np.empty(page_size, np.float32)
        for span in range(len(spans)):
            first_page, last_page, first_row, last_row, count, start = spans[span]
            for at in range(first_page, last_page):
                begin = start + (at - first_page) * page_size
                filled = min(page_size, count - (at - first_page) * page_size)
                for head in range(heads):
                    there = (pages[at] * heads + head) * page_size * size
                    for place in range(first_row, last_row):
                        row = rows[place]
                        unseen = max(0, lowest[row] - begin)
                        if unseen >= filled:
                            continue
                        for group in range(groups):
                            query = (row * heads + head) * groups + group
                            first, second = _scores(queries, query * size, keys, there, size)
                            first = _within(first, unseen, filled)
                            second = _within(second, unseen - WIDTH, filled - WIDTH)
                            before = tops[query]
                            top = max(before, _largest(first, second))
                            rescaled = np.float32(np.exp(before - top)) if top > before else ONE
                            first, second = _exp_above(first, top), _exp_above(second, top)
                            _save(weights, 0, first)
                            _save(weights, WIDTH, second)
                            tops[query], sums[query] = top, sums[query] * rescaled + _sum(first, second)
                            _gather(weights, values, there, size, filled, rescaled, outputs, query * size)
        for query in range(len(sums)):
            share = ONE / sums[query]
            for at in range(query * size, (query + 1) * size):
                outputs[at] *= share

    return store, attend


# --- vectors ---------------------------------------------------------------------------------

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(_FLOAT, WIDTH), ir.VectorType(_INT, WIDTH)


class _Vector(types.Type):
    """`WIDTH` floats in registers. Compilers can't tell by themselves that the sums of a loop may stay there."""

    def __init__(self) -> None:
        super().__init__(name="Vector")


_vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, of) -> None:
        super().__init__(manager, of, _FLOATS)


def _address(context, builder, array_type, array, at, of):
    place = builder.gep(context.make_array(array_type)(context, builder, array).data, [at])
    return builder.bitcast(place, of.as_pointer())


@intrinsic
def _load(typing, array, at):
    """Return the vector at a place of an array."""

    def generate(context, builder, signature, arguments):
        if signature.args[0].dtype == types.float32:
            return builder.load(_address(context, builder, signature.args[0], *arguments, _FLOATS), align=4)
        halves = ir.VectorType(ir.IntType(16), WIDTH)  # bfloat16 is the upper half of a float32
        upper = builder.load(_address(context, builder, signature.args[0], *arguments, halves), align=2)
        shifted = builder.shl(builder.zext(upper, _INTS), ir.Constant(_INTS, [16] * WIDTH))
        return builder.bitcast(shifted, _FLOATS)

    return _vector(array, types.intp), generate


@intrinsic
def _save(typing, array, at, vector):
    """Put a vector at a place of an array."""

    def generate(context, builder, signature, arguments):
        array, at, vector = arguments
        builder.store(vector, _address(context, builder, signature.args[0], array, at, _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def _zeros(typing):
    return _vector(), lambda context, builder, signature, arguments: ir.Constant(_FLOATS, [0.0] * WIDTH)


@intrinsic
def _add_times(typing, total, number, vector):
    """Return total + number * vector."""

    def generate(context, builder, signature, arguments):
        total, number, vector = arguments
        return _call(builder, "fmuladd", _FLOATS, _each(builder, number), vector, total)

    return _vector(_vector, types.float32, _vector), generate


@intrinsic
def _within(typing, vector, begin, end):
    """Return a vector whose numbers outside of [begin, end) are `LOWEST`."""

    def generate(context, builder, signature, arguments):
        vector, begin, end = arguments
        begin, end = (_each(builder, builder.trunc(edge, _INT)) for edge in (begin, end))
        places = ir.Constant(_INTS, list(range(WIDTH)))
        inside = builder.and_(builder.icmp_signed(">=", places, begin), builder.icmp_signed("<", places, end))
        return builder.select(inside, vector, _all(LOWEST))

    return _vector(_vector, types.intp, types.intp), generate


@intrinsic
def _largest(typing, one, other):
    """Return the largest number of two vectors."""

    def generate(context, builder, signature, arguments):
        return _call(builder, "vector.reduce.fmax", _FLOAT, _call(builder, "maxnum", _FLOATS, *arguments))

    return types.float32(_vector, _vector), generate


@intrinsic
def _sum(typing, one, other):
    """Return the sum of all numbers of two vectors."""

    def generate(context, builder, signature, arguments):
        both = builder.fadd(*arguments)
        return _call(builder, "vector.reduce.fadd", _FLOAT, ir.Constant(_FLOAT, 0.0), both, fastmath=("reassoc",))

    return types.float32(_vector, _vector), generate


@intrinsic
def _exp_above(typing, vector, top):
    """Return exp(number - top) of each number, none of which is larger than `top`.

    It is a power of two, its nearest whole part put into the exponent's bits and the rest by a polynomial (the
    coefficients of Cephes' exp2f).
    """

    def generate(context, builder, signature, arguments):
        vector, top = arguments
        power = builder.fmul(builder.fsub(vector, _each(builder, top)), _all(LOG2_E))
        power = _call(builder, "maxnum", _FLOATS, power, _all(-126))
        whole = _call(builder, "floor", _FLOATS, builder.fadd(power, _all(0.5)))
        rest, result = builder.fsub(power, whole), _all(EXP2[0])
        for coefficient in EXP2[1:]:
            result = _call(builder, "fmuladd", _FLOATS, result, rest, _all(coefficient))
        exponent = builder.add(builder.fptosi(whole, _INTS), ir.Constant(_INTS, [127] * WIDTH))
        return builder.fmul(result, builder.bitcast(builder.shl(exponent, ir.Constant(_INTS, [23] * WIDTH)), _FLOATS))

    return _vector(_vector, types.float32), generate


def _all(number: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [float(np.float32(number))] * WIDTH)


def _each(builder, number):
    """Return a vector with a number in all places."""
    kind = ir.VectorType(number.type, WIDTH)
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, number, _INT(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(_INTS, [0] * WIDTH))


def _call(builder, name, result, *arguments, **options):
    """Call an operation of LLVM on vectors."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    operation = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{WIDTH}f32")
    return builder.call(operation, arguments, **options)


# --- the parts of attention ------------------------------------------------------------------


@numba.njit(fastmath=True, boundscheck=False, inline="always")
def _scores(queries, query, keys, there, size):
    """Return the scores of a page's keys as two vectors."""
    even, odd, even_behind, odd_behind = _zeros(), _zeros(), _zeros(), _zeros()
    for at in range(0, size, 2):
        key = there + at * PAGE
        one, other = queries[query + at], queries[query + at + 1]
        even = _add_times(even, one, _load(keys, key))
        even_behind = _add_times(even_behind, one, _load(keys, key + WIDTH))
        odd = _add_times(odd, other, _load(keys, key + PAGE))
        odd_behind = _add_times(odd_behind, other, _load(keys, key + PAGE + WIDTH))
    return _add_times(even, ONE, odd), _add_times(even_behind, ONE, odd_behind)


@numba.njit(fastmath=True, boundscheck=False, inline="always")
def _gather(weights, values, there, size, filled, rescaled, outputs, output):
    """Rescale an output, and add a page's values times their weights."""
    for column in range(0, size, WIDTH):
        value = there + column
        sums = _add_times(_zeros(), rescaled, _load(outputs, output + column))
        second, third, fourth = _zeros(), _zeros(), _zeros()
        for key in range(0, filled, 4):  # a page ends with keys that have no weight
            sums = _add_times(sums, weights[key], _load(values, value + key * size))
            second = _add_times(second, weights[key + 1], _load(values, value + (key + 1) * size))
            third = _add_times(third, weights[key + 2], _load(values, value + (key + 2) * size))
            fourth = _add_times(fourth, weights[key + 3], _load(values, value + (key + 3) * size))
        sums = _add_times(_add_times(sums, ONE, second), ONE, _add_times(third, ONE, fourth))
        _save(outputs, output + column, sums)
