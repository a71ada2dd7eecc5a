"""Dropout: set one probability for all layers of a model, and find out whether it has any dropout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def set_share(model: Any, share: float) -> None:
    """Give a model one share everywhere."""
    for holder, name in list(places(model)):
        setattr(holder, name, share)


def drops_out(model: Any) -> bool:
    """Return whether a model in training sets anything to zero at random."""
    return any(getattr(holder, name) > 0 for holder, name in places(model))


def places(model: Any) -> Iterator[tuple[Any, str]]:
    """Yield where a model keeps a share: dropout layers, layers with a number of their own, the configuration."""
    import torch

    for holder in (*model.modules(), model.config, model.config.get_text_config()):
        if isinstance(holder, torch.nn.Dropout):
            yield holder, "p"
        for name, value in vars(holder).items():
            if ("dropout" in name or name.endswith("pdrop")) and type(value) in (int, float):
                yield holder, name
