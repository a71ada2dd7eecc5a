"""Log-probabilities of target tokens on a CPU: rows without their padding, logits of the targets only, in chunks.

TRL's own scoring makes logits for all positions of a padded batch where there is no GPU, which costs
time and memory on a CPU (docs/measurements.md).
This module imports torch and TRL and is itself imported late.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.nn.functional import nll_loss
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import FusedCausalLMOutput

from srlm_cli.records import Record
from srlm_cli.train.chunked_logits import ChunkedLogits
from srlm_cli.train.heap import give_back_freed_memory
from srlm_cli.train.packing import TOKENS, Context, Packing

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")
KNOWN = {"input_ids", "attention_mask", "labels", "use_cache"}
WHOLE = 1.5  # chunks, in which the logits of 1,024 tokens of a vocabulary of 49,152 fit: two chunks take 8% longer
AT_A_TIME = 64  # tokens whose figures are computed together, so that their logits stay in the processor's cache


def score_without_padding(packing: Packing, weighted: bool = False) -> None:
    """Give a packing's model on a CPU another way to answer `model(..., labels=..., fused_lm_head=True)`.

    The answer is that of TRL's `add_fused_lm_head`, which must have been called on the model: a
    `FusedCausalLMOutput` whose fields are (rows, positions - 1), zero where there is no label. With `weighted`
    it has `log_sum_sq_probs`, too, of which WPO makes its weights.
    """
    bare, padded = packing.bare, packing.bare.forward
    logits = ChunkedLogits(bare, WHOLE)

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        given = {name for name, value in inputs.items() if value is not None}  # peft passes on what is not set
        if not fused_lm_head or self.device.type != "cpu" or given - KNOWN:
            return padded(*args, fused_lm_head=fused_lm_head, **inputs)
        return scores(logits, packing, inputs["input_ids"], inputs["attention_mask"], inputs["labels"], weighted)

    bare.forward = MethodType(forward, bare)


def scores(logits: ChunkedLogits, packing: Packing, ids: Any, mask: Any, labels: Any, weighted: bool = False) -> Any:
    """Return the scores of each row's next tokens; padding must be at the end of a row.

    The passes of one long pair are kept in memory one at a time: the others are computed again for their gradient.
    """
    lengths, wanted = mask.sum(1).tolist(), labels[:, 1:]
    rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    places = [(row[: length - 1] != -100).nonzero()[:, 0] for row, length in zip(wanted, lengths, strict=True)]
    names = (*FIELDS, "log_sum_sq_probs") if weighted else FIELDS
    fields: dict[str, list[Any]] = {name: [None] * len(rows) for name in names}
    pairs = len(rows) - len(rows) // 2  # the replies to a prompt, half of the rows apart, are read together
    order = sorted(range(len(rows)), key=lambda at: at % pairs)
    score = partial(token_scores, weighted=weighted)

    recomputes = sum(lengths) > TOKENS and torch.is_grad_enabled() and not packing.checkpoints()

    def read(targets: Any, inputs: Record, context: Context) -> list[Any]:
        if recomputes:
            give_back_freed_memory()
        with context():
            return logits.scores(score, targets, **inputs, use_cache=False)

    for some, *how in packing.passes([rows[at] for at in order], [places[at].tolist() for at in order]):
        targets = torch.cat([wanted[row][places[row]] for row in order[some]])
        if recomputes and some.stop < len(rows):  # the last pass, whose gradient is the first, is kept
            found = checkpoint(read, targets, *how, use_reentrant=False)
        else:
            found = read(targets, *how)
        for name, parts in zip(names, zip(*found, strict=True), strict=True):
            by_row = torch.cat(parts).split([len(places[row]) for row in order[some]])
            for row, values in zip(order[some], by_row, strict=True):
                fields[name][row] = values.new_zeros(wanted[row].shape).index_put((places[row],), values)
    return FusedCausalLMOutput(**{name: torch.stack(parts) for name, parts in fields.items()})


def token_scores(logits: Any, targets: Any, weighted: bool) -> list[Any]:
    """Return the scores of targets, (tokens,) each, as `FIELDS` names them, and `log_sum_sq_probs` with `weighted`.

    Only the first have a gradient. They come first, since a chunk that is computed again for it stops there.
    """
    logits = logits.float()
    log_probs = logits.log_softmax(-1)
    of_targets = -nll_loss(log_probs, targets, reduction="none")
    with torch.no_grad():
        parts = zip(*(values.split(AT_A_TIME) for values in (logits, log_probs, targets)), strict=True)
        figures = zip(*(token_figures(*part, weighted) for part in parts), strict=True)
        return [of_targets, *map(torch.cat, figures)]


def token_figures(logits: Any, log_probs: Any, targets: Any, weighted: bool) -> list[Any]:
    """Return what TRL logs of targets, (tokens,) each, and of which WPO makes its weights."""
    found = [-(log_probs.exp() * log_probs).sum(-1), logits.mean(-1), logits.argmax(-1) == targets]
    return [*found, (2 * log_probs).logsumexp(-1)] if weighted else found
