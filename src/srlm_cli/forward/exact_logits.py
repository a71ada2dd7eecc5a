"""Logits of a few tokens in float32, from a model whose weights are in 16 bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_logits(net, tokens: Iterable[int]) -> Iterator[None]:
    """Compute the logits of `tokens` in float32 inside this context; those of the others stay as they are.

    bfloat16 has 8 bits for a number: logits near 20 are then multiples of 1/8, so that probabilities of two tokens are
    often equal, or 13% apart. A head whose weights are packed (quantized) is left as it is.
    """
    head = net.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    columns = torch.tensor(sorted(tokens), device=head.weight.device)
    weight = head.weight[columns].float()
    bias = None if head.bias is None else head.bias[columns].float()

    def in_float32(module, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
        exact = torch.nn.functional.linear(inputs[0].float(), weight, bias)
        return logits.float().index_copy(-1, columns, exact)

    handle = head.register_forward_hook(in_float32)
    try:
        yield
    finally:
        handle.remove()
