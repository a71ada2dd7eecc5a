"""Keys and values of many rows in blocks of one store, written in place and never copied to grow.

A row's own blocks are taken from the low end, those that several rows share from the high end, so
that each kind lies together and can be read as one slice. A hole between blocks in use is then read
for nothing: `compact` fills holes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from heapq import heappop, heappush

import torch

from srlm_cli.forward import memory

BLOCK_SIZE = 64  # tokens


def blocks_for(tokens: int) -> int:
    """Return the number of blocks for a number of tokens."""
    return -(-tokens // BLOCK_SIZE)


class OutOfBlocks(Exception):
    """All blocks are taken."""


@dataclass(frozen=True)
class Span:
    """Tokens in blocks, in order: `count` of them, the first at position `start` of the rows that see it."""

    blocks: list[int]
    count: int
    start: int
    rows: list[int]

    @property
    def last_position(self) -> int:
        return self.start + self.count - 1

    @property
    def last_slot(self) -> int:
        """Where the last token lies in the store: block times `BLOCK_SIZE` plus offset."""
        block, offset = divmod(self.count - 1, BLOCK_SIZE)
        return self.blocks[block] * BLOCK_SIZE + offset


class PagedKVCache:
    """A store of `count` blocks of `BLOCK_SIZE` tokens for each attention layer.

    `layers` gives the shapes of one token's key and value, (heads, size) each, by layer. Keys lie as
    (blocks, heads, size, BLOCK_SIZE), so that a query's product with all keys of a block runs along memory;
    values as (blocks, heads, BLOCK_SIZE, size). Where both have the same shape, on a processor, they are parts
    of one store, (blocks, heads, 2, size x BLOCK_SIZE): a block is read from one end to the other.
    """

    def __init__(
        self, layers: dict[int, tuple[torch.Size, torch.Size]], count: int, dtype: torch.dtype, device: str
    ) -> None:
        self.layers, self.count, self.dtype, self.device = layers, count, dtype, device
        self.keys, self.values, self.both = {}, {}, {}
        self._stores: list[torch.Tensor] = []  # all of them, by blocks
        for layer, ((heads, key_size), (_, value_size)) in layers.items():
            if device == "cpu" and key_size == value_size:
                both = self.both[layer] = _zeros((count, heads, 2, key_size * BLOCK_SIZE), dtype, device)
                keys, values = both.unbind(2)
                self._stores.append(both)
            else:
                keys = _zeros((count, heads, key_size * BLOCK_SIZE), dtype, device)
                values = _zeros((count, heads, value_size * BLOCK_SIZE), dtype, device)
                self._stores += [keys, values]
            self.keys[layer] = keys.unflatten(2, (key_size, BLOCK_SIZE))
            self.values[layer] = values.unflatten(2, (BLOCK_SIZE, value_size))
        self.low, self.high = 0, count  # own blocks lie in [0, low), shared ones in [high, count)
        self._clean = [0, count]  # between these no block was ever taken
        self._low_holes: list[int] = []
        self._high_holes: list[int] = []  # negated: the highest hole first
        self.ref_counts: Counter[int] = (
            Counter()
        )  # references beyond the first, of blocks that several texts begin with

    @property
    def num_free(self) -> int:
        """How many blocks can still be allocated."""
        return self.high - self.low + min(len(self._low_holes), len(self._high_holes))

    def allocate(self, count: int, shared: bool = False) -> list[int]:
        """Return `count` blocks; if there are fewer, raise OutOfBlocks and allocate none."""
        holes = self._high_holes if shared else self._low_holes
        if count > len(holes) + self.high - self.low:
            raise OutOfBlocks
        reused = [heappop(holes) for _ in range(min(count, len(holes)))]
        return [-hole if shared else hole for hole in reused] + self._extend(count - len(reused), shared)

    def _extend(self, count: int, shared: bool) -> list[int]:
        """Take blocks at the edge and fill them with zeros: a masked key has no weight, but must not be NaN."""
        if shared:
            self.high -= count
        else:
            self.low += count
        fresh = range(self.high, self.high + count) if shared else range(self.low - count, self.low)
        first, last = self._clean
        for used in (range(fresh.start, min(fresh.stop, first)), range(max(fresh.start, last), fresh.stop)):
            for store in self._stores if used else ():
                store[used.start : used.stop].zero_()
        self._clean = [max(first, self.low), min(last, self.high)]
        return list(fresh)

    def incref(self, blocks: list[int]) -> list[int]:
        """Return shared blocks with one more reference each: they have to be freed once more."""
        self.ref_counts.update(blocks)
        return list(blocks)

    def free(self, blocks: list[int], shared: bool = False) -> None:
        """Drop one reference to each block; those without another one can be allocated again."""
        for block in blocks:
            if block not in self.ref_counts:
                heappush(self._high_holes if shared else self._low_holes, -block if shared else block)
            elif self.ref_counts[block] > 1:
                self.ref_counts[block] -= 1
            else:
                del self.ref_counts[block]

    def copied(self, blocks: list[int]) -> list[int]:
        """Return copies of blocks for a sequence."""
        copies = self.allocate(len(blocks))
        self.copy(blocks, copies)
        return copies

    def compact(self) -> dict[int, int]:
        """Move blocks into holes where holes are many; return the new place of each moved block."""
        moved = {**self._fill(shared=False), **self._fill(shared=True)}
        if moved:
            self.copy(list(moved), list(moved.values()))
            self.ref_counts = Counter({moved.get(block, block): count for block, count in self.ref_counts.items()})
        return moved

    def copy(self, old: list[int], new: list[int]) -> None:
        """Put what is in blocks into others; run them separately, where the device is a processor."""
        if self.device == "cpu":  # where an index takes longer than a block
            for store in self._stores:
                for block, copy in zip(old, new, strict=True):
                    store[copy] = store[block]
        elif old:
            old_at, new_at = (torch.tensor(of, device=self.device) for of in (old, new))
            for store in self._stores:
                store[new_at] = store[old_at]

    def _fill(self, shared: bool) -> dict[int, int]:
        holes = [-hole for hole in self._high_holes] if shared else self._low_holes
        used = (self.count - self.high if shared else self.low) - len(holes)
        if len(holes) * 8 <= used:
            return {}
        edge = self.count - used if shared else used  # where the blocks in use will end
        inside = [hole for hole in holes if (hole >= edge) == shared]
        empty = set(holes)
        outside = range(self.high, edge) if shared else range(edge, self.low)
        if shared:
            self.high, self._high_holes = edge, []
        else:
            self.low, self._low_holes = edge, []
        return dict(zip((block for block in outside if block not in empty), sorted(inside), strict=True))

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values, (tokens, heads, size), at `slots`: block times `BLOCK_SIZE` plus offset."""
        blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        self.keys[layer][blocks, :, :, offsets] = keys.to(self.dtype)
        self.values[layer][blocks, :, offsets] = values.to(self.dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return zeros; on a processor those that cost nothing until they are written to."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(memory.zeros(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)
