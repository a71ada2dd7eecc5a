"""Routers of mixtures of experts: in training they work as in evaluation, without noise and without a balancing loss.

The losses of SFT and DPO have no such term, and with noise the policy differs from its reference before the first step.
TRL asks for router logits if the configuration has `output_router_logits`; Granite 4 without experts has none, and TRL
does not find the number of experts in some other configurations.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

SETTINGS = {"output_router_logits": False, "router_aux_loss_coef": 0.0}
NOISE = {"jitter_noise": 0.0, "input_jitter_noise": 0.0, "moe_jitter_eps": None}  # attributes, used in training only


def disable_balancing_loss(model: Any) -> dict[str, Any]:
    """Set the router settings of a model for training without a balancing loss; return the previous ones."""
    config = model.config.get_text_config()
    before = {name: getattr(config, name) for name in SETTINGS if hasattr(config, name)}
    set_router_settings(model, {name: SETTINGS[name] for name in before})
    return before


def set_router_settings(model: Any, settings: dict[str, Any]) -> None:
    """Set router settings in the configuration of a model."""
    for name, value in settings.items():
        setattr(model.config.get_text_config(), name, value)


def disable_noise(model: Any) -> None:
    """Let the routers of a model work in training as in evaluation: PhiMoE would sample its experts."""
    for module in model.modules():
        for name, value in NOISE.items():
            if getattr(module, name, None):
                setattr(module, name, value)
        if has_own_forward(module):
            module.training = False
            module.train = MethodType(lambda self, mode=True: self, module)


def has_own_forward(module: Any) -> bool:
    """Return whether a module is a linear layer with a forward pass of its own, such as PhiMoE's router."""
    import torch

    kind = type(module)
    quantized = kind.__module__.startswith("bitsandbytes")
    return isinstance(module, torch.nn.Linear) and kind.forward is not torch.nn.Linear.forward and not quantized
