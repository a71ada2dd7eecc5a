"""A cross-entropy whose logits are made for some target tokens at a time, and again for their gradient.

The logits of a row of 2,048 targets and 150,000 tokens take 1.2 GB, and their gradient as much. Here at most `CHUNK`
of them are in memory; the backward pass computes them again. A model's own code makes them from the last hidden
states, so what it does after its output layer (soft-capping, a scale) is part of them.

This module imports torch and is itself imported late.
"""

from __future__ import annotations

from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from srlm_cli import distributed
from srlm_cli.train.data import IGNORED

CHUNK = 2**25  # logits at a time: 128 MB in float32


def add_chunked_loss(model: Any) -> None:
    """Let a causal LM answer `model(..., logits_to_keep=positions, targets=targets)` with a summed loss.

    `targets`, (rows x positions,), are the next tokens after the positions, which are the same in all rows;
    `IGNORED` ones have no loss. Where weights are sharded over processes, all logits are made at the same time.
    """
    whole, body = model.forward, body_of(model)

    def forward(self: Any, *args: Any, targets: Any = None, **inputs: Any) -> Any:
        if targets is None:
            return whole(*args, **inputs)
        most = max(1, CHUNK // self.get_output_embeddings().weight.shape[0])
        if body is None or len(targets) <= most or distributed.sharded():
            return CausalLMOutput(loss=summed_loss(whole(*args, **inputs).logits.flatten(0, 1), targets))
        kept = inputs.pop("logits_to_keep")
        read = body(*args, **inputs)
        states = read.last_hidden_state[:, kept].flatten(0, 1)

        def loss(some: Any, wanted: Any) -> Any:
            return summed_loss(logits_of(whole, body, read, some), wanted)

        parts = zip(states.split(most), targets.split(most), strict=True)
        return CausalLMOutput(loss=sum(checkpoint(loss, *part, use_reentrant=False) for part in parts))

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
