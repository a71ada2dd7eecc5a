"""Texts to read that begin alike: what two have in common is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from srlm_cli.forward.kv_cache import PAGE, Pages, pages_for

LOOK_BACK = 8


@dataclass(eq=False)
class Text:
    """Tokens to read. The first `shared` of them are those of `parent`, which is read earlier.

    `keys` and `values`, (heads, tokens, size) by layer, are there while the text is being read, and
    afterwards when it is `kept` for later ones that begin alike. They go to `pages` of a store, where
    there are any; those of the `common` text, with which this one begins, are in its own pages.
    Compiled code reads them there, and whole pages of what is shared are the parent's.
    """

    tokens: list[int]
    parent: Text | None = None
    shared: int = 0
    kept: bool = False
    pages: list[int] = field(default_factory=list)
    common: Text | None = None
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def first_slot(self) -> int:
        """The first token whose key and value are in the text's own pages."""
        return len(self.common.tokens) if self.common else 0

    @property
    def whole_pages(self) -> int:
        """How many pages there are with nothing but what is the parent's, and not the common text's."""
        return (self.shared - self.first_slot) // PAGE

    def take_pages(self, store: Pages, join: bool) -> None:
        """Take pages of a store, and hold the parent's whole ones with it, if they may `join`; raise NoRoom."""
        held = self.parent.pages[: self.whole_pages] if join and self.parent else []
        fresh = store.take(pages_for(len(self.tokens) - self.first_slot) - len(held), shared=True)
        self.pages = store.hold(held) + fresh

    @property
    def slots(self) -> torch.Tensor:
        """Where the tokens from `first_slot` on lie in the store: page times `PAGE` plus offset."""
        all_slots = (torch.tensor(self.pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()
        return all_slots[: len(self.tokens) - self.first_slot]

    @property
    def fresh(self) -> list[int]:
        """The tokens that are not the parent's."""
        return self.tokens[self.shared :]


def find_parents(texts: list[Text], known: list[Text]) -> None:
    """Give each text the parent with which it shares the longest beginning: a known text, or one shortly before it.

    At least one token is left to read, since the logits behind the text are wanted.
    """
    for at, text in enumerate(texts):
        for other in [*known, *texts[max(0, at - LOOK_BACK) : at]]:
            shared = min(alike(text.tokens, other.tokens), len(text.tokens) - 1)
            if shared > text.shared:
                text.parent, text.shared = other, shared


def passes(texts: list[Text], size: int | None) -> Iterator[list[Text]]:
    """Yield the texts in their order, as many at a time as have `size` fresh tokens at most; a longer one alone."""
    some: list[Text] = []
    for text in texts:
        if some and size is not None and sum(len(one.fresh) for one in (*some, text)) > size:
            yield some
            some = []
        some.append(text)
    if some:
        yield some


def alike(one: list[int], other: list[int]) -> int:
    """Return how many tokens two texts have in common at their beginning."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
