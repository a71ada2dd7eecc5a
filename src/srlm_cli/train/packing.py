"""Rows of a batch side by side in one pass, without padding; what two of them begin with is computed once.

A pair's replies have their prompt in common, and each pass reads all weights and adds to all their gradients, however
few tokens it has. `python benchmarks/packing.py` and docs/measurements.md show the effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch

from srlm_cli.forward.attention import Prefill, attention_context
from srlm_cli.forward.packed import PackedModel
from srlm_cli.forward.prefix import CachedPrefix, find_prefixes
from srlm_cli.train.dropout import drops_out

TOKENS = 1024  # in one pass, unless one row has more; more of them take more memory


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
            self.fits = self.bare.device.type == "cpu" and self.packed.fits(paged=False)
        self.bare.train(training)

    def now(self) -> bool:
        """Return whether packed passes give the same results as single passes, in the model's current state."""
        layers = list(self.bare.modules())
        if not self.fits or any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
            return False
        return not self.bare.training or not drops_out(self.bare)

    def logits(
        self, model: Callable[..., Any], rows: list[list[int]], places: list[list[int]]
    ) -> Iterator[torch.Tensor]:
        """Yield the logits, (places, vocabulary) in float32, after the given positions of each row, pass by pass.

        `model` is called with `input_ids`, (1, tokens), and `logits_to_keep`, packed ones also with `position_ids`.
        """
        if not self.now():
            yield from (alone(model, row, wanted) for row, wanted in zip(rows, places, strict=True))
            return
        for some in groups(map(len, rows), len(rows)):
            with_prefixes = [CachedPrefix(row) for row in rows[some]]
            find_prefixes(with_prefixes, [])
            yield from self._together(model, with_prefixes, places[some])

    def _together(
        self, model: Callable[..., Any], texts: list[CachedPrefix], places: list[list[int]]
    ) -> Iterable[torch.Tensor]:
        begins = [0, *accumulate(len(text.fresh) for text in texts)]
        begin_of = {id(text): begin for text, begin in zip(texts, begins, strict=False)}

        def packed_place(text: CachedPrefix, place: int) -> int:
            while place < text.shared:
                text = text.prefix
            return begin_of[id(text)] + place - text.shared

        ids = [token for text in texts for token in text.fresh]
        positions = [place for text in texts for place in range(text.shared, len(text.tokens))]
        kept = [packed_place(text, place) for text, wanted in zip(texts, places, strict=True) for place in wanted]
        with attention_context(Prefill(texts, None, trained=True), self.packed.configs):
            output = model(
                input_ids=torch.tensor([ids]),
                position_ids=torch.tensor([positions]),
                logits_to_keep=torch.tensor(kept, dtype=torch.long),
                use_cache=False,
            )
        return output.logits[0].float().split([len(wanted) for wanted in places])


def alone(model: Callable[..., Any], row: list[int], places: list[int]) -> torch.Tensor:
    """Return the logits after the given positions of one row, which is computed by itself."""
    kept = torch.tensor(places, dtype=torch.long)
    return model(input_ids=torch.tensor([row]), logits_to_keep=kept, use_cache=False).logits[0].float()


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
