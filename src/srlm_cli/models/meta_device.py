"""The meta device, on which transformers makes a model before it loads the weights: its tensors have no data.

PyTorch computes there by Python code that imports sympy, which takes longer than to load a small model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.init import normal_
from torch.overrides import TorchFunctionMode


class NoArithmetic(TorchFunctionMode):
    """Leaves little to compute on the meta device: ranges are made on the processor, and no number is drawn."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is normal_ and (tensor := kwargs.get("tensor", *args[:1])).is_meta:
            return tensor
        if function is torch.arange and torch.device(kwargs.get("device") or "cpu").type == "meta":
            kwargs = {**kwargs, "device": "cpu"}
        return function(*args, **kwargs)


def load_lightly(load: Callable[[], Any]) -> Any:
    """Return what a loader of transformers returns, without that code where the model can be made without it."""
    try:
        with NoArithmetic():
            return load()
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
    return load()
