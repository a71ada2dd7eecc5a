"""The passes over keys and values in a processor's memory, by compiled code: a step of decoding, and texts to read."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import torch

from srlm_cli.engines.inprocess import kernels
from srlm_cli.engines.inprocess.attention import Reading
from srlm_cli.engines.inprocess.pages import Pages, Span
from srlm_cli.engines.inprocess.texts import Text


class CompiledStep:
    """A pass over one new token a row, which sees the common text, the shared spans and its own span.

    As `step.Step`; the common text lies in pages, too.
    """

    def __init__(self, pages: Pages, own: list[Span], shared: list[Span], common: Text | None, members: list[int]):
        self.slots = np.array([span.last_slot for span in own])
        self.positions = torch.tensor([span.last_position for span in own])
        begun = [Span(common.pages, len(common.tokens), 0, members)] if common and members else []
        self.paged = _Paged(pages, [*begun, *shared, *own], self.positions.numpy())

    def attend(self, layer: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        self.paged.store(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), self.slots)
        return self.paged.attend(layer, query, scaling, window)


class CompiledReading(Reading):
    """A pass over the fresh tokens of texts, all of which are stored in pages before they are asked for."""

    def __init__(self, texts: list[Text], pages: Pages) -> None:
        super().__init__(texts, pages)
        ends = accumulate((len(text.fresh) for text in texts), initial=0)
        rows = [list(range(*edges)) for edges in pairwise(ends)]
        spans = [
            Span(text.pages, len(text.tokens) - text.first_slot, text.first_slot, of_text)
            for text, of_text in zip(texts, rows, strict=True)
        ]
        behind: dict[Text, list[int]] = {}
        for text, of_text in zip(texts, rows, strict=True):
            if text.common:
                behind.setdefault(text.common, []).extend(of_text)
        begun = [Span(common.pages, len(common.tokens), 0, of_texts) for common, of_texts in behind.items()]
        positions = np.concatenate([np.arange(text.shared, len(text.tokens)) for text in texts])
        self.paged = _Paged(pages, [*begun, *spans], positions)

    def attend(self, layer: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        self._take_in(layer, key, value)
        self.paged.store(layer, *self._to_store(layer), self.slots.numpy())
        return self.paged.attend(layer, query, scaling, window)


class _Paged:
    """What rows see: each the tokens of those spans that name it, up to its own position."""

    def __init__(self, pages: Pages, spans: list[Span], positions: np.ndarray) -> None:
        self.pages, self.positions = pages, positions
        page_ends = pairwise(accumulate((len(span.pages) for span in spans), initial=0))
        row_ends = pairwise(accumulate((len(span.rows) for span in spans), initial=0))
        self.spans = np.array(
            [(*of, *by, span.count, span.start) for of, by, span in zip(page_ends, row_ends, spans, strict=True)]
        )
        self.in_pages = np.array([page for span in spans for page in span.pages])
        self.seen_by = np.array([row for span in spans for row in span.rows])
        self._lowest: dict[int | None, np.ndarray] = {}

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: np.ndarray) -> None:
        """Store keys and values, (tokens, heads, size), at `slots`: page times `PAGE` plus offset."""
        _, heads, size = keys.shape
        store = kernels.storing(heads, size, self._paired)
        fresh = (_flat(of.to(self.pages.dtype)) for of in (keys, values))
        store(_flat(self.pages.both[layer]), *fresh, slots)

    def attend(self, layer: int, query: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
        """Return what rows get, (1, rows, heads, size), which ask by (1, heads, rows, size)."""
        stored = self.pages.both[layer]
        queries = query[0].transpose(0, 1)
        rows, asking, size = queries.shape
        heads = stored.shape[1]
        attend = kernels.attending(heads, asking // heads, size, self._paired)
        outputs = torch.empty(rows, asking, size)
        seen = (self.spans, self.in_pages, self.seen_by, self._lowest_of(window), self.positions)
        attend(_flat(queries.float()), np.float32(scaling), _flat(stored), *seen, _flat(outputs))
        return outputs.to(query.dtype)[None]

    @property
    def _paired(self) -> bool:
        return self.pages.dtype == torch.bfloat16

    def _lowest_of(self, window: int | None) -> np.ndarray:
        """Return the first position that each row sees."""
        if window not in self._lowest:
            last = self.positions
            self._lowest[window] = np.zeros_like(last) if window is None else last - window + 1
        return self._lowest[window]


# What compiled code takes a type as.
_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def fits(layers: dict[int, tuple[torch.Size, torch.Size]], dtype: torch.dtype, device: str) -> bool:
    """Tell whether keys and values of these shapes, (heads, size) by layer, can be read by compiled code."""
    alike = all(key == value and kernels.fits(key[1]) for key, value in layers.values())
    return device == "cpu" and dtype in _BITS and bool(layers) and alike


def _flat(tensor: torch.Tensor) -> np.ndarray:
    """Return the numbers as a flat array, of the same memory where they lie in order."""
    return tensor.contiguous().view(-1).view(_BITS.get(tensor.dtype, tensor.dtype)).numpy()
