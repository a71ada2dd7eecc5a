"""Attention of one new token a row over keys and values in pages, on a processor, compiled by numba.

A page is read from memory once for all rows that see it. What a row has gathered from its pages so far is
rescaled whenever a larger score comes, which is exact (Milakov and Gimelshein, arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from srlm_cli.engines.inprocess.jit import jit
from srlm_cli.engines.inprocess.pages import PAGE
from srlm_cli.engines.inprocess.vectors import FLOAT, HALF, INT, LONG, address, call, each, loop, prefetch

WIDTH = 16  # floats in a vector: one or several registers, as the processor has them
LOWEST = np.float32(-1e30)  # the score of a key that is not seen
LEAST = -64  # the logarithm, base 2, of the least weight: nothing beside 1, and its products are no denormal numbers
LOG2_E = 1.4426950408889634
EXP2 = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2,
        2.402264791363012e-1, 6.931472028550421e-1, 1.0)  # fmt: skip
CACHE_LINE = 512  # bits
TOGETHER = 4  # queries of a head, and vectors of an output, that are computed side by side
assert PAGE == 2 * WIDTH, "the scores of a page are two vectors"


def fits(size: int) -> bool:
    """Tell whether heads of a size can be computed here."""
    return size % WIDTH == 0


@cache
def compiled(heads: int, groups: int, size: int) -> tuple[Callable, Callable]:
    """Return `store` and `attend` for models of `heads` heads of keys and values, each asked by `groups` queries.

    All arrays are flat. keys: (pages, heads, size, PAGE), values: (pages, heads, PAGE, size), both float32, or
    bfloat16 as its bits in uint16, or float16 as its bits in int16.
    """
    page_size, shape, add_page = PAGE, f"{heads}_{groups}_{size}", _page_adder(groups, size)

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
        weights = np.empty(groups * page_size, np.float32)
        for span in range(len(spans)):
            first_page, last_page, first_row, last_row, count, start = spans[span]
            for at in range(first_page, last_page):
                begin = start + (at - first_page) * page_size
                filled = min(page_size, count - (at - first_page) * page_size)
                following = pages[min(at + 1, len(pages) - 1)]
                for head in range(heads):
                    there = (pages[at] * heads + head) * page_size * size
                    later = there + page_size * size if head + 1 < heads else following * heads * page_size * size
                    for place in range(first_row, last_row):
                        row = rows[place]
                        unseen = max(0, lowest[row] - begin)
                        if unseen < filled:
                            query = (row * heads + head) * groups
                            add_page(
                                queries, query, keys, values, there, later, unseen, filled, weights, outputs, tops, sums
                            )
        for query in range(len(sums)):
            share = np.float32(1) / sums[query]
            for at in range(query * size, (query + 1) * size):
                outputs[at] *= share

    return store, attend


# --- a page of one head, seen by the queries of a row -----------------------------------------

_FLOATS, _INTS = ir.VectorType(FLOAT, WIDTH), ir.VectorType(INT, WIDTH)
_NUMBERS = {types.float32: FLOAT, types.int16: HALF, types.uint16: ir.IntType(16)}


def _page_adder(groups: int, size: int):
    """Return what adds to the outputs of the `groups` queries from `query` on what they see in the page at `there`.

    They see its keys from `unseen` on to before `filled`. `later` is the page that comes next, which memory is asked
    for. weights: (groups, PAGE), to compute with.
    """

    @intrinsic
    def add_page(typing, queries, query, keys, values, there, later, unseen, filled, weights, outputs, tops, sums):
        def generate(context, builder, signature, arguments):
            queries, query, keys, values, there, later, unseen, filled, weights, outputs, tops, sums = arguments

            def pointer(at: int, array, place, of=FLOAT):
                return address(context, builder, signature.args[at], array, place, of)

            stored = signature.args[2].dtype
            number = _NUMBERS[stored]
            first = builder.mul(query, LONG(size))
            queries, outputs = pointer(0, queries, first), pointer(9, outputs, first)
            weights, tops, sums = pointer(8, weights, LONG(0)), pointer(10, tops, query), pointer(11, sums, query)
            page = _Page(builder, number, CACHE_LINE // stored.bitwidth, size, unseen, filled)
            keys, later_keys = pointer(2, keys, there, number), pointer(2, keys, later, number)
            values, later_values = pointer(3, values, there, number), pointer(3, values, later, number)
            for begin in range(0, groups, TOGETHER):
                several = range(begin, min(begin + TOGETHER, groups))
                scores = page.scores(queries, several, keys, later_keys)
                shares = [
                    page.weigh(pair, weights, group, tops, sums) for pair, group in zip(scores, several, strict=True)
                ]
                page.gather(weights, several, shares, values, later_values, outputs)
            return context.get_dummy_value()

        place = types.intp
        arguments = (queries, place, keys, values, place, place, place, place, weights, outputs, tops, sums)
        return types.void(*arguments), generate

    return add_page


class _Page:
    """Writes the code that reads a page, of `size` numbers a token, for several queries at once."""

    def __init__(self, builder, number, a_line: int, size: int, unseen, filled) -> None:
        self.builder, self.number, self.size, self.unseen, self.filled = builder, number, size, unseen, filled
        self.a_line = a_line  # numbers that the cache loads together

    def scores(self, queries, several: range, keys, later) -> list[list]:
        """Return the scores of the page's keys, two vectors a query."""
        builder = self.builder

        def body(at, sums):
            for odd in range(2):
                line = builder.mul(builder.add(at, LONG(odd)), LONG(PAGE))
                self._prefetch(later, line, PAGE)
                pair = [self._numbers(keys, builder.add(line, LONG(half * WIDTH))) for half in range(2)]
                for nth, group in enumerate(several):
                    query = builder.gep(queries, [builder.add(at, LONG(group * self.size + odd))])
                    asked = each(builder, builder.load(query, align=4), WIDTH)
                    for half in range(2):
                        place = 4 * nth + 2 * odd + half
                        sums[place] = call(builder, "fmuladd", _FLOATS, asked, pair[half], sums[place])
            return sums

        sums = loop(builder, LONG(self.size), 2, [_all(0)] * 4 * len(several), body)
        even_and_odd = [
            [builder.fadd(sums[at + half], sums[at + 2 + half]) for half in range(2)] for at in range(0, len(sums), 4)
        ]
        return [[self._within(vector, half * WIDTH) for half, vector in enumerate(pair)] for pair in even_and_odd]

    def weigh(self, scores: list, weights, group: int, tops, sums):
        """Save the weights of the page's keys for a query; return what it gathered before is to be multiplied by."""
        builder = self.builder
        top_at, sum_at = (builder.gep(of, [LONG(group)]) for of in (tops, sums))
        before = builder.load(top_at, align=4)
        largest = call(builder, "vector.reduce.fmax", FLOAT, call(builder, "maxnum", _FLOATS, *scores))
        top = builder.select(builder.fcmp_ordered(">", largest, before), largest, before)
        rescaled = _exp_above(builder, each(builder, before, WIDTH), top)
        given = [_exp_above(builder, vector, top) for vector in scores]
        for half, vector in enumerate(given):
            builder.store(vector, self._at(weights, LONG(group * PAGE + half * WIDTH), _FLOATS), align=4)
        zero, both = ir.Constant(FLOAT, 0.0), builder.fadd(*given)
        total = call(builder, "vector.reduce.fadd", FLOAT, zero, both, fastmath=("reassoc",))
        factor = builder.extract_element(rescaled, INT(0))
        builder.store(builder.fadd(builder.fmul(builder.load(sum_at, align=4), factor), total), sum_at, align=4)
        builder.store(top, top_at, align=4)
        return rescaled

    def gather(self, weights, several: range, shares: list, values, later, outputs) -> None:
        """Rescale what queries have gathered, and add the page's values times their weights."""
        builder = self.builder
        for begin in range(0, self.size, TOGETHER * WIDTH):
            columns = range(begin, min(begin + TOGETHER * WIDTH, self.size), WIDTH)

            def places(columns=columns):
                return [self._at(outputs, LONG(group * self.size + at), _FLOATS) for group in several for at in columns]

            def body(key, sums, columns=columns):
                line = builder.mul(key, LONG(self.size))
                self._prefetch(later, builder.add(line, LONG(columns[0])), len(columns) * WIDTH)
                seen = [self._numbers(values, builder.add(line, LONG(at))) for at in columns]
                for nth, group in enumerate(several):
                    weight = builder.load(builder.gep(weights, [builder.add(key, LONG(group * PAGE))]), align=4)
                    weight = each(builder, weight, WIDTH)
                    for at, vector in enumerate(seen):
                        place = nth * len(seen) + at
                        sums[place] = call(builder, "fmuladd", _FLOATS, weight, vector, sums[place])
                return sums

            begun = [
                builder.fmul(builder.load(place, align=4), shares[at // len(columns)])
                for at, place in enumerate(places())
            ]
            for place, total in zip(places(), loop(builder, self.filled, 1, begun, body), strict=True):
                builder.store(total, place, align=4)

    def _prefetch(self, later, begin, count: int) -> None:
        for at in range(0, count, self.a_line):
            prefetch(self.builder, self.builder.gep(later, [self.builder.add(begin, LONG(at))]))

    def _numbers(self, numbers, place):
        """Return a vector of the page as float32."""
        builder = self.builder
        loaded = builder.load(self._at(numbers, place, ir.VectorType(self.number, WIDTH)), align=2)
        if self.number == FLOAT:
            return loaded
        if self.number == HALF:
            return builder.fpext(loaded, _FLOATS)
        shifted = builder.shl(builder.zext(loaded, _INTS), ir.Constant(_INTS, [16] * WIDTH))
        return builder.bitcast(shifted, _FLOATS)  # bfloat16 is the upper half of a float32

    def _at(self, numbers, place, of):
        return self.builder.bitcast(self.builder.gep(numbers, [place]), of.as_pointer())

    def _within(self, scores, begin: int):
        """Return scores of keys from `begin` on, in which those that are not seen are `LOWEST`."""
        builder = self.builder
        first, last = (each(builder, builder.trunc(edge, INT), WIDTH) for edge in (self.unseen, self.filled))
        places = ir.Constant(_INTS, list(range(begin, begin + WIDTH)))
        inside = builder.and_(builder.icmp_signed(">=", places, first), builder.icmp_signed("<", places, last))
        return builder.select(inside, scores, _all(LOWEST))


def _exp_above(builder, vector, top):
    """Return exp(number - top) of each number, none of which is larger than `top`.

    It is a power of two, its nearest whole part put into the exponent's bits and the rest by a polynomial (the
    coefficients of Cephes' exp2f).
    """
    power = builder.fmul(builder.fsub(vector, each(builder, top, WIDTH)), _all(LOG2_E))
    power = call(builder, "maxnum", _FLOATS, power, _all(LEAST))
    whole = call(builder, "floor", _FLOATS, builder.fadd(power, _all(0.5)))
    rest, result = builder.fsub(power, whole), _all(EXP2[0])
    for coefficient in EXP2[1:]:
        result = call(builder, "fmuladd", _FLOATS, result, rest, _all(coefficient))
    exponent = builder.add(builder.fptosi(whole, _INTS), ir.Constant(_INTS, [127] * WIDTH))
    return builder.fmul(result, builder.bitcast(builder.shl(exponent, ir.Constant(_INTS, [23] * WIDTH)), _FLOATS))


def _all(number: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [float(np.float32(number))] * WIDTH)
