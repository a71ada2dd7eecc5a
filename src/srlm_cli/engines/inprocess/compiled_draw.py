"""The draw of `nucleus` by compiled code, for logits in a processor's memory.

Every row stays in the cache while it is worked on: the weights of all tokens, and then those tokens that may be in
the nucleus, which alone are sorted.
"""

from __future__ import annotations

import numpy as np
import torch

from srlm_cli.engines.inprocess.jit import jit

LEAST = np.float32(2**-9)  # weight, of the most probable token's, down to which tokens are looked at first
NEXT = np.float32(2**-6)  # what this is multiplied by where those do not reach top-p
CHUNK = 512
LOG2_E = np.float32(1.4426950408889634)


def draw(logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return one token a row from its nucleus, as `nucleus.draw` does; float32, and no temperature of 0."""
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    weights, ids = np.empty(vocabulary, np.float32), np.empty(vocabulary, np.int64)
    tops = logits.amax(-1).numpy()
    settings = (of.contiguous().float().numpy() for of in (temperature, top_p, uniform))
    _draw(logits.contiguous().view(-1).numpy(), tops, *settings, weights, ids, tokens.numpy())
    return tokens


@jit()
def _draw(logits, tops, temperature, top_p, uniform, weights, ids, tokens):
    """Set the tokens of rows whose largest logits are `tops`; weights and ids, (vocabulary,), are to compute with."""
    vocabulary = len(weights)
    bits = np.empty(CHUNK, np.int32)
    powers = bits.view(np.float32)
    for row in range(len(tokens)):
        of_row, top = logits[row * vocabulary : (row + 1) * vocabulary], tops[row]
        # The weight of a token is exp((logit - top) / temperature): a power of two, its nearest whole part put into
        # the exponent's bits and the rest by a polynomial (the coefficients of Cephes' exp2f).
        scale = LOG2_E / temperature[row]
        total = 0.0
        for begin in range(0, vocabulary, CHUNK):
            some, of_some = of_row[begin : begin + CHUNK], weights[begin : begin + CHUNK]
            for at in range(len(some)):
                power = max((some[at] - top) * scale, np.float32(-126))
                whole = np.floor(power + np.float32(0.5))
                rest = power - whole
                bits[at] = (np.int32(whole) + np.int32(127)) << np.int32(23)
                weight = np.float32(1.535336188319500e-4)
                weight = weight * rest + np.float32(1.339887440266574e-3)
                weight = weight * rest + np.float32(9.618437357674640e-3)
                weight = weight * rest + np.float32(5.550332471162809e-2)
                weight = weight * rest + np.float32(2.402264791363012e-1)
                weight = weight * rest + np.float32(6.931472028550421e-1)
                of_some[at] = weight * rest + np.float32(1)
            sum_of_some = np.float32(0)
            for at in range(len(some)):
                of_some[at] *= powers[at]
                sum_of_some += of_some[at]
            total += sum_of_some

        whole = top_p[row] >= 1  # then what is less probable than the token that is drawn need not be known
        wanted = np.float64(uniform[row] if whole else top_p[row]) * total
        least = LEAST
        while True:
            found, mass = 0, 0.0
            for token in range(vocabulary):
                if weights[token] >= least:
                    ids[found] = token
                    found += 1
                    mass += weights[token]
            if mass >= wanted or least == 0:
                break
            least = least * NEXT if least > np.float32(1e-30) else np.float32(0)
        if found == 0:  # a broken model's logits are no numbers
            tokens[row] = 0
            continue

        candidates = weights[ids[:found]]
        order = np.argsort(-candidates, kind="mergesort")
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
