"""Paged attention kernels for a CPU, compiled by numba; each row is the query token of one sequence.

A block is read from memory once for all rows that see it, row after row. In bfloat16 the processor adds pairs of
products, so two numbers of a key, and the values of two keys, are stored next to each other. The output of a row so far
is rescaled when a larger score comes, which is exact (Milakov and Gimelshein, arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from srlm_cli.forward.cpu.jit import jit
from srlm_cli.forward.cpu.llvm import (
    FLOAT,
    FLOATS,
    HALF,
    INT,
    INTS,
    LOG2_E,
    LONG,
    SHORTS,
    add_pairs,
    address,
    as_bfloat,
    call,
    each,
    exp2,
    largest_of,
    loop,
    prefetch,
    same,
    save_pairs,
    sum_of,
)
from srlm_cli.forward.kv_cache import BLOCK_SIZE

WIDTH = 16  # floats per vector, which is one register or several
LOWEST = np.float32(-1e30)  # the score of a masked key
LEAST = -64  # log2 of the least weight: negligible, but its products are not denormal
CACHE_LINE = 512  # bits
TOGETHER = 6  # queries of a head per pass over a block: each vector of the block is loaded once for all
COLUMNS = 4  # vectors of an output per pass
VECTORS = BLOCK_SIZE // WIDTH  # vectors of scores per block


def fits(size: int) -> bool:
    """Return whether the kernels support this head size."""
    return size % WIDTH == 0


@cache
def storing(heads: int, size: int, paired: bool) -> Callable:
    """Return the function `store` for a model with this number of key-value heads and this head size.

    stored, flat: (blocks, heads, 2, size x BLOCK_SIZE). The third axis is keys, then values. Keys of a block and head
    are (size, BLOCK_SIZE), values are (BLOCK_SIZE, size); the type is float32, or float16 as its bits in int16. If
    `paired`, the type is bfloat16 as its bits in uint16, and the shapes are (size / 2, BLOCK_SIZE, 2) and
    (BLOCK_SIZE / 2, size, 2).
    """

    @jit(f"{heads}_{size}_{paired}_{BLOCK_SIZE}")
    def store(stored, keys, values, tokens, slots):
        """Store keys and values, (tokens, heads x size), float32, of the given tokens at slots."""
        made, near = np.empty(size, stored.dtype), 2 if paired else 1
        for at in range(len(slots)):
            for head in range(heads):
                _put(keys, values, tokens[at] * heads + head, stored, slots[at], heads, head, size, near, made)

    return store


@numba.njit(inline="always")
def _put(keys, values, begin, stored, slot, heads, head, size, near, made):
    """Store key and value of a token's head at a slot: block x BLOCK_SIZE + offset. made: (size,), scratch."""
    block, offset = divmod(slot, BLOCK_SIZE)
    there, above, beside = (block * heads + head) * 2 * BLOCK_SIZE * size, offset // near, offset % near
    _as_stored(keys, begin * size, made)
    for at in range(size // near):
        for one in range(near):
            stored[there + (at * BLOCK_SIZE + offset) * near + one] = made[at * near + one]
    _as_stored(values, begin * size, made)
    value = there + BLOCK_SIZE * size + above * size * near + beside
    for at in range(size):
        stored[value + at * near] = made[at]


@numba.njit(inline="always")
def _as_stored(numbers, begin, made):
    for at in range(0, len(made), WIDTH):
        _round(numbers, begin + at, made, at)


@cache
def attending(heads: int, groups: int, size: int, paired: bool) -> Callable:
    """Return the function `attend` for a model with `groups` query heads per key-value head."""
    block_size, both, together, near = BLOCK_SIZE, 2 * BLOCK_SIZE * size, max(1, TOGETHER // groups), 2 if paired else 1
    add_page, add_page_alone = _page_adder(groups, size, together), _page_adder(groups, size, 1)
    scaled = _paired_queries if paired else _queries

    @jit(f"{heads}_{groups}_{size}_{paired}_{BLOCK_SIZE}")
    def attend(asked, scaling, stored, keys, values, slots, spans, blocks, rows, lowest, highest, outputs):
        """Set the attention outputs of rows over the tokens that they see in spans.

        New tokens, one per row, are stored first, as `store` does; they are the last tokens of the last spans. `slots`
        has their slots and can be empty.

        asked, outputs: (rows, heads x groups x size), float32. spans: (spans, 6): first and end index in `blocks`,
        first and end index in `rows`, number of tokens, position of the first token. lowest, highest: (rows,), the
        first and the last position that a row sees.
        """
        queries, gathered = scaled(asked.reshape(-1), scaling), outputs.reshape(-1)
        tops = np.full(len(gathered) // size, LOWEST, np.float32)  # the largest score of each query so far
        sums = np.zeros(len(tops), np.float32)  # of the weights of each query
        gathered[:] = np.float32(0)
        made, first_own = np.empty(size, stored.dtype), len(spans) - len(slots)
        weights = np.empty(together * groups * block_size, np.float32)
        queries_of = np.empty(together, np.int64)
        unseen, seen = np.empty(together, np.int64), np.empty(together, np.int64)
        for span in range(len(spans)):
            first_block, last_block, first_row, last_row, count, start = spans[span]
            for at in range(first_block, last_block):
                begin = start + (at - first_block) * block_size
                filled = min(block_size, count - (at - first_block) * block_size)
                following = blocks[min(at + 1, len(blocks) - 1)]
                for head in range(heads):
                    there = (blocks[at] * heads + head) * both
                    later = there + both if head + 1 < heads else following * heads * both
                    if span >= first_own and at + 1 == last_block:
                        own = span - first_own
                        _put(keys, values, own * heads + head, stored, slots[own], heads, head, size, near, made)
                    found, read = 0, 0
                    for place in range(first_row, last_row):
                        row = rows[place]
                        queries_of[found] = (row * heads + head) * groups
                        unseen[found] = max(0, lowest[row] - begin)
                        seen[found] = min(filled, highest[row] - begin + 1)
                        if unseen[found] < seen[found]:
                            read = max(read, seen[found])
                            found += 1
                        if found == together:
                            found = 0
                            add_page(
                                queries,
                                queries_of,
                                0,
                                unseen,
                                seen,
                                stored,
                                there,
                                later,
                                read,
                                weights,
                                gathered,
                                tops,
                                sums,
                            )
                            read = 0
                    for one in range(found):
                        add_page_alone(
                            queries,
                            queries_of,
                            one,
                            unseen,
                            seen,
                            stored,
                            there,
                            later,
                            seen[one],
                            weights,
                            gathered,
                            tops,
                            sums,
                        )
        for query in range(len(sums)):
            share = np.float32(1) / sums[query]
            for at in range(query * size, (query + 1) * size):
                gathered[at] *= share

    return attend


@numba.njit(inline="always")
def _queries(asked, scaling):
    """Return queries times `scaling`, float32."""
    return asked * scaling


@numba.njit(inline="always")
def _paired_queries(asked, scaling):
    """Return queries times `scaling` as bfloat16, two per int32."""
    queries = np.empty(len(asked) // 2, np.int32)
    for at in range(0, len(asked), WIDTH):
        save_pairs(asked, at, scaling, queries, at // 2)
    return queries


@intrinsic
def _round(typing, numbers, at, to, place):
    """Convert 16 float32 numbers from index `at` to the stored type and write them at index `place`."""

    def generate(context, builder, signature, arguments):
        numbers, at, to, place = arguments
        loaded = builder.load(address(context, builder, signature.args[0], numbers, at, FLOATS), align=4)
        number = _NUMBERS[signature.args[2].dtype]
        if number == HALF:
            loaded = builder.fptrunc(loaded, ir.VectorType(HALF, WIDTH))
        elif number != FLOAT:
            loaded = as_bfloat(builder, loaded)
        builder.store(loaded, address(context, builder, signature.args[2], to, place, loaded.type), align=2)
        return context.get_dummy_value()

    return types.void(numbers, types.intp, to, types.intp), generate


# --- one block of one head, for the queries of several rows ------------------------------------

_NUMBERS = {types.float32: FLOAT, types.int16: HALF, types.uint16: ir.IntType(16)}


def _page_adder(groups: int, size: int, together: int):
    """Return an intrinsic that adds the block at index `there` to the outputs of the queries of `together` rows.

    `queries_of[place]` and the following entries are the first queries of these rows; each row has `groups` of them.
    A row sees the keys from `unseen` to `seen - 1` of the block; the first `read` keys are read. `later` is the next
    block, which is prefetched. weights: (together x groups, BLOCK_SIZE), scratch.
    """

    @intrinsic
    def add_page(
        typing, queries, queries_of, place, unseen, seen, stored, there, later, read, weights, outputs, tops,
        sums,
    ):  # fmt: skip
        paired = stored.dtype == types.uint16

        def generate(context, builder, signature, arguments):
            (queries, queries_of, place, unseen, seen, stored, there, later, read, weights, outputs, tops,
             sums) = arguments  # fmt: skip

            def pointer(at: int, array, place, of=FLOAT):
                return address(context, builder, signature.args[at], array, place, of)

            def query_of(row: int, group: int) -> _Query:
                at = builder.add(place, LONG(row))
                nth = builder.add(builder.load(pointer(1, queries_of, at, LONG), align=8), LONG(group))
                first = builder.mul(nth, LONG(size))
                asked = builder.mul(nth, LONG(size // 2)) if paired else first
                return _Query(
                    pointer(0, queries, asked, INT if paired else FLOAT),
                    builder.load(pointer(3, unseen, at, LONG), align=8),
                    builder.load(pointer(4, seen, at, LONG), align=8),
                    pointer(9, weights, LONG((row * groups + group) * BLOCK_SIZE)),
                    pointer(10, outputs, first),
                    pointer(11, tops, nth),
                    pointer(12, sums, nth),
                )

            number = _NUMBERS[signature.args[5].dtype]
            keys, later_keys = pointer(5, stored, there, number), pointer(5, stored, later, number)
            values, later_values = (builder.gep(of, [LONG(size * BLOCK_SIZE)]) for of in (keys, later_keys))
            asking = [query_of(row, group) for row in range(together) for group in range(groups)]
            runs = -(-len(asking) // TOGETHER)
            done = builder.append_basic_block("done")
            chosen = builder.switch(builder.udiv(builder.add(read, LONG(WIDTH - 1)), LONG(WIDTH)), done)
            for vectors in range(1, VECTORS + 1):
                case = builder.append_basic_block(f"read{vectors}")
                chosen.add_case(LONG(vectors), case)
                builder.position_at_end(case)
                block = (_PairedBlock if paired else _Block)(builder, number, size, vectors)
                for run in range(runs):
                    some = asking[len(asking) * run // runs : len(asking) * (run + 1) // runs]
                    scores = block.scores(some, keys, later_keys)
                    shares = block.weigh(scores, some)
                    block.gather(some, shares, values, later_values, read)
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        numbers = (queries, queries_of, types.intp, unseen, seen, stored, types.intp, types.intp, types.intp)
        return types.void(*numbers, weights, outputs, tops, sums), generate

    return add_page


@dataclass(frozen=True)
class _Query:
    """Pointers to a query and to its results; it sees the keys `unseen` to `seen - 1` of the block."""

    asked: ir.Value
    unseen: ir.Value
    seen: ir.Value
    weights: ir.Value
    output: ir.Value
    top: ir.Value
    sum: ir.Value


class _Block:
    """Generates code for several queries that reads `vectors` vectors of a block's keys, of head size `size`."""

    near = 1  # numbers of a key, and values of a component, that one instruction multiplies

    def __init__(self, builder, number, size: int, vectors: int) -> None:
        self.builder, self.number, self.size, self.vectors = builder, number, size, vectors
        bits = {FLOAT: 32}.get(number, 16)
        self.a_line = CACHE_LINE // (bits * self.near)  # elements per cache line

    def scores(self, queries: list[_Query], keys, later) -> list[list]:
        """Return the scores of the keys: for each query a list of vectors."""
        builder, vectors = self.builder, self.vectors

        def body(at, sums):
            line = builder.mul(at, LONG(BLOCK_SIZE))
            self._prefetch(later, line, vectors * WIDTH)
            seen = [self._numbers(keys, builder.add(line, LONG(nth * WIDTH))) for nth in range(vectors)]
            for nth, query in enumerate(queries):
                asked = each(builder, builder.load(builder.gep(query.asked, [at]), align=4), WIDTH)
                for place, vector in enumerate(seen, nth * vectors):
                    sums[place] = self._add(sums[place], asked, vector)
            return sums

        steps = LONG(self.size // self.near)
        sums = loop(builder, steps, 1, [same(0)] * vectors * len(queries), body)
        return [
            [self._within(sums[nth * vectors + at], query, at * WIDTH) for at in range(vectors)]
            for nth, query in enumerate(queries)
        ]

    def weigh(self, scores: list[list], queries: list[_Query]) -> list:
        """Save the weights of the block's keys; return the factor for the earlier output of each query."""
        builder = self.builder
        before = [builder.load(query.top, align=4) for query in queries]
        tops = []
        for vectors, top in zip(scores, before, strict=True):
            largest = reduce(lambda one, other: call(builder, "maxnum", FLOATS, one, other), vectors)
            largest = largest_of(builder, largest)
            tops.append(builder.select(builder.fcmp_ordered(">", largest, top), largest, top))
        given = [[_exp_above(builder, vector, top) for vector in of] for of, top in zip(scores, tops, strict=True)]
        shares = self._shares(before, tops)
        for query, vectors, top, share in zip(queries, given, tops, shares, strict=True):
            self._save(vectors, query.weights)
            before_now = builder.fmul(builder.load(query.sum, align=4), share)
            total = builder.fadd(before_now, sum_of(builder, reduce(builder.fadd, vectors)))
            builder.store(total, query.sum, align=4)
            builder.store(top, query.top, align=4)
        return [each(builder, share, WIDTH) for share in shares]

    def _shares(self, before: list, tops: list) -> list:
        """Return exp(before - top) of each query, computed in one vector."""
        builder, lower = self.builder, same(0)
        for at, (one, top) in enumerate(zip(before, tops, strict=True)):
            lower = builder.insert_element(lower, builder.fsub(one, top), INT(at))
        raised = _exp_above(builder, lower, ir.Constant(FLOAT, 0.0))
        return [builder.extract_element(raised, INT(at)) for at in range(len(tops))]

    def gather(self, queries: list[_Query], shares: list, values, later, read) -> None:
        """Rescale the outputs of queries, and add the first `read` values of the block times their weights."""
        builder = self.builder
        for begin in range(0, self.size, COLUMNS * WIDTH):
            columns = range(begin, min(begin + COLUMNS * WIDTH, self.size), WIDTH)

            def body(key, sums, columns=columns):
                line = builder.mul(key, LONG(self.size))
                self._prefetch(later, builder.add(line, LONG(columns[0])), len(columns) * WIDTH)
                seen = [self._numbers(values, builder.add(line, LONG(at))) for at in columns]
                for nth, query in enumerate(queries):
                    weight = each(builder, self._weight(query.weights, key), WIDTH)
                    for at, vector in enumerate(seen):
                        place = nth * len(seen) + at
                        sums[place] = self._add(sums[place], weight, vector)
                return sums

            places = [self._at(query.output, LONG(at), FLOATS) for query in queries for at in columns]
            begun = [
                builder.fmul(builder.load(place, align=4), shares[at // len(columns)])
                for at, place in enumerate(places)
            ]
            steps = builder.udiv(builder.add(read, LONG(self.near - 1)), LONG(self.near))
            for place, total in zip(places, loop(builder, steps, 1, begun, body), strict=True):
                builder.store(total, place, align=4)

    def _prefetch(self, later, begin, count: int) -> None:
        for at in range(0, count, self.a_line):
            place = self.builder.mul(self.builder.add(begin, LONG(at)), LONG(self.near))
            prefetch(self.builder, self.builder.gep(later, [place]))

    def _numbers(self, numbers, place):
        """Return a vector of the block as float32."""
        builder = self.builder
        loaded = builder.load(self._at(numbers, place, ir.VectorType(self.number, WIDTH)), align=2)
        return loaded if self.number == FLOAT else builder.fpext(loaded, FLOATS)

    def _add(self, sums, one, other):
        """Return sums plus the products of two vectors."""
        return call(self.builder, "fmuladd", FLOATS, one, other, sums)

    def _save(self, weights: list, to) -> None:
        for half, vector in enumerate(weights):
            self.builder.store(vector, self._at(to, LONG(half * WIDTH), FLOATS), align=4)

    def _weight(self, weights, key):
        return self.builder.load(self.builder.gep(weights, [key]), align=4)

    def _at(self, numbers, place, of):
        return self.builder.bitcast(self.builder.gep(numbers, [place]), of.as_pointer())

    def _within(self, scores, query: _Query, begin: int):
        """Return the scores of the keys from `begin`, with `LOWEST` for keys that the query does not see."""
        builder = self.builder
        first, last = (each(builder, builder.trunc(edge, INT), WIDTH) for edge in (query.unseen, query.seen))
        places = ir.Constant(INTS, list(range(begin, begin + WIDTH)))
        inside = builder.and_(builder.icmp_signed(">=", places, first), builder.icmp_signed("<", places, last))
        return builder.select(inside, scores, same(LOWEST))


class _PairedBlock(_Block):
    """A block in bfloat16, whose numbers are multiplied in pairs."""

    near = 2

    def _numbers(self, numbers, place):
        """Return a vector of 16 pairs of the block."""
        place = self.builder.mul(place, LONG(self.near))
        return self.builder.load(self._at(numbers, place, INTS), align=2)

    def _add(self, sums, one, other):
        return add_pairs(self.builder, sums, one, other)

    def _save(self, weights: list, to) -> None:
        builder = self.builder
        for half, vector in enumerate(weights):
            builder.store(as_bfloat(builder, vector), self._at(to, LONG(half * WIDTH // 2), SHORTS), align=4)

    def _weight(self, weights, key):
        place = self.builder.gep(weights, [key])
        return self.builder.load(self.builder.bitcast(place, INT.as_pointer()), align=4)


def _exp_above(builder, vector, top):
    """Return exp(number - top) of each number; no number is larger than `top`."""
    base = each(builder, builder.fmul(top, ir.Constant(FLOAT, -LOG2_E)), WIDTH)
    power = call(builder, "fmuladd", FLOATS, vector, same(LOG2_E), base)
    return exp2(builder, call(builder, "maxnum", FLOATS, power, same(LEAST)))
