"""A new LoRA adapter, on every linear layer that can have one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from srlm_cli.train.router import has_own_forward

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from srlm_cli.train.options import TrainSpec


def add_adapter(model: PreTrainedModel, spec: TrainSpec) -> PeftModel:
    """Return a model with a new adapter, of the rank, scale and dropout of a spec."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.lora_r,
        lora_alpha=spec.lora_alpha or 2 * spec.lora_r,
        lora_dropout=spec.dropout,
        target_modules="all-linear",
        exclude_modules=sorted(unsuitable(model)) or None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    # peft notes where the base was loaded from; its name finds it again on another machine too.
    model.peft_config["default"].base_model_name_or_path = spec.model
    return model


def unsuitable(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names of linear layers that cannot have an adapter.

    A router with a forward pass of its own (PhiMoE) returns several tensors. The fused kernels of a Mamba mixer use the
    weights of its `out_proj` without calling the layer, so an adapter there would be ignored.
    """
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if "conv1d" in children and "out_proj" in children:
            yield f"{name}.out_proj"
        if has_own_forward(module):
            yield name
