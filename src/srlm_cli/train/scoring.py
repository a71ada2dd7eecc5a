"""Log-probabilities of target tokens on a CPU: a row at a time without its padding, logits of the targets only.

TRL's own scoring makes logits for all positions of a padded batch where there is no GPU, which costs
time and memory on a CPU (docs/measurements.md).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

KNOWN = {"input_ids", "attention_mask", "labels", "use_cache"}
# What some architectures do to their logits, which is left to TRL.
SCALINGS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def score_by_row(model: Any) -> None:
    """Give a model on a CPU another way to answer `model(..., labels=..., fused_lm_head=True)`.

    The answer is that of TRL's `add_fused_lm_head`, which must have been called on the model: a
    `FusedCausalLMOutput` whose fields are (rows, positions - 1), zero where there is no label.
    """
    bare = model.get_base_model() if hasattr(model, "peft_config") else model
    padded = bare.forward
    config = bare.config.get_text_config()
    plain = not any(getattr(config, name, None) for name in SCALINGS)

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        given = {name for name, value in inputs.items() if value is not None}  # peft passes on what is not set
        if not fused_lm_head or not plain or self.device.type != "cpu" or given - KNOWN:
            return padded(*args, fused_lm_head=fused_lm_head, **inputs)
        return by_row(self, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])

    bare.forward = MethodType(forward, bare)


def by_row(model: Any, ids: Any, mask: Any, labels: Any) -> Any:
    """Return the scores of each row's next tokens; padding must stand at the end of a row."""
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

    head = model.get_output_embeddings()
    fields: dict[str, list[Any]] = {"log_probs": [], "entropy": [], "mean_logits": [], "is_top1": []}
    for row, length, wanted in zip(ids, mask.sum(1).tolist(), labels[:, 1:], strict=True):
        hidden = model.base_model(input_ids=row[None, :length], use_cache=False).last_hidden_state[0, :-1]
        places = (wanted[: length - 1] != -100).nonzero()[:, 0]
        targets, logits = wanted[places], head(hidden[places]).float()
        found = {"log_probs": -torch.nn.functional.cross_entropy(logits, targets, reduction="none")}
        with torch.no_grad():
            log_probs = logits.log_softmax(-1)
            found["entropy"] = -(log_probs.exp() * log_probs).sum(-1)
            found["mean_logits"] = logits.mean(-1)
            found["is_top1"] = logits.argmax(-1) == targets
        for name, values in found.items():
            empty = values.new_zeros(wanted.shape)
            fields[name].append(empty.index_put((places,), values))
    return FusedCausalLMOutput(**{name: torch.stack(rows) for name, rows in fields.items()})
