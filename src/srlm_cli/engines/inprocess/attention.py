"""Attention over tokens of many rows that stand side by side in one batch row, without padding.

Registered with transformers as `NAME`: a model's layer hands over queries, keys and values of all
tokens, and the pass that is under way, a `Reading` of texts or a step of decoding, knows which
token may see which. Since transformers knows no mask for this name, the model makes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from srlm_cli.engines.inprocess.pages import Pages
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


def bias_of(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 for a key that is seen; else a number so low that it has no weight, and that still adds up."""
    return torch.where(seen, 0.0, torch.finfo(dtype).min / 4).to(dtype)


def attended(query, key, value, bias, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (texts, queries, heads, size) and the log-sum-exp of the scores, (texts, queries, heads), float32.

    query: (texts, heads, queries, size). key, value: (texts, heads, tokens, size).
    """
    if query.device.type == "cpu" and key.shape[-1] == value.shape[-1] and key.stride(-1) == 1:
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


class Pass(Protocol):
    """What knows which token may see which, while a model computes."""

    def attend(self, layer: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        """Return what tokens get in a layer, (1, tokens, heads, size); the others are (1, heads, tokens, size)."""


_under_way: ContextVar[Pass] = ContextVar("under_way")
_switching = Lock()
_switched: dict[int, tuple[int, str]] = {}  # by configuration: passes under way, and what it named before


@contextmanager
def passing(run: Pass, configs: list) -> Iterator[None]:
    """Let the models of these configurations attend by `run` in this thread, and as before when no thread needs it."""
    token = _under_way.set(run)
    with _switching:
        named = [config._attn_implementation for config in configs]  # to set one sets those within it, too
        for config, name in zip(configs, named, strict=True):
            users, before = _switched.get(id(config), (0, name))
            _switched[id(config)] = users + 1, before
            config._attn_implementation = NAME
    try:
        yield
    finally:
        with _switching:
            for config in configs:
                users, before = _switched.pop(id(config))
                if users > 1:
                    _switched[id(config)] = users - 1, before
                else:
                    config._attn_implementation = before
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
