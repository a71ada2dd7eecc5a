"""Attention over the tokens of many sequences that are packed into one batch row, without padding.

Registered with transformers as `NAME`. A layer passes the queries, keys and values of all tokens, and the current pass,
a `Prefill` of texts or a decoding step, decides which token sees which. transformers has no mask for this name, so the
model makes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from srlm_cli.forward.kv_cache import PagedKVCache
from srlm_cli.forward.parallel_passes import Progress
from srlm_cli.forward.prefix import CachedPrefix
from srlm_cli.models.light_transformers import AttentionInterface

NAME = "srlm_packed"
# Arguments of layers that do not change the scores; any other argument means an unsupported kind of attention.
HARMLESS = {"dropout", "position_ids", "cache_position", "use_cache", "is_causal", "output_attentions", "layer_type"}


class Unsupported(Exception):
    """A layer that computes its scores in a way that is not supported here."""


class Prefill:
    """A pass over the new tokens of texts; each text continues its prefix.

    Keys and values from token `first_slot` on are stored in the blocks of a text, if it has any. With `progress`, other
    passes run at the same time.
    """

    def __init__(self, texts: list[CachedPrefix], cache: PagedKVCache | None, progress: Progress | None = None) -> None:
        self.texts, self.cache, self.progress = texts, cache, progress
        self.masks: dict[tuple[int, int | None], torch.Tensor | None] = {}
        self.stored = [text for text in texts if text.blocks]
        self.slots = torch.cat([text.slots for text in self.stored]).to(cache.device) if self.stored else None

    def attend(self, layer: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        self._take_in(layer, key, value)
        parts, start = [], 0
        for at, text in enumerate(self.texts):
            end = start + len(text.fresh)
            of_text = (text.keys[layer][None], text.values[layer][None])
            parts.append(self._attend(at, query[:, :, start:end], *of_text, scaling, window))
            start = end
        if self.stored:
            self.cache.write(layer, self.slots, *self._to_store(layer))
        return torch.cat(parts, 2).transpose(1, 2)

    def _take_in(self, layer: int, key, value) -> None:
        """Give each text its keys and values, (heads, tokens, size), from (1, heads, fresh tokens of all, size)."""
        start = 0
        for text in self.texts:
            end = start + len(text.fresh)
            own_key, own_value = key[0, :, start:end], value[0, :, start:end]
            if text.prefix:
                if self.progress:
                    self.progress.wait_for(text.prefix, layer)
                own_key = torch.cat([text.prefix.keys[layer][:, : text.shared], own_key], 1)
                own_value = torch.cat([text.prefix.values[layer][:, : text.shared], own_value], 1)
            elif text.kept:  # a copy, since a view would keep all that was read beside it
                own_key, own_value = own_key.clone(), own_value.clone()
            text.keys[layer], text.values[layer] = own_key, own_value
            start = end
        if self.progress:
            self.progress.tell()

    def _to_store(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values, (tokens, heads, size), that go to `slots`."""
        keys = torch.cat([text.keys[layer][:, text.first_slot :] for text in self.stored], 1)
        values = torch.cat([text.values[layer][:, text.first_slot :] for text in self.stored], 1)
        return keys.transpose(0, 1), values.transpose(0, 1)

    def _attend(self, at: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        """Return what fresh tokens of a text get, (1, heads, fresh, size), from its tokens up to themselves."""
        text, heads = self.texts[at], key.shape[1]
        groups, fresh = query.shape[1] // heads, len(text.fresh)
        window = window if window is not None and len(text.tokens) > window else None
        if window is None and text.shared and fresh > 1 and _is_flash(query, key, value):
            return _behind(text.shared, query, key, value, scaling)
        mask = self._mask(at, window, query.device)
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        causal = mask is None and fresh > 1
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scaling)

    def _mask(self, at: int, window: int | None, device) -> torch.Tensor | None:
        """Return which keys each fresh token of a text may see, None where plain causality says it."""
        text = self.texts[at]
        total = len(text.tokens)
        if window is None and (not text.shared or len(text.fresh) == 1):
            return None
        if (at, window) not in self.masks:
            queries = torch.arange(text.shared, total, device=device)[:, None]
            keys = torch.arange(total, device=device)
            seen = keys <= queries
            self.masks[at, window] = seen if window is None else seen & (keys > queries - window)
        return self.masks[at, window]


