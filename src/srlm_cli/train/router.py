"""Routers of a mixture of experts in training: as in evaluation, without noise and without a balancing loss.

Neither loss has a place for them. With noise the policy differs from its reference before the first step, and a row's
loss depends on what is drawn. And TRL asks a model for its router logits where its configuration knows that word; some
cannot answer: Granite 4 without experts, and those whose configuration counts experts under another name.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

SETTINGS = {"output_router_logits": False, "router_aux_loss_coef": 0.0}
NOISE = {"jitter_noise": 0.0, "input_jitter_noise": 0.0, "moe_jitter_eps": None}  # on inputs, in training only


def switch_off(model: Any) -> dict[str, Any]:
    """Let a model compute no balancing loss; return its settings as they were."""
    config = model.config.get_text_config()
    before = {name: getattr(config, name) for name in SETTINGS if hasattr(config, name)}
    switch_back(model, {name: SETTINGS[name] for name in before})
    return before


def switch_back(model: Any, settings: dict[str, Any]) -> None:
    """Give a model settings that it had before."""
    for name, value in settings.items():
        setattr(model.config.get_text_config(), name, value)


def route_as_in_evaluation(model: Any) -> None:
    """Take the noise from the routers of a model; what draws experts in training (PhiMoE) takes the best ones."""
    for module in model.modules():
        for name, value in NOISE.items():
            if getattr(module, name, None):
                setattr(module, name, value)
        if has_own_pass(module):
            module.training = False
            module.train = MethodType(lambda self, mode=True: self, module)


def has_own_pass(module: Any) -> bool:
    """Tell whether a module is a linear layer with a pass of its own, as a router may be; not one of packed weights."""
    import torch

    kind = type(module)
    packed = kind.__module__.startswith("bitsandbytes")
    return isinstance(module, torch.nn.Linear) and kind.forward is not torch.nn.Linear.forward and not packed
