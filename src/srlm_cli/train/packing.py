"""Rows of a batch side by side in one pass, without padding; what two of them begin with is computed once.

A pair's replies have their prompt in common, and each pass reads all weights and adds to all their gradients, however
few tokens it has. `python benchmarks/packing.py` and docs/measurements.md show the effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from srlm_cli.forward.attention import attention_context
from srlm_cli.forward.packed import PackedModel
from srlm_cli.forward.prefix import CachedPrefix, find_prefixes
from srlm_cli.train.dropout import drops_out
from srlm_cli.train.packed_attention import RowsPass

TOKENS = 1024  # in one pass, unless one row has more; more of them take more memory

Context = Callable[[], AbstractContextManager[Any]]


class Packing:
    """Whether a model's rows can be packed, and the passes over rows that are.

    They can be on a CPU, where the engine of `--engine hf` can, without dropout (each row would need numbers of
    its own), and without gradient checkpointing, which comes back to a layer when the pass is over.
    """

    def __init__(self, model: Any) -> None:
        self.bare = model.get_base_model() if hasattr(model, "peft_config") else model
        self.packed = PackedModel(self.bare, "cpu")
        training = self.bare.training
        self.bare.eval()
        with torch.no_grad():
            packs = self.bare.device.type == "cpu" and not getattr(self.bare, "own_attention", False)
            self.fits = packs and self.packed.fits(paged=False)
        self.bare.train(training)

    def now(self) -> bool:
        """Return whether packed passes give the same results as single passes, in the model's current state."""
        if not self.fits or self.checkpoints():
            return False
        return not self.bare.training or not drops_out(self.bare)

    def checkpoints(self) -> bool:
        """Return whether the model computes its layers again for their gradient."""
        return any(getattr(layer, "gradient_checkpointing", False) for layer in self.bare.modules())

    def logits(
        self, model: Callable[..., Any], rows: list[list[int]], places: list[list[int]]
    ) -> Iterator[torch.Tensor]:
        """Yield the logits, (places, vocabulary) in float32, after the given positions of each row, pass by pass.

        `model` is called with `input_ids`, (1, tokens), and `logits_to_keep`, packed ones also with `position_ids`.
        """
        for some, inputs, context in self.passes(rows, places):
            with context():
                output = model(**inputs, use_cache=False)
            yield from output.logits[0].float().split([len(wanted) for wanted in places[some]])

    def losses(
        self, model: Callable[..., Any], rows: list[list[int]], places: list[list[int]], targets: list[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """Yield the summed loss of each pass; `targets` are the next tokens after the given positions of each row.

        `model` is called as for `logits`, and with `targets` (see `chunked_logits`).
        """
        for some, inputs, context in self.passes(rows, places):
            with context():
                yield model(**inputs, targets=torch.cat(targets[some]), use_cache=False).loss

    def passes(
        self, rows: list[list[int]], places: list[list[int]]
    ) -> Iterator[tuple[slice, dict[str, torch.Tensor], Context]]:
        """Yield the rows of each pass, the inputs of the model, and what makes the context to call it in."""
        if not self.now():
            for at, (row, wanted) in enumerate(zip(rows, places, strict=True)):
                inputs = {"input_ids": torch.tensor([row]), "logits_to_keep": torch.tensor(wanted, dtype=torch.long)}
                yield slice(at, at + 1), inputs, nullcontext
            return
        for some in groups(map(len, rows), len(rows)):
            with_prefixes = [CachedPrefix(row) for row in rows[some]]
            find_prefixes(with_prefixes, [])
            yield some, *self._together(with_prefixes, places[some])

    def _together(self, texts: list[CachedPrefix], places: list[list[int]]) -> tuple[dict[str, torch.Tensor], Context]:
        run = RowsPass(texts)

        def packed_place(text: CachedPrefix, place: int) -> int:
            while place < text.shared:
                text = text.prefix
            return run.begin[id(text)] + place - text.shared

        kept = [packed_place(text, place) for text, wanted in zip(texts, places, strict=True) for place in wanted]
        inputs = {
            "input_ids": torch.tensor([[token for text in texts for token in text.fresh]]),
            "position_ids": torch.tensor([[at for text in texts for at in range(text.shared, len(text.tokens))]]),
            "logits_to_keep": torch.tensor(kept, dtype=torch.long),
        }
        return inputs, partial(attention_context, run, self.packed.configs)


def groups(lengths: Iterable[int], most: int) -> Iterator[slice]:
    """Yield runs of rows that have together `TOKENS` tokens at most, or are one row; `most` rows a run."""
    begin = end = tokens = 0
    for length in lengths:
        if end > begin and (tokens + length > TOKENS or end - begin == most):
            yield slice(begin, end)
            begin, tokens = end, 0
        end, tokens = end + 1, tokens + length
    if end > begin:
        yield slice(begin, end)
