"""Attention over tokens of many rows that stand side by side in one batch row, without padding.

Registered with transformers as `NAME`: a model's layer hands over queries, keys and values of all
tokens, and the pass that is under way, a `Reading` of texts or a `Step` of decoding, knows which
token may see which. Since transformers knows no mask for this name, the model makes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag, scaled_dot_product_attention
from transformers import AttentionInterface

from srlm_cli.engines.inprocess.pages import PAGE, Pages
from srlm_cli.engines.inprocess.texts import Text

NAME = "srlm_packed"
# What layers pass on that does not change the scores; anything else means another attention than ours.
HARMLESS = {"dropout", "position_ids", "cache_position", "use_cache", "is_causal", "output_attentions", "layer_type"}


class Unsupported(Exception):
    """A layer that computes its scores in a way that this file does not know."""


class Reading:
    """A pass over the fresh tokens of texts, each behind what it shares with its parent.

    Keys and values from a text's token `first_slot` on are stored at its `slots`, if it has any.
    """

    def __init__(self, texts: list[Text], pages: Pages | None) -> None:
        self.texts, self.pages = texts, pages
        self.masks: dict[tuple[int, int | None], torch.Tensor | None] = {}

    def attend(self, layer: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        """Return (1, tokens, heads, size)."""
        start, parts = 0, []
        for at, text in enumerate(self.texts):
            end = start + len(text.fresh)
            own_key, own_value = key[0, :, start:end], value[0, :, start:end]
            if text.parent:
                own_key = torch.cat([text.parent.keys[layer][:, : text.shared], own_key], 1)
                own_value = torch.cat([text.parent.values[layer][:, : text.shared], own_value], 1)
            elif text.kept:  # a copy, since a view would keep all that was read beside it
                own_key, own_value = own_key.clone(), own_value.clone()
            text.keys[layer], text.values[layer] = own_key, own_value
            groups = query.shape[1] // key.shape[1]
            mask = self._mask(at, window, query.device)
            out = scaled_dot_product_attention(
                query[:, :, start:end],
                own_key.repeat_interleave(groups, 0)[None],
                own_value.repeat_interleave(groups, 0)[None],
                attn_mask=mask,
                is_causal=mask is None and end - start > 1,
                scale=scaling,
            )
            parts.append(out)
            start = end
        self._store(layer)
        return torch.cat(parts, 2).transpose(1, 2)

    def _mask(self, at: int, window: int | None, device) -> torch.Tensor | None:
        """Return which keys each fresh token of a text may see, None where plain causality says it."""
        text = self.texts[at]
        total = len(text.tokens)
        window = window if window is not None and total > window else None
        if window is None and (not text.shared or len(text.fresh) == 1):
            return None
        if (at, window) not in self.masks:
            queries = torch.arange(text.shared, total, device=device)[:, None]
            keys = torch.arange(total, device=device)
            seen = keys <= queries
            self.masks[at, window] = seen if window is None else seen & (keys > queries - window)
        return self.masks[at, window]

    def _store(self, layer: int) -> None:
        stored = [text for text in self.texts if text.slots is not None and len(text.slots)]
        if self.pages and stored:
            keys = torch.cat([text.keys[layer][:, text.first_slot :] for text in stored], 1)
            values = torch.cat([text.values[layer][:, text.first_slot :] for text in stored], 1)
            slots = torch.cat([text.slots for text in stored])
            self.pages.write(layer, slots, keys.transpose(0, 1), values.transpose(0, 1))


@dataclass(frozen=True)
class Span:
    """Tokens in pages, one behind the other: `count` of them, the first at position `start` of the rows that see it."""

    pages: list[int]
    count: int
    start: int
    rows: list[int]


class Step:
    """A pass over one new token a row, which sees the common text, the shared spans and its own span.

    Each of the three is one attention call, over a slice of the store with every page by itself. What
    a row gets from its pages is then weighed by the log-sum-exp of their scores, which is exact (the
    same identity as in Milakov and Gimelshein, arXiv 1805.02867). `own` has one span a row, in order,
    the new token included; `members` are the rows that begin with the common text.
    """

    def __init__(
        self, pages: Pages, own: list[Span], shared: list[Span], common: Text | None, members: list[int], device: str
    ) -> None:
        self.pages, self.common, self.device = pages, common if members else None, device
        self.rows = len(own)
        self.seen_by: list[list[int]] = [[] for _ in own]  # by row, the numbers of the outputs that it sees
        self.positions = self._tensor([span.start + span.count - 1 for span in own])
        low = _Part(pages, slice(0, pages.low), own, self.positions)
        high = _Part(pages, slice(pages.high, pages.count), shared, self.positions)
        low.note(self.seen_by, before=0)
        high.note(self.seen_by, before=low.outputs)
        self.parts = [low, high]
        for row in members if self.common else ():
            self.seen_by[row].append(low.outputs + high.outputs + row)
        widest = max(map(len, self.seen_by))
        self.table = self._tensor([seen + [seen[0]] * (widest - len(seen)) for seen in self.seen_by])
        self.padding = self._tensor([[False] * len(seen) + [True] * (widest - len(seen)) for seen in self.seen_by])
        last = [(span.pages[(span.count - 1) // PAGE], (span.count - 1) % PAGE) for span in own]
        self.slots = self._tensor([page * PAGE + offset for page, offset in last])
        self._entries: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        """Return (1, rows, heads, size)."""
        self.pages.write(layer, self.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        queries = query[0].transpose(0, 1)
        parts = [part.attend(layer, queries, heads, scaling, window) for part in self.parts if part.outputs]
        if self.common:
            asked = queries.view(self.rows, heads, groups, -1).transpose(0, 1).flatten(1, 2)[None]
            bias = self._common_bias(window, groups, query.dtype)
            parts.append(_attend(asked, self.common.keys[layer][None], self.common.values[layer][None], bias, scaling))
        outputs = torch.cat([output.flatten(0, 2) for output, _ in parts]).float()
        sums = torch.cat([total.flatten() for _, total in parts])
        entries, padding = self._entries_of(heads, groups)
        scores = sums[entries].masked_fill_(padding, float("-inf"))
        joined = embedding_bag(entries, outputs, per_sample_weights=torch.softmax(scores, -1), mode="sum")
        return joined.to(query.dtype).view(1, self.rows, heads * groups, -1)

    def _entries_of(self, heads: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, for each row and query head, the places of what it sees among all outputs, and which only fill up."""
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
        return _bias(seen, dtype)[None, None]

    def _tensor(self, numbers: list) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device)


