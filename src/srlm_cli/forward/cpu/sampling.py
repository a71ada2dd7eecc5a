"""Top-p sampling by compiled code, for logits in CPU memory.

A row stays in the cache while it is processed. First the weights of all tokens are computed. Then only the tokens that
can be in the nucleus are sorted.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic

from srlm_cli.forward.cpu.jit import jit
from srlm_cli.forward.cpu.llvm import FLOAT, FLOATS, address, call, each, exp2, largest, loop, same, sum_of, vector_at

LEAST = np.float32(2**-9)  # tokens with at least this weight, relative to the largest, are tried first
NEXT = np.float32(2**-6)  # factor of this limit if these tokens do not reach top-p
CHUNK = 256
HUGE = np.float32(1e30)
MARGIN = np.float32(0.01)  # more than the rounding error of exp2
LOG2_E = np.float32(1.4426950408889634)


def draw(logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return one token per row from its nucleus, as `engines.hf.sampling.draw` does; float32, temperature above 0."""
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    weights, ids = np.empty(vocabulary, np.float32), np.empty(vocabulary, np.int64)
    settings = (of.contiguous().float().numpy() for of in (temperature, top_p, uniform))
    _draw(logits.contiguous().numpy(), *settings, weights, ids, tokens.numpy())
    return tokens


@jit()
def _draw(logits, temperature, top_p, uniform, weights, ids, tokens):
    """Set the token of each row; weights and ids, (vocabulary,), are scratch.

    Numbers are copied one by one: numba compiles a copy of a slice for two seconds, with the text of its error.
    """
    vocabulary = len(weights)
    tops = np.empty(-(-vocabulary // CHUNK), np.float32)  # the largest logit of each chunk
    rest, of_rest = np.empty((2, CHUNK), np.float32)
    for row in range(len(tokens)):
        of_row = logits[row]
        for chunk in range(len(tops)):
            tops[chunk] = _top(of_row[chunk * CHUNK : (chunk + 1) * CHUNK])
        top = tops[0]
        for chunk in range(1, len(tops)):
            top = max(top, tops[chunk])
        if not abs(top) < HUGE:  # logits of a broken model: NaN or infinity
            tokens[row] = 0
            continue
        # The weight of a token is exp((logit - top) / temperature), by a power of two.
        scale, total = LOG2_E / temperature[row], 0.0
        for begin in range(0, vocabulary, CHUNK):
            count = min(CHUNK, vocabulary - begin)
            if count % 16:  # the last chunk, padded with logits of negligible weight
                for at in range(CHUNK):
                    rest[at] = of_row[begin + at] if at < count else top - np.float32(200) / scale
                total += _weigh(rest, 0, -(-count // 16) * 16, top, scale, of_rest, 0)
                for at in range(count):
                    weights[begin + at] = of_rest[at]
            else:
                total += _weigh(of_row, begin, count, top, scale, weights, begin)

        whole = top_p[row] >= 1  # then tokens less probable than the result are not needed
        wanted = np.float64(uniform[row] if whole else top_p[row]) * total
        least = LEAST
        while True:
            found, mass = 0, 0.0
            lowest = top + (np.log2(least) - MARGIN) / scale  # smaller logits have less weight
            for chunk in range(len(tops)):
                if tops[chunk] >= lowest or least == 0:
                    for token in range(chunk * CHUNK, min(vocabulary, (chunk + 1) * CHUNK)):
                        if weights[token] >= least:
                            ids[found] = token
                            found += 1
                            mass += weights[token]
            if mass >= wanted or least == 0:
                break
            least = least * NEXT if least > np.float32(1e-30) else np.float32(0)

        candidates, negative = np.empty((2, found), np.float32)
        for at in range(found):
            candidates[at] = weights[ids[at]]
            negative[at] = -candidates[at]
        order = np.argsort(negative, kind="mergesort")
        size, mass = 0, np.float64(candidates[order[0]])
        while mass < wanted and size < found - 1:
            size += 1
            mass += candidates[order[size]]
        drawn = wanted if whole else np.float64(uniform[row]) * mass
        size = found - 1 if whole else size
        at, mass = 0, np.float64(candidates[order[0]])
        while mass <= drawn and at < size:
            at += 1
            mass += candidates[order[at]]
        tokens[row] = ids[order[at]]


@numba.njit(inline="always")
def _top(logits):
    """Return the largest of some logits."""
    whole = len(logits) // 16 * 16
    top = largest(logits, 0, whole) if whole else logits[0]
    for at in range(whole, len(logits)):
        top = max(top, logits[at])
    return top


@intrinsic
def _weigh(typing, logits, begin, count, top, scale, weights, to):
    """Set the weights of `count` logits, a multiple of 16: 2 to the power of scale (logit - top). Return their sum."""

    def generate(context, builder, signature, arguments):
        logits, begin, count, top, scale, weights, to = arguments
        first = address(context, builder, signature.args[0], logits, begin, FLOAT)
        target = address(context, builder, signature.args[5], weights, to, FLOAT)
        tops, scales = each(builder, top, 16), each(builder, scale, 16)

        def body(step, sums):
            above = builder.fsub(builder.load(vector_at(builder, first, step), align=4), tops)
            power = call(builder, "maxnum", FLOATS, builder.fmul(above, scales), same(-125.0))
            weight = exp2(builder, power)
            builder.store(weight, vector_at(builder, target, step), align=4)
            return [builder.fadd(sums[0], weight)]

        (sums,) = loop(builder, count, 16, [same(0.0)], body)
        return sum_of(builder, sums)

    at, number = types.intp, types.float32
    return number(logits, at, at, number, number, weights, at), generate
