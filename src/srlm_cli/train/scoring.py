"""Log-probabilities of target tokens on a CPU: rows without their padding, logits of the targets only.

TRL's own scoring makes logits for all positions of a padded batch where there is no GPU, which costs
time and memory on a CPU (docs/measurements.md).
This module imports torch and TRL and is itself imported late.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from trl.trainer.utils import FusedCausalLMOutput

from srlm_cli.train.packing import Packing

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")
KNOWN = {"input_ids", "attention_mask", "labels", "use_cache"}


def score_without_padding(packing: Packing, weighted: bool = False) -> None:
    """Give a packing's model on a CPU another way to answer `model(..., labels=..., fused_lm_head=True)`.

    The answer is that of TRL's `add_fused_lm_head`, which must have been called on the model: a
    `FusedCausalLMOutput` whose fields are (rows, positions - 1), zero where there is no label. With `weighted`
    it has `log_sum_sq_probs`, too, of which WPO makes its weights.
    """
    bare, padded = packing.bare, packing.bare.forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        given = {name for name, value in inputs.items() if value is not None}  # peft passes on what is not set
        if not fused_lm_head or self.device.type != "cpu" or given - KNOWN:
            return padded(*args, fused_lm_head=fused_lm_head, **inputs)
        return scores(padded, packing, inputs["input_ids"], inputs["attention_mask"], inputs["labels"], weighted)

    bare.forward = MethodType(forward, bare)


def scores(
    model: Callable[..., Any], packing: Packing, ids: Any, mask: Any, labels: Any, weighted: bool = False
) -> Any:
    """Return the scores of each row's next tokens; padding must be at the end of a row."""
    lengths, wanted = mask.sum(1).tolist(), labels[:, 1:]
    rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    places = [(row[: length - 1] != -100).nonzero()[:, 0] for row, length in zip(wanted, lengths, strict=True)]
    names = (*FIELDS, "log_sum_sq_probs") if weighted else FIELDS
    fields: dict[str, list[Any]] = {name: [None] * len(rows) for name in names}
    pairs = len(rows) - len(rows) // 2  # the replies to a prompt, half of the rows apart, are read together
    order = sorted(range(len(rows)), key=lambda at: at % pairs)
    found = packing.logits(model, [rows[at] for at in order], [places[at].tolist() for at in order])
    for row, logits in zip(order, found, strict=True):  # one pass after the other: logits are large
        at, targets = places[row], wanted[row][places[row]]
        scored = {"log_probs": -torch.nn.functional.cross_entropy(logits, targets, reduction="none")}
        with torch.no_grad():
            log_probs = logits.log_softmax(-1)
            scored["entropy"] = -(log_probs.exp() * log_probs).sum(-1)
            scored["mean_logits"] = logits.mean(-1)
            scored["is_top1"] = logits.argmax(-1) == targets
            if weighted:
                scored["log_sum_sq_probs"] = (2 * log_probs).logsumexp(-1)
        for name, values in scored.items():
            fields[name][row] = values.new_zeros(wanted[row].shape).index_put((at,), values)
    return FusedCausalLMOutput(**{name: torch.stack(parts) for name, parts in fields.items()})
