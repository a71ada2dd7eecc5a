"""transformers for a causal language model on CPU cores, imported without what such a model does not use.

transformers 5.23 imports PyTorch's compiler, its sharded tensors and SciPy for a few names: over a third of the time
until a command has its first row. In one process without an accelerator nothing is compiled here, nothing is sharded,
and no loss is that of an object detector. There, those names are stand-ins while transformers is imported; each of them
fetches the real one when it is used. What is imported later sees PyTorch and SciPy as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from srlm_cli import distributed

COMPILER, SHARDED = "torch._dynamo", "torch.distributed.tensor"
MASKS = f"{COMPILER}._trace_wrapped_higher_order_op"  # transformers.masking_utils imports one class of it


def unchanged(function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    """Return a function as it is, in place of a decorator that tells the compiler something about it."""
    return function or unchanged


class Late(ModuleType):
    """A module that is imported when it is used; until then it has only what is given here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(real(self.__name__), name)


def real(name: str) -> ModuleType:
    """Return the module itself, not its placeholder."""
    if isinstance(sys.modules.get(name), Late):
        del sys.modules[name]
    return import_module(name)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Let transformers be imported without the compiler, sharded tensors and SciPy in this context."""
    from transformers import utils
    from transformers.utils import import_utils

    models, names_in = Path(utils.__file__).parents[1] / "models", import_utils.create_import_structure_from_path

    def once(path: str | Path) -> Any:
        """Read the models' sources for their folder alone, which is remembered, and not again for its __init__.py."""
        return names_in(models if Path(path) == models / "__init__.py" else path)

    compiler, masks = Late(COMPILER), Late(MASKS)
    decorators = ("allow_in_graph", "assume_constant_result", "disable")
    for name in decorators:
        setattr(compiler, name, unchanged)
    masks.TransformGetItemToIndex = lambda: real(MASKS).TransformGetItemToIndex()
    with patch.object(torch.distributed, "is_available", lambda: False):
        utils.is_torch_distributed_available()  # it remembers the answer
    with ExitStack() as changed:
        for name in decorators:
            changed.enter_context(patch.object(torch.compiler, name, unchanged))
        changed.enter_context(patch.object(utils, "is_scipy_available", lambda: False))
        changed.enter_context(patch.object(import_utils, names_in.__name__, once))
        torch._dynamo, sys.modules[MASKS] = compiler, masks
        try:
            yield
        finally:
            if torch._dynamo is compiler:
                del torch._dynamo
            if sys.modules.get(MASKS) is masks:
                del sys.modules[MASKS]
            if SHARDED not in sys.modules:  # peft 0.21 uses it without an import
                torch.distributed.tensor = Late(SHARDED)


def one_process_without_accelerator() -> bool:
    """Return whether a model can be neither sharded nor on an accelerator here."""
    return not distributed.started() and not torch.accelerator.is_available()


with stand_ins() if COMPILER not in sys.modules and one_process_without_accelerator() else ExitStack():
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    import_module("transformers.masking_utils")

__all__ = ["AttentionInterface", "AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig"]
