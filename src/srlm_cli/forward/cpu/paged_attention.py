"""Decode and prefill passes over a paged KV cache in CPU memory, by compiled code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import accumulate, pairwise

import numpy as np
import torch

from srlm_cli.forward import memory
from srlm_cli.forward.cpu import attention_kernels
from srlm_cli.forward.kv_cache import BLOCK_SIZE, PagedKVCache, Span
from srlm_cli.forward.prefix import CachedPrefix


class CompiledPass(ABC):
    """A pass with attention on arrays, (tokens, heads x size), float32, besides `attend` on tensors."""

    @abstractmethod
    def gather(
        self, layer: int, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scaling: float, window: int | None
    ) -> np.ndarray:
        """Return the attention output of a layer, as `attend` does."""

    def attend(self, layer: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        given = (of[0].transpose(0, 1).flatten(1).float().contiguous().numpy() for of in (query, key, value))
        gathered = torch.from_numpy(self.gather(layer, *given, scaling, window))
        return gathered.view(len(gathered), query.shape[1], -1).to(query.dtype)[None]


class CompiledDecode(CompiledPass):
    """A decode pass: one new token per sequence, which sees the common text, the shared spans and its own span.

    It is the same as `forward.paged_attention.Decode`, but the common text is in blocks as well.
    """

    def __init__(
        self, cache: PagedKVCache, own: list[Span], shared: list[Span], common: CachedPrefix | None, members: list[int]
    ):
        self.slots = np.array([span.last_slot for span in own])
        self.positions = torch.tensor([span.last_position for span in own])
        begun = [Span(common.blocks, len(common.tokens), 0, members)] if common and members else []
        self.paged = _Paged(cache, [*begun, *shared, *own], self.positions.numpy())

    def gather(self, layer, queries, keys, values, scaling, window) -> np.ndarray:
        return self.paged.gather(layer, queries, (keys, values, self.slots), scaling, window)


class CompiledPrefill(CompiledPass):
    """A pass over the new tokens of texts, each of which sees the earlier tokens of its text, in blocks.

    Full blocks that a text shares with its prefix are those of the prefix (`CachedPrefix.allocate_blocks`). The other
    shared tokens are copied: before the pass, or together with the prefix if it is read in the same pass.
    """

    def __init__(self, texts: list[CachedPrefix], cache: PagedKVCache) -> None:
        ends = accumulate((len(text.fresh) for text in texts), initial=0)
        rows = dict(zip(texts, (range(*edges) for edges in pairwise(ends)), strict=True))
        cache.copy(*_partly_shared(texts))
        stored = [token for text in texts for token in _to_store(text, rows)]
        self.tokens, self.slots = np.array(stored).T.copy()
        spans = [
            Span(text.blocks, len(text.tokens) - text.first_slot, text.first_slot, list(of_text))
            for text, of_text in rows.items()
        ]
        behind: dict[CachedPrefix, list[int]] = {}
        for text, of_text in rows.items():
            if text.common:
                behind.setdefault(text.common, []).extend(of_text)
        begun = [Span(common.blocks, len(common.tokens), 0, of_texts) for common, of_texts in behind.items()]
        positions = np.concatenate([np.arange(text.shared, len(text.tokens)) for text in texts])
        self.paged = _Paged(cache, [*begun, *spans], positions)

    def gather(self, layer, queries, keys, values, scaling, window) -> np.ndarray:
        self.paged.store(layer, keys, values, self.tokens, self.slots)
        return self.paged.gather(layer, queries, (keys[:0], values[:0], self.slots[:0]), scaling, window)


def _partly_shared(texts: list[CachedPrefix]) -> tuple[list[int], list[int]]:
    """Return blocks, and those that begin with a part of what is in them; to be copied in order: one may be both."""
    begun = [(text, text.whole_blocks) for text in texts if text.prefix]
    partly = [(text, at) for text, at in begun if text.shared - text.first_slot > at * BLOCK_SIZE]
    return [text.prefix.blocks[at] for text, at in partly], [text.blocks[at] for text, at in partly]


def _to_store(text: CachedPrefix, rows: dict[CachedPrefix, range]) -> Iterator[tuple[int, int]]:
    """Yield tokens of a pass, and the slots in a text's own blocks where they are stored: its prefix's, and its own."""
    slots = text.slots.tolist()
    for slot in range(text.whole_blocks * BLOCK_SIZE, len(slots)):
        position, holder = text.first_slot + slot, text
        while holder in rows and position < holder.shared:
            holder = holder.prefix
        if holder in rows:
            yield rows[holder][position - holder.shared], slots[slot]


class _Paged:
    """What rows see: each the tokens of those spans that name it, up to its own position."""

    def __init__(self, cache: PagedKVCache, spans: list[Span], positions: np.ndarray) -> None:
        self.cache, self.positions = cache, positions
        block_ends = pairwise(accumulate((len(span.blocks) for span in spans), initial=0))
        row_ends = pairwise(accumulate((len(span.rows) for span in spans), initial=0))
        self.spans = np.array(
            [(*of, *by, span.count, span.start) for of, by, span in zip(block_ends, row_ends, spans, strict=True)]
        )
        self.block_ids = np.array([block for span in spans for block in span.blocks])
        self.seen_by = np.array([row for span in spans for row in span.rows])
        self._lowest: dict[int | None, np.ndarray] = {}

    def store(self, layer: int, keys: np.ndarray, values: np.ndarray, tokens: np.ndarray, slots: np.ndarray) -> None:
        """Store keys and values, (tokens, heads x size), of the given tokens at slots (block x BLOCK_SIZE + offset)."""
        attention_kernels.storing(*self._shape(layer))(self._stored(layer), keys, values, tokens, slots)

    def gather(
        self,
        layer: int,
        queries: np.ndarray,
        fresh: tuple[np.ndarray, np.ndarray, np.ndarray],
        scaling: float,
        window: int | None,
    ) -> np.ndarray:
        """Return the attention output of rows, (rows, heads x groups x size), for queries of the same shape.

        `fresh` are keys, values and slots of new tokens, which are stored first: the last ones of the last spans.
        """
        heads, size, paired = self._shape(layer)
        attend = attention_kernels.attending(heads, queries.shape[1] // (heads * size), size, paired)
        outputs = memory.floats(*queries.shape)
        seen = (self.spans, self.block_ids, self.seen_by, self._lowest_of(window), self.positions)
        attend(queries, np.float32(scaling), self._stored(layer), *fresh, *seen, outputs)
        return outputs

    def _shape(self, layer: int) -> tuple[int, int, bool]:
        (heads, size), _ = self.cache.layers[layer]
        return heads, size, self.cache.dtype == torch.bfloat16

    def _stored(self, layer: int) -> np.ndarray:
        """Return the keys and values of a layer as a flat array for compiled code."""
        return self.cache.both[layer].view(-1).view(_BITS[self.cache.dtype]).numpy()

    def _lowest_of(self, window: int | None) -> np.ndarray:
        """Return the first position that each row sees with this sliding window."""
        if window not in self._lowest:
            last = self.positions
            self._lowest[window] = np.zeros_like(last) if window is None else last - window + 1
        return self._lowest[window]


# The type in which compiled code receives a dtype: numpy has no bfloat16.
_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def fits(layers: dict[int, tuple[torch.Size, torch.Size]], dtype: torch.dtype, device: str) -> bool:
    """Return whether the compiled passes support keys and values of these shapes, (heads, size) by layer."""
    alike = all(key == value and attention_kernels.fits(key[1]) for key, value in layers.values())
    return device == "cpu" and dtype in _BITS and bool(layers) and alike
