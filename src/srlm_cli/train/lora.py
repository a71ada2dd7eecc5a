"""A new LoRA adapter on a model: on every linear layer that reads its weights by its own forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from srlm_cli.train.router import has_own_pass

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from srlm_cli.train.options import TrainSpec


def add_adapter(model: PreTrainedModel, spec: TrainSpec) -> PeftModel:
    """Return a model with a new adapter on it, of the rank, scale and dropout of a spec."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.lora_r,
        lora_alpha=spec.lora_alpha or 2 * spec.lora_r,
        lora_dropout=spec.dropout,
        target_modules="all-linear",
        exclude_modules=sorted(unfit(model)) or None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    # peft notes where the base was loaded from; its name finds it again on another machine too.
    model.peft_config["default"].base_model_name_or_path = spec.model
    return model


def unfit(model: PreTrainedModel) -> Iterator[str]:
    """Yield the linear layers that an adapter must leave alone.

    A router that is a linear layer with a pass of its own (PhiMoE), which gives more than one tensor; and the output
    of a Mamba mixer, whose fused kernel takes the weights past the layer.
    """
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if "conv1d" in children and "out_proj" in children:
            yield f"{name}.out_proj"
        if has_own_pass(module):
            yield name
