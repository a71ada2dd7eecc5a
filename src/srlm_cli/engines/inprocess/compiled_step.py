"""A decoding step by compiled code, over keys and values in a processor's memory."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import torch

from srlm_cli.engines.inprocess import kernels
from srlm_cli.engines.inprocess.attention import attended, bias_of
from srlm_cli.engines.inprocess.pages import Pages, Span
from srlm_cli.engines.inprocess.texts import Text


class CompiledStep:
    """A pass over one new token a row, which sees the common text, the shared spans and its own span.

    As `step.Step`, of which it makes one attention call of two: what the rows see in pages is added, page by
    page, to what they got from the common text.
    """

    def __init__(self, pages: Pages, own: list[Span], shared: list[Span], common: Text | None, members: list[int]):
        self.pages, self.common = pages, common if members else None
        self.members = torch.tensor(members)
        self.positions = torch.tensor([span.last_position for span in own])
        self.slots = np.array([span.last_slot for span in own])
        spans = [*shared, *own]
        page_ends = pairwise(accumulate((len(span.pages) for span in spans), initial=0))
        row_ends = pairwise(accumulate((len(span.rows) for span in spans), initial=0))
        self.spans = np.array(
            [(*of, *by, span.count, span.start) for of, by, span in zip(page_ends, row_ends, spans, strict=True)]
        )
        self.in_pages = np.array([page for span in spans for page in span.pages])
        self.seen_by = np.array([row for span in spans for row in span.rows])
        self._lowest: dict[int | None, np.ndarray] = {}

    def attend(self, layer: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        _, heads, rows, size = key.shape
        groups = query.shape[1] // heads
        store, attend = kernels.compiled(heads, groups, size)
        keys, values = _flat(self.pages.keys[layer]), _flat(self.pages.values[layer])
        fresh = (of[0].transpose(0, 1).to(self.pages.dtype) for of in (key, value))
        store(keys, values, *map(_flat, fresh), self.slots)
        queries = query[0].transpose(0, 1).unflatten(1, (heads, groups))
        outputs, tops, sums = self._begun(layer, queries, scaling, window)
        parts = (self.spans, self.in_pages, self.seen_by, self._lowest_of(window))
        attend(_flat(queries.float() * scaling), keys, values, *parts, _flat(outputs), _flat(tops), _flat(sums))
        return outputs.to(query.dtype).view(1, rows, heads * groups, size)

    def _begun(self, layer: int, queries: torch.Tensor, scaling: float, window: int | None) -> tuple:
        """Return what rows get from the common text, (rows, heads, groups, size), the log-sum-exp of its scores, and 1.

        Nothing, the lowest score there is, and 0 for rows that do not begin with it.
        """
        outputs = torch.zeros(queries.shape, dtype=torch.float32)
        tops, sums = torch.full(queries.shape[:3], float(kernels.LOWEST)), torch.zeros(queries.shape[:3])
        if self.common:
            asked = queries[self.members].transpose(0, 1).flatten(1, 2)[None]
            bias = self._common_bias(window, queries.shape[2], queries.dtype)
            common = (self.common.keys[layer][None], self.common.values[layer][None])
            output, total = attended(asked, *common, bias, scaling)
            shape = (len(self.members), queries.shape[2], queries.shape[1])
            outputs[self.members] = output.unflatten(1, shape[:2])[0].transpose(1, 2).float()
            tops[self.members], sums[self.members] = total.view(shape).transpose(1, 2), 1.0
        return outputs, tops, sums

    def _common_bias(self, window: int | None, groups: int, dtype: torch.dtype) -> torch.Tensor | None:
        if window is None:
            return None
        lowest = torch.from_numpy(self._lowest_of(window))[self.members].repeat_interleave(groups)
        return bias_of(torch.arange(len(self.common.tokens)) >= lowest[:, None], dtype)[None, None]

    def _lowest_of(self, window: int | None) -> np.ndarray:
        """Return the first position that each row sees."""
        if window not in self._lowest:
            last = self.positions.numpy()
            self._lowest[window] = np.zeros_like(last) if window is None else last - window + 1
        return self._lowest[window]


# What compiled code takes a type as.
_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def fits(layers: dict[int, tuple[torch.Size, torch.Size]], dtype: torch.dtype, device: str) -> bool:
    """Tell whether keys and values of these shapes, (heads, size) by layer, can be read by compiled code."""
    alike = all(key == value and kernels.fits(key[1]) for key, value in layers.values())
    return device == "cpu" and dtype in _BITS and alike


def _flat(tensor: torch.Tensor) -> np.ndarray:
    """Return the numbers as a flat array, of the same memory where they lie in order."""
    return tensor.contiguous().view(-1).view(_BITS.get(tensor.dtype, tensor.dtype)).numpy()
