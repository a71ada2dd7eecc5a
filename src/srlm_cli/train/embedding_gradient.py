"""An input embedding whose gradient is added only to the rows of its tokens.

PyTorch makes a gradient of the size of the whole table in each backward pass, 113 MB for SmolLM2-135M, also for a
row of few tokens. The cost for a short row: `python benchmarks/packing.py --passes`, docs/measurements.md.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.nn import Embedding
from torch.nn.functional import embedding

Kept = dict[str, torch.Tensor]


class Looked(torch.autograd.Function):
    """Rows of a table; backward adds their gradients to the table's `grad` and hands none on."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, ids: torch.Tensor, padding: int | None, kept: Kept) -> torch.Tensor:
        """Return the rows of `table` (tokens, size) at `ids` of any shape; `kept` keeps memory for the gradient."""
        ctx.table, ctx.padding, ctx.kept = table, padding, kept
        ctx.save_for_backward(ids)
        return embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, None]:
        """Add the gradient of each row; the padding token has none."""
        ids, rows = ctx.saved_tensors[0].flatten(), gradient.flatten(0, -2).to(ctx.table.dtype)
        if ctx.padding is not None:
            rows = rows.masked_fill((ids == ctx.padding)[:, None], 0.0)
        if ctx.table.grad is None:  # to fill new memory takes several times as long
            if "gradient" not in ctx.kept:
                ctx.kept["gradient"] = torch.empty_like(ctx.table)
            ctx.table.grad = ctx.kept["gradient"].zero_()
        ctx.table.grad.index_add_(0, ids, rows)
        return None, None, None, None


def add_by_row(model: Any) -> None:
    """Let a model's input embedding add its gradient by row, where it is a plain table.

    Nothing but the `grad` of the table learns of it, so not for processes that share their gradients.
    """
    table = model.get_input_embeddings()
    if type(table) is Embedding and table.max_norm is None and not table.scale_grad_by_freq:
        kept: Kept = {}

        def forward(self: Embedding, ids: torch.Tensor) -> torch.Tensor:
            if not (self.weight.requires_grad and torch.is_grad_enabled()):
                return embedding(ids, self.weight)
            return Looked.apply(self.weight, ids, self.padding_idx, kept)

        table.forward = MethodType(forward, table)
