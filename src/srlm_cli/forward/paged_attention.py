"""A decoding step by operations of torch, wherever keys and values lie."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding_bag

from srlm_cli.forward.attention import attended, bias_of
from srlm_cli.forward.kv_cache import BLOCK_SIZE, PagedKVCache, Span
from srlm_cli.forward.prefix import CachedPrefix


class Decode:
    """A pass over one new token per sequence, which sees the common text, the shared spans and its own span.

    Each of the three is one attention call over a slice of the store, with every block separate. The outputs of the
    blocks are then combined with the log-sum-exp of their scores as weights, which is exact (Milakov and Gimelshein,
    arXiv 1805.02867). `own` has one span per sequence, in order, with the new token; `members` are the sequences that
    start with the common text.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        own: list[Span],
        shared: list[Span],
        common: CachedPrefix | None,
        members: list[int],
        device: str,
    ) -> None:
        self.cache, self.common, self.device = cache, common if members else None, device
        self.rows = len(own)
        self.seen_by: list[list[int]] = [[] for _ in own]  # by row, the numbers of the outputs that it sees
        self.positions = self._tensor([span.last_position for span in own])
        low = KVSlice(cache, slice(0, cache.low), own, self.positions)
        high = KVSlice(cache, slice(cache.high, cache.count), shared, self.positions)
        low.note(self.seen_by, before=0)
        high.note(self.seen_by, before=low.outputs)
        self.parts = [low, high]
        for row in members if self.common else ():
            self.seen_by[row].append(low.outputs + high.outputs + row)
        widest = max(map(len, self.seen_by))
        self.table = self._tensor([seen + [seen[0]] * (widest - len(seen)) for seen in self.seen_by])
        self.padding = self._tensor([[False] * len(seen) + [True] * (widest - len(seen)) for seen in self.seen_by])
        self.slots = self._tensor([span.last_slot for span in own])
        self._entries: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        self.cache.write(layer, self.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        queries = query[0].transpose(0, 1)
        parts = [part.attend(layer, queries, heads, scaling, window) for part in self.parts if part.outputs]
        if self.common:
            asked = queries.view(self.rows, heads, groups, -1).transpose(0, 1).flatten(1, 2)[None]
            bias = self._common_bias(window, groups, query.dtype)
            parts.append(attended(asked, self.common.keys[layer][None], self.common.values[layer][None], bias, scaling))
        outputs = torch.cat([output.flatten(0, 2) for output, _ in parts]).float()
        sums = torch.cat([total.flatten() for _, total in parts])
        entries, padding = self._entries_of(heads, groups)
        scores = sums[entries].masked_fill_(padding, float("-inf"))
        joined = embedding_bag(entries, outputs, per_sample_weights=torch.softmax(scores, -1), mode="sum")
        return joined.to(query.dtype).view(1, self.rows, heads * groups, -1)

    def _entries_of(self, heads: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, per sequence and query head, the indices of its outputs, and a mask of those that are padding."""
        if (heads, groups) not in self._entries:
            head = torch.arange(heads, device=self.device)[:, None, None]
            group = torch.arange(groups, device=self.device)[:, None]
            entries = (self.table[:, None, None] * groups + group) * heads + head
            self._entries[heads, groups] = entries.flatten(0, 2), self.padding.repeat_interleave(heads * groups, 0)
        return self._entries[heads, groups]

    def _common_bias(self, window: int | None, groups: int, dtype: torch.dtype) -> torch.Tensor | None:
        if window is None:
            return None
        keys = torch.arange(len(self.common.tokens), device=self.device)
        seen = keys > self.positions.repeat_interleave(groups)[:, None] - window
        return bias_of(seen, dtype)[None, None]

    def _tensor(self, numbers: list) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device)


class KVSlice:
    """The spans in one slice of the store, each block asked by all rows that see it; `positions` are those of the rows.

    It knows nothing of its step: in a ring the two, and the store with them, would outlive their use.
    """

    def __init__(self, cache: PagedKVCache, part: slice, spans: list[Span], positions: torch.Tensor) -> None:
        self.cache, self.slice, self.spans, self.positions = cache, part, spans, positions
        self.width = max((len(span.rows) for span in spans), default=0)
        count = part.stop - part.start
        self.outputs = count * self.width
        rows, filled, starts = [[0] * self.width for _ in range(count)], [0] * count, [0] * count
        for span in spans:
            for at, block in enumerate(span.blocks):
                block -= part.start
                rows[block][: len(span.rows)] = span.rows
                filled[block], starts[block] = (
                    min(BLOCK_SIZE, span.count - at * BLOCK_SIZE),
                    span.start + at * BLOCK_SIZE,
                )
        device = positions.device
        self.rows, self.filled, self.starts = (torch.tensor(of, device=device) for of in (rows, filled, starts))
        self._biases: dict[int | None, torch.Tensor] = {}

    def note(self, seen_by: list[list[int]], before: int) -> None:
        """Add to each row the numbers of the outputs that it sees here, where `before` others come first."""
        for span in self.spans:
            for block in span.blocks:
                for place, row in enumerate(span.rows):
                    seen_by[row].append(before + (block - self.slice.start) * self.width + place)

    def attend(self, layer: int, queries, heads: int, scaling: float, window: int | None):
        """Return the outputs and the log-sum-exp of each block for each row that sees it."""
        groups = queries.shape[1] // heads
        asked = queries[self.rows].unflatten(2, (heads, groups)).transpose(1, 2).flatten(2, 3)
        keys = self.cache.keys[layer][self.slice].transpose(2, 3)
        values = self.cache.values[layer][self.slice]
        return attended(asked, keys, values, self._bias(window, groups, queries.dtype), scaling)

    def _bias(self, window: int | None, groups: int, dtype: torch.dtype) -> torch.Tensor:
        if window not in self._biases:
            offsets = torch.arange(BLOCK_SIZE, device=self.positions.device)
            seen = (offsets < self.filled[:, None])[:, None]
            if window is not None:
                position = self.positions[self.rows].repeat_interleave(groups, 1)[..., None]
                seen = seen & ((self.starts[:, None] + offsets)[:, None] > position - window)
            self._biases[window] = bias_of(seen, dtype)[:, None]
        return self._biases[window]
