"""Sequences that begin alike: what two have in common is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from srlm_cli.forward.kv_cache import BLOCK_SIZE, PagedKVCache, blocks_for

LOOK_BACK = 8


@dataclass(eq=False)
class CachedPrefix:
    """A sequence to read, from which completions and later sequences continue.

    Its first `shared` tokens are those of `prefix`, which is read earlier.

    `keys` and `values`, (heads, tokens, size) per layer, exist while the text is read, and afterwards if it is `kept`
    for later texts with the same prefix. They are stored in `blocks` of a cache, if there are any; those of the
    `common` text, with which this text starts, are in the blocks of the common text. Compiled code reads them there,
    and full blocks of the shared tokens are those of the prefix.
    """

    tokens: list[int]
    prefix: CachedPrefix | None = None
    shared: int = 0
    kept: bool = False
    blocks: list[int] = field(default_factory=list)
    common: CachedPrefix | None = None
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def first_slot(self) -> int:
        """The first token whose key and value are in the text's own blocks."""
        return len(self.common.tokens) if self.common else 0

    @property
    def whole_blocks(self) -> int:
        """The number of full blocks with tokens of the prefix only, without those of the common text."""
        return (self.shared - self.first_slot) // BLOCK_SIZE

    def allocate_blocks(self, cache: PagedKVCache, join: bool) -> None:
        """Allocate blocks of a cache, sharing the prefix's whole ones if they may `join`; raise OutOfBlocks."""
        held = self.prefix.blocks[: self.whole_blocks] if join and self.prefix else []
        fresh = cache.allocate(blocks_for(len(self.tokens) - self.first_slot) - len(held), shared=True)
        self.blocks = cache.incref(held) + fresh

    @property
    def slots(self) -> torch.Tensor:
        """Where the tokens from `first_slot` on lie in the cache: block times `BLOCK_SIZE` plus offset."""
        all_slots = (torch.tensor(self.blocks)[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()
        return all_slots[: len(self.tokens) - self.first_slot]

    @property
    def fresh(self) -> list[int]:
        """The tokens that are not the prefix's."""
        return self.tokens[self.shared :]


def find_prefixes(texts: list[CachedPrefix], known: list[CachedPrefix]) -> None:
    """Give each text the prefix with which it shares the longest beginning: a known text, or one shortly before it.

    At least one token is left to read, because the logits after the text are needed.
    """
    for at, text in enumerate(texts):
        for other in [*known, *texts[max(0, at - LOOK_BACK) : at]]:
            shared = min(common_prefix_len(text.tokens, other.tokens), len(text.tokens) - 1)
            if shared > text.shared:
                text.prefix, text.shared = other, shared


def passes(texts: list[CachedPrefix], size: int | None) -> Iterator[list[CachedPrefix]]:
    """Yield the texts in their order, as many at a time as have `size` fresh tokens at most; a longer one alone."""
    some: list[CachedPrefix] = []
    for text in texts:
        if some and size is not None and sum(len(one.fresh) for one in (*some, text)) > size:
            yield some
            some = []
        some.append(text)
    if some:
        yield some


def common_prefix_len(one: list[int], other: list[int]) -> int:
    """Return how many tokens two texts have in common at their beginning."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
