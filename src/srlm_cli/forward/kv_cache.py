"""Keys and values of many rows in pages of one store, written in place and never copied to grow.

A row's own pages are taken from the low end, those that several rows share from the high end, so
that each kind lies together and can be read as one slice. A hole between pages in use is then read
for nothing: `compact` fills holes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from heapq import heappop, heappush

import torch

from srlm_cli.forward import memory

PAGE = 64  # tokens


def pages_for(tokens: int) -> int:
    """Return how many pages so many tokens take."""
    return -(-tokens // PAGE)


class NoRoom(Exception):
    """All pages are taken."""


@dataclass(frozen=True)
class Span:
    """Tokens in pages, one behind the other: `count` of them, the first at position `start` of the rows that see it."""

    pages: list[int]
    count: int
    start: int
    rows: list[int]

    @property
    def last_position(self) -> int:
        return self.start + self.count - 1

    @property
    def last_slot(self) -> int:
        """Where the last token lies in the store: page times `PAGE` plus offset."""
        page, offset = divmod(self.count - 1, PAGE)
        return self.pages[page] * PAGE + offset


class Pages:
    """A store of `count` pages of `PAGE` tokens for each attention layer.

    `layers` gives the shapes of one token's key and value, (heads, size) each, by layer. Keys lie as
    (pages, heads, size, PAGE), so that a query's product with all keys of a page runs along memory;
    values as (pages, heads, PAGE, size). Where both have the same shape, on a processor, they are parts
    of one store, (pages, heads, 2, size x PAGE): a page is read from one end to the other.
    """

    def __init__(
        self, layers: dict[int, tuple[torch.Size, torch.Size]], count: int, dtype: torch.dtype, device: str
    ) -> None:
        self.layers, self.count, self.dtype, self.device = layers, count, dtype, device
        self.keys, self.values, self.both = {}, {}, {}
        self._stores: list[torch.Tensor] = []  # all of them, by pages
        for layer, ((heads, key_size), (_, value_size)) in layers.items():
            if device == "cpu" and key_size == value_size:
                both = self.both[layer] = _zeros((count, heads, 2, key_size * PAGE), dtype, device)
                keys, values = both.unbind(2)
                self._stores.append(both)
            else:
                keys = _zeros((count, heads, key_size * PAGE), dtype, device)
                values = _zeros((count, heads, value_size * PAGE), dtype, device)
                self._stores += [keys, values]
            self.keys[layer] = keys.unflatten(2, (key_size, PAGE))
            self.values[layer] = values.unflatten(2, (PAGE, value_size))
        self.low, self.high = 0, count  # own pages lie in [0, low), shared ones in [high, count)
        self._clean = [0, count]  # between these no page was ever taken
        self._low_holes: list[int] = []
        self._high_holes: list[int] = []  # negated: the highest hole first
        self.more_holders: Counter[int] = Counter()  # of pages that several texts begin with

    @property
    def free(self) -> int:
        """How many pages can still be taken."""
        return self.high - self.low + min(len(self._low_holes), len(self._high_holes))

    def take(self, count: int, shared: bool = False) -> list[int]:
        """Return `count` pages; raise NoRoom, having taken none, when there are not so many."""
        holes = self._high_holes if shared else self._low_holes
        if count > len(holes) + self.high - self.low:
            raise NoRoom
        reused = [heappop(holes) for _ in range(min(count, len(holes)))]
        return [-hole if shared else hole for hole in reused] + self._extend(count - len(reused), shared)

    def _extend(self, count: int, shared: bool) -> list[int]:
        """Take pages at the edge, with zeros in them: a masked key has no weight, but must not be NaN."""
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

    def hold(self, pages: list[int]) -> list[int]:
        """Return shared pages, which are free when they have been given back once more."""
        self.more_holders.update(pages)
        return list(pages)

    def give_back(self, pages: list[int], shared: bool = False) -> None:
        """Make pages free again that nothing else holds."""
        for page in pages:
            if page not in self.more_holders:
                heappush(self._high_holes if shared else self._low_holes, -page if shared else page)
            elif self.more_holders[page] > 1:
                self.more_holders[page] -= 1
            else:
                del self.more_holders[page]

    def copied(self, pages: list[int]) -> list[int]:
        """Return new pages of a row with what is in these."""
        copies = self.take(len(pages))
        self.copy(pages, copies)
        return copies

    def compact(self) -> dict[int, int]:
        """Move pages into holes where holes are many; return the new place of each moved page."""
        moved = {**self._fill(shared=False), **self._fill(shared=True)}
        if moved:
            self.copy(list(moved), list(moved.values()))
            self.more_holders = Counter({moved.get(page, page): count for page, count in self.more_holders.items()})
        return moved

    def copy(self, old: list[int], new: list[int]) -> None:
        """Put what is in pages into others; one after the other, where the device is a processor."""
        if self.device == "cpu":  # where an index takes longer than a page
            for store in self._stores:
                for page, copy in zip(old, new, strict=True):
                    store[copy] = store[page]
        elif old:
            old_at, new_at = (torch.tensor(of, device=self.device) for of in (old, new))
            for store in self._stores:
                store[new_at] = store[old_at]

    def _fill(self, shared: bool) -> dict[int, int]:
        holes = [-hole for hole in self._high_holes] if shared else self._low_holes
        used = (self.count - self.high if shared else self.low) - len(holes)
        if len(holes) * 8 <= used:
            return {}
        edge = self.count - used if shared else used  # where the pages in use will end
        inside = [hole for hole in holes if (hole >= edge) == shared]
        empty = set(holes)
        outside = range(self.high, edge) if shared else range(edge, self.low)
        if shared:
            self.high, self._high_holes = edge, []
        else:
            self.low, self._low_holes = edge, []
        return dict(zip((page for page in outside if page not in empty), sorted(inside), strict=True))

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values, (tokens, heads, size), at `slots`: page times `PAGE` plus offset."""
        pages, offsets = slots // PAGE, slots % PAGE
        self.keys[layer][pages, :, :, offsets] = keys.to(self.dtype)
        self.values[layer][pages, :, offsets] = values.to(self.dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return zeros; on a processor those that cost nothing until they are written to."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(memory.zeros(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)