class _Part:
    """The spans in one slice of the store, each page asked by all rows that see it; `positions` are those of the rows.

    It knows nothing of its step: in a ring the two, and the store with them, would outlive their use.
    """

    def __init__(self, pages: Pages, part: slice, spans: list[Span], positions: torch.Tensor) -> None:
        self.pages, self.slice, self.spans, self.positions = pages, part, spans, positions
        self.width = max((len(span.rows) for span in spans), default=0)
        count = part.stop - part.start
        self.outputs = count * self.width
        rows, filled, starts = [[0] * self.width for _ in range(count)], [0] * count, [0] * count
        for span in spans:
            for at, page in enumerate(span.pages):
                page -= part.start
                rows[page][: len(span.rows)] = span.rows
                filled[page], starts[page] = min(PAGE, span.count - at * PAGE), span.start + at * PAGE
        device = positions.device
        self.rows, self.filled, self.starts = (torch.tensor(of, device=device) for of in (rows, filled, starts))
        self._biases: dict[int | None, torch.Tensor] = {}

    def note(self, seen_by: list[list[int]], before: int) -> None:
        """Add to each row the numbers of the outputs that it sees here, where `before` others come first."""
        for span in self.spans:
            for page in span.pages:
                for place, row in enumerate(span.rows):
                    seen_by[row].append(before + (page - self.slice.start) * self.width + place)

    def attend(self, layer: int, queries, heads: int, scaling: float, window: int | None):
        """Return the outputs and the log-sum-exp of each page for each row that sees it."""
        groups = queries.shape[1] // heads
        asked = queries[self.rows].unflatten(2, (heads, groups)).transpose(1, 2).flatten(2, 3)
        keys = self.pages.keys[layer][self.slice].transpose(1, 2)
        values = self.pages.values[layer][self.slice].transpose(1, 2)
        return _attend(asked, keys, values, self._bias(window, groups, queries.dtype), scaling)

    def _bias(self, window: int | None, groups: int, dtype: torch.dtype) -> torch.Tensor:
        if window not in self._biases:
            offsets = torch.arange(PAGE, device=self.positions.device)
            seen = (offsets < self.filled[:, None])[:, None]
            if window is not None:
                position = self.positions[self.rows].repeat_interleave(groups, 1)[..., None]
                seen = seen & ((self.starts[:, None] + offsets)[:, None] > position - window)
            self._biases[window] = _bias(seen, dtype)[:, None]
        return self._biases[window]


def _bias(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 for a key that is seen; else a number so low that it has no weight, and that still adds up."""
    return torch.where(seen, 0.0, torch.finfo(dtype).min / 4).to(dtype)


def _attend(query, key, value, bias, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (texts, queries, heads, size) and the log-sum-exp of the scores, (texts, queries, heads), float32.

    query: (texts, heads, queries, size). key, value: (texts, heads, tokens, size).
    """
    if query.device.type == "cpu" and key.shape[-1] == value.shape[-1]:
        # The public function does not return the log-sum-exp.
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, total = flash(query, key, value, attn_mask=bias, scale=scaling)
    else:
        scores = (query @ key.transpose(-1, -2)).float() * scaling
        scores = scores if bias is None else scores + bias
        total = torch.logsumexp(scores, -1)
        output = (scores - total[..., None]).exp().to(value.dtype) @ value
    return output.transpose(1, 2), total.transpose(1, 2)


# --- the door in transformers ----------------------------------------------------------------

_under_way: ContextVar[Reading | Step] = ContextVar("under_way")


@contextmanager
def passing(run: Reading | Step, configs: list) -> Iterator[None]:
    """Let the models of these configurations attend by `run`, and as before afterwards."""
    before = [config._attn_implementation for config in configs]
    token = _under_way.set(run)
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _under_way.reset(token)


def attend(
    module, query, key, value, attention_mask, scaling: float | None = None, sliding_window: int | None = None, **others
) -> tuple[torch.Tensor, None]:
    """Attend as the pass under way says; raise Unsupported where a layer asks for more than that."""
    unknown = [name for name, setting in others.items() if name not in HARMLESS and setting not in (None, False)]
    if unknown or attention_mask is not None:
        raise Unsupported(", ".join(unknown) or "a mask of its own")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _under_way.get().attend(module.layer_idx, query, key, value, scaling, sliding_window), None


AttentionInterface.register(NAME, attend)
