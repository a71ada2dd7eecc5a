"""Scores of target tokens whose logits are made for some of the tokens at a time, and again for their gradient.

The logits of a row of 2,048 targets and 150,000 tokens take 1.2 GB, and their gradient as much. Here at most `CHUNK`
of them are in memory; the backward pass computes them again. A model's own code makes them from the last hidden
states, so what it does after its output layer (soft-capping, a scale) is part of them.

This module imports torch and is itself imported late.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from srlm_cli import distributed
from srlm_cli.train.data import IGNORED
from srlm_cli.train.heap import give_back_freed_memory

CHUNK = 2**25  # logits at a time: 128 MB in float32

Score = Callable[[Any, Any], Any]


class ChunkedLogits:
    """The logits of a causal LM, by its forward pass as it is now, for some target tokens at a time."""

    def __init__(self, model: Any, whole: float = 1.0) -> None:
        """Take a model; the logits of a pass are not split if they are at most `whole` times those of a chunk."""
        self.model, self.forward, self.most_whole = model, model.forward, whole
        self.body = None if distributed.sharded() else body_of(model)

    def scores(self, score: Score, targets: Any, *args: Any, **inputs: Any) -> list[Any]:
        """Return what `score(logits, targets)` makes of each chunk of the targets, in order.

        `targets`, (rows x positions,), are the next tokens after the positions `logits_to_keep`, which are the same in
        all rows. They are one chunk if they are few, if the logits are not made of the last hidden states alone, and
        where weights are sharded over processes.
        """
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        if self.body is None or len(targets) * vocabulary <= self.most_whole * CHUNK:
            return [score(self.forward(*args, **inputs).logits.flatten(0, 1), targets)]
        kept = inputs.pop("logits_to_keep")
        give_back_freed_memory()
        read = self.body(*args, **inputs)
        give_back_freed_memory()
        states = read.last_hidden_state[:, kept].flatten(0, 1)

        def scored(some: Any, wanted: Any) -> Any:
            return score(logits_of(self.forward, self.body, read, some), wanted)

        chunks = -(-len(targets) // max(1, CHUNK // vocabulary))
        parts = zip(states.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
        return [checkpoint(scored, *part, use_reentrant=False) for part in parts]


def add_chunked_loss(model: Any) -> None:
    """Let a causal LM answer `model(..., logits_to_keep=positions, targets=targets)` with a summed loss.

    `targets` are as in `ChunkedLogits.scores`; `IGNORED` ones have no loss.
    """
    logits = ChunkedLogits(model)

    def forward(self: Any, *args: Any, targets: Any = None, **inputs: Any) -> Any:
        if targets is None:
            return logits.forward(*args, **inputs)
        return CausalLMOutput(loss=sum(logits.scores(summed_loss, targets, *args, **inputs)))

    model.forward = MethodType(forward, model)


def logits_of(whole: Any, body: Any, read: Any, states: Any) -> Any:
    """Return the logits, (tokens, vocabulary), that a model makes of hidden states, (tokens, size), of its body."""
    answer = type(read)(**{**read, "last_hidden_state": states[None]})
    with patch.object(body, "forward", lambda *args, **inputs: answer):
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        return whole(input_ids=ids, use_cache=False).logits[0]


def body_of(model: Any) -> Any:
    """Return the part of a model that makes the hidden states; None where the logits are not made of these alone."""
    ids = torch.arange(3, device=model.device)[None] + 3
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits[0]
            for body in (model.get_decoder(), model.base_model):
                read = body(input_ids=ids, use_cache=False)
                found = logits_of(model.forward, body, read, read.last_hidden_state[0].flip(0))
                if torch.allclose(found.flip(0), expected, rtol=1e-3, atol=1e-3):
                    return body
    except (AttributeError, TypeError):
        pass
    finally:
        model.train(training)
    return None


def summed_loss(logits: Any, targets: Any) -> Any:
    """Return the summed cross-entropy of targets, (tokens,), given logits, (tokens, vocabulary)."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
