"""A new LoRA adapter: on every linear layer that can have one, or on the layers and parameters that a user names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from srlm_cli.errors import OptionError
from srlm_cli.models.adapters import save_with_embeddings
from srlm_cli.train.router import has_own_forward

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from srlm_cli.train.options import TrainSpec

SHOWN = 30  # names in an error message


def add_adapter(model: PreTrainedModel, spec: TrainSpec, tokens: list[int] | None = None) -> PeftModel:
    """Return a model with a new adapter, of the rank, scale, dropout and targets of a spec.

    The embeddings of `tokens` are trained with it. Raises OptionError if a target names no layer or parameter.
    """
    from peft import LoraConfig, get_peft_model

    layers = [name for name in linear_layers(model) if name not in set(unsuitable(model))]
    if spec.lora_target:
        refuse_unknown("--lora-target", spec.lora_target, layers, "linear layers")
        chosen = [name for name in layers if any(f".{name}".endswith(f".{asked}") for asked in spec.lora_target)]
    else:
        routing = set(routers(model))
        chosen = [name for name in layers if name not in routing]
    if spec.lora_target_parameters:
        refuse_unknown("--lora-target-parameters", spec.lora_target_parameters, experts(model), "expert parameters")
        if spec.dropout:
            raise OptionError("--lora-target-parameters: such an adapter cannot have --dropout", "--dropout 0")
    # Not "all-linear": for some mixtures (Mixtral) peft 0.21 adds the routers and all experts to it.
    ends = {name.rpartition(".")[2] for name in chosen}
    left_out = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends} - set(chosen)
    config = LoraConfig(
        r=spec.lora_r,
        lora_alpha=spec.lora_alpha or 2 * spec.lora_r,
        lora_dropout=spec.dropout,
        target_modules=sorted(ends),
        target_parameters=list(spec.lora_target_parameters) or None,
        exclude_modules=sorted(left_out) or None,
        trainable_token_indices=dict.fromkeys(embeddings(model), tokens) if tokens else None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    # peft notes where the base was loaded from; its name finds it again on another machine too.
    model.peft_config["default"].base_model_name_or_path = spec.model
    model.peft_config["default"].revision = spec.revision
    save_with_embeddings(model, False)
    return model


def embeddings(model: PreTrainedModel) -> list[str]:
    """Return the names of the embedding layers, as peft takes them: of the output too, if it has weights of its own."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    distinct = layers[: 1 if layers[0].weight is layers[1].weight else 2]
    return [name.rpartition(".")[2] for name, module in model.named_modules() if module in distinct]


def refuse_unknown(option: str, asked: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise OptionError for a name that is neither one of the known names nor the end of one.

    peft refuses only a list of which no name matches.
    """
    known = list(known)
    for name in asked:
        if not any(one == name or one.endswith(f".{name}") for one in known):
            ends = sorted({short(one) for one in known})
            more = f" and {len(ends) - SHOWN} more" if len(ends) > SHOWN else ""
            there = f"one of {', '.join(ends[:SHOWN])}{more}" if ends else f"the model has no {what}"
            raise OptionError(f"{option} {name}: the model has no such name among its {what}", there)


def short(name: str) -> str:
    """Return a name without what comes before the number of its last layer."""
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers and numbers[-1] + 1 < len(parts) else name


def linear_layers(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names of linear layers; the output layer is not one of them, as in peft's `all-linear`."""
    import torch
    from transformers.pytorch_utils import Conv1D  # a linear layer of GPT-2

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            yield name


def experts(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names of parameters that hold the weights of all experts of a layer in one tensor of 3 dimensions."""
    for name, weight in model.named_parameters():
        if weight.ndim == 3 and "conv1d" not in name:
            yield name


def routers(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names of the linear layers that choose between experts: a `router`, or a `gate` beside `experts`.

    An adapter there changes which experts work. Tools that train experts leave it out (peft issue 3009).
    """
    import torch

    for name, module in model.named_modules():
        children = dict(module.named_children())
        found = [child for child in children if child == "router" or (child == "gate" and "experts" in children)]
        for child in found:
            for below, layer in children[child].named_modules():
                if isinstance(layer, torch.nn.Linear):
                    yield ".".join(part for part in (name, child, below) if part)


def unsuitable(model: Any) -> Iterator[str]:
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