def bias_of(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 for a key that is seen, else a large negative number, which can still be added."""
    return torch.where(seen, 0.0, torch.finfo(dtype).min / 4).to(dtype)


def attended(query, key, value, bias, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (texts, queries, heads, size) and the log-sum-exp of the scores, (texts, queries, heads), float32.

    query: (texts, heads, queries, size). key, value: (texts, heads, tokens, size).
    """
    if _is_flash(query, key, value):
        output, total = _flash(query, key, value, attn_mask=bias, scale=scaling)
    else:
        scores = (query @ key.transpose(-1, -2)).float() * scaling
        scores = scores if bias is None else scores + bias
        total = torch.logsumexp(scores, -1)
        output = (scores - total[..., None]).exp().to(value.dtype) @ value
    return output.transpose(1, 2), total.transpose(1, 2)


# The public function does not return the log-sum-exp.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _is_flash(query, key, value) -> bool:
    return query.device.type == "cpu" and key.shape[-1] == value.shape[-1] and key.stride(-1) == 1


def _behind(shared: int, query, key, value, scaling: float) -> torch.Tensor:
    """Return what fresh tokens get, (1, heads, fresh, size), which see `shared` tokens before them, and are causal.

    The two parts are weighed by the log-sum-exp of their scores, which is exact (Milakov and Gimelshein, arXiv
    1805.02867). One mask over both would make all products that it hides.
    """
    _, heads, fresh, size = query.shape
    asked = query.reshape(1, key.shape[1], -1, size)  # all queries of a head of keys side by side
    before, total_before = _flash(asked, key[:, :, :shared], value[:, :, :shared], scale=scaling)
    groups = heads // key.shape[1]
    own_key, own_value = (of[:, :, shared:].repeat_interleave(groups, 1) for of in (key, value))
    own, total = _flash(query, own_key, own_value, is_causal=True, scale=scaling)
    share = torch.sigmoid(total - total_before.reshape(1, heads, fresh))[..., None]
    return torch.lerp(before.reshape(query.shape).float(), own.float(), share).to(query.dtype)


# --- the door in transformers ----------------------------------------------------------------


class Pass(Protocol):
    """A forward pass: it decides which token sees which."""

    def attend(self, layer: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        """Return what tokens get in a layer, (1, tokens, heads, size); the others are (1, heads, tokens, size)."""


_current_pass: ContextVar[Pass] = ContextVar("current_pass")
_switching = Lock()
_switched: dict[int, tuple[int, str]] = {}  # by configuration: passes under way, and what it named before


@contextmanager
def attention_context(run: Pass, configs: list) -> Iterator[None]:
    """Let the models of these configurations attend by `run` in this thread, and as before when no thread needs it."""
    token = _current_pass.set(run)
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
        _current_pass.reset(token)


def current_pass() -> Pass | None:
    """Return the current pass of this thread."""
    return _current_pass.get(None)


def attend(
    module, query, key, value, attention_mask, scaling: float | None = None, sliding_window: int | None = None, **others
) -> tuple[torch.Tensor, None]:
    """Compute attention as the current pass does; raise Unsupported if a layer needs more."""
    unknown = [name for name, setting in others.items() if name not in HARMLESS and setting not in (None, False)]
    if unknown or attention_mask is not None:
        raise Unsupported(", ".join(unknown) or "a mask of its own")
    if sliding_window is None and _has_window_in_mask(module):
        raise Unsupported("a sliding window in the mask only")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _current_pass.get().attend(module.layer_idx, query, key, value, scaling, sliding_window), None


def _has_window_in_mask(module) -> bool:
    """Return whether a layer has a sliding window only in its mask, as in PhiMoE."""
    window = getattr(module.config, "sliding_window", None)
    if not window or window >= (getattr(module.config, "max_position_embeddings", None) or window + 1):
        return False
    kinds = getattr(module.config, "layer_types", None)
    return kinds is None or kinds[module.layer_idx] == "sliding_attention"


AttentionInterface.register(NAME, attend)
