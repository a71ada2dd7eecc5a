"""Attention of the rows of a training pass: rows of similar length side by side, each with all of its tokens.

A call and three slices per row, as in `forward.attention`, would make a gradient of the size of the whole pass for each
slice.

This module imports torch and is itself imported late.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from srlm_cli.forward.prefix import CachedPrefix

ALIKE = 2 / 3  # of the longest row: shorter rows are not side by side with it
SHORT = 128  # tokens; in shorter rows a CPU's attention takes longer in bfloat16 than in float32

Place = tuple[int, int]  # a row, and a token in it
Piece = tuple[Place, Place, int]  # tokens from one place to another, and their number


class RowsPass:
    """A pass over the tokens of texts; each sees its prefix and what comes before in itself.

    The arithmetic is the same with and without a gradient, so that a model equals its own reference to the last bit.
    """

    def __init__(self, texts: list[CachedPrefix]) -> None:
        begins = [0, *accumulate(len(text.fresh) for text in texts)]
        self.begin = {id(text): begin for text, begin in zip(texts, begins, strict=False)}
        self.total = begins[-1]
        self.groups = list(alike(texts))

    def attend(self, layer: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        """Return what tokens get in a layer, (1, tokens, heads, size); the others are (1, heads, tokens, size)."""
        repeats = query.shape[1] // key.shape[1]
        output = sum(self._attend(group, query, key, value, repeats, scaling, window) for group in self.groups)
        return output.transpose(1, 2)

    def _attend(self, texts, query, key, value, repeats: int, scaling: float, window: int | None) -> torch.Tensor:
        """Return what the tokens of some texts get, (1, heads, tokens, size), 0 for the others."""
        longest = len(texts[0].tokens)
        short = longest <= SHORT
        pieces = [piece for row, text in enumerate(texts) for piece in self._pieces(row, text, len(text.tokens))]
        ends = [((row, text.shared), (0, self.begin[id(text)]), len(text.fresh)) for row, text in enumerate(texts)]

        def rows(packed: torch.Tensor) -> torch.Tensor:
            dtype = torch.float32 if short else packed.dtype
            return Moved.apply(packed, pieces, (len(texts), packed.shape[1], longest, packed.shape[3]), dtype)

        keys, values = rows(key).repeat_interleave(repeats, 1), rows(value).repeat_interleave(repeats, 1)
        mask = None if window is None or window >= longest else within(window, longest)
        with torch.autocast("cpu", enabled=not short and torch.is_autocast_enabled("cpu")):
            found = scaled_dot_product_attention(
                rows(query), keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling
            )
        return Moved.apply(found, ends, (1, found.shape[1], self.total, found.shape[3]), found.dtype)

    def _pieces(self, row: int, text: CachedPrefix, end: int) -> Iterator[Piece]:
        """Yield where the first `end` tokens of a text are in the pass, and in a row of their own."""
        if text.prefix:
            yield from self._pieces(row, text.prefix, min(text.shared, end))
        if end > text.shared:
            yield (0, self.begin[id(text)]), (row, text.shared), end - text.shared


class Moved(torch.autograd.Function):
    """Tokens moved to other rows. The gradients of a token that is moved to several places are added."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, pieces: list[Piece], shape: tuple[int, ...], dtype) -> torch.Tensor:
        """Return (rows, heads, tokens, size), zero where nothing is moved to."""
        ctx.pieces, ctx.shape, ctx.dtype = pieces, source.shape, source.dtype
        return moved(source, pieces, shape, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Move the gradient back."""
        return moved(gradient, [(there, here, n) for here, there, n in ctx.pieces], ctx.shape, ctx.dtype), *[None] * 3


def moved(source: torch.Tensor, pieces: list[Piece], shape: tuple[int, ...], dtype) -> torch.Tensor:
    """Return the pieces of `source`, (rows, heads, tokens, size), at their places in a tensor of another shape."""
    target = source.new_zeros(shape, dtype=dtype)
    for (row, at), (to, place), count in pieces:
        target[to, :, place : place + count] += source[row, :, at : at + count]
    return target


def alike(texts: list[CachedPrefix]) -> Iterator[list[CachedPrefix]]:
    """Yield groups of texts of similar length, longest first."""
    some: list[CachedPrefix] = []
    for text in sorted(texts, key=lambda text: -len(text.tokens)):
        if some and len(text.tokens) < ALIKE * len(some[0].tokens):
            yield some
            some = []
        some.append(text)
    if some:
        yield some


def within(window: int, length: int) -> torch.Tensor:
    """Return which keys a token sees, (length, length): itself and the `window` - 1 before it."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return seen.triu(1 - window)
