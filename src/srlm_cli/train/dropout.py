"""The shares of numbers that a model in training sets to zero: one for all its layers, and whether there is any."""

from __future__ import annotations

from typing import Any


def fields(holder: Any) -> list[str]:
    """Return the attributes of a layer, or of a configuration, that are such a share."""
    return [
        name
        for name, value in vars(holder).items()
        if ("dropout" in name or name.endswith("pdrop")) and type(value) in (int, float)
    ]


def set_share(model: Any, share: float) -> None:
    """Give a model one share: its dropout layers, those layers that keep a number of their own, its configuration."""
    import torch

    for holder in (*model.modules(), *configs(model)):
        if isinstance(holder, torch.nn.Dropout):
            holder.p = share
        for name in fields(holder):
            setattr(holder, name, share)


def drops_out(model: Any) -> bool:
    """Tell whether a model in training sets anything to zero at random."""
    import torch

    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Dropout)]
    own = [getattr(holder, name) for holder in (*model.modules(), *configs(model)) for name in fields(holder)]
    return any(layer.p > 0 for layer in layers) or any(share > 0 for share in own)


def configs(model: Any) -> list[Any]:
    """Return the configuration of a model, and that of its text model where it is another."""
    return list({id(one): one for one in (model.config, model.config.get_text_config())}.values())
