"""Import transformers and TRL without the compiler, sharding and vision parts of their dependencies.

transformers imports `torch._dynamo`, `torch.distributed.tensor` and `scipy.optimize` for a few names that a causal LM
on a CPU, in one process, never uses: half of the time of its import. Within `light_imports` those names (`LATE`) are
stand-ins: the real module is imported when one of them is used, or when any other name of it is asked for. While
`torch._dynamo` is not imported nothing is compiled, so its functions have nothing to do.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, new_class
from typing import Any
from unittest.mock import patch

from srlm_cli import distributed
from srlm_cli.models import import_structure


def nothing(function: Any = None, *unused: Any, **options: Any) -> Any:
    """Do what a function of `torch._dynamo` does where nothing is compiled: return what it is to change."""
    return nothing if function is None else function


class Late(type):
    """Makes a stand-in for a class or function, whose module is imported when it is used; it has no instance before."""

    def __new__(cls, name: str, bases: tuple[Any, ...], defined: dict[str, Any]) -> Any:
        """Return a stand-in or, of what is derived from one, a class derived from the real one."""
        if not bases:
            return super().__new__(cls, name, bases, defined)
        real_bases = tuple(base._real() if isinstance(base, Late) else base for base in bases)
        return new_class(name, real_bases, exec_body=lambda body: body.update(defined))

    def _real(cls) -> Any:
        return getattr(real(cls.__module__), cls.__name__)

    def __call__(cls, *args: Any, **named: Any) -> Any:
        return cls._real()(*args, **named)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls._real(), name)

    def __instancecheck__(cls, thing: Any) -> bool:
        return is_real(cls.__module__) and isinstance(thing, cls._real())

    def __subclasscheck__(cls, kind: type) -> bool:
        return is_real(cls.__module__) and issubclass(kind, cls._real())


DYNAMO = "torch._dynamo"
LATE: dict[str, dict[str, Any]] = {
    DYNAMO: dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable", "graph_break"), nothing),
    f"{DYNAMO}.eval_frame": {"OptimizedModule": Late},
    f"{DYNAMO}._trace_wrapped_higher_order_op": {"TransformGetItemToIndex": Late},
    "torch.distributed.tensor": {"DTensor": Late},
    "torch.distributed.fsdp": {"FSDPModule": Late},
    "torch.distributed.fsdp.fully_sharded_data_parallel": {"FullyShardedDataParallel": Late},
    "peft": dict.fromkeys(
        ("LoraConfig", "PeftConfig", "PeftMixedModel", "PeftModel", "PrefixTuningConfig", "get_peft_model"), Late
    ),
    "peft.tuners": {},
    "peft.tuners.tuners_utils": {"BaseTunerLayer": Late},
    "scipy.linalg": {},
    "scipy.linalg.cython_blas": {},
    "scipy.optimize": {"linear_sum_assignment": Late},
}


class StandIn(ModuleType):
    """Stands for a module of `LATE` that is not imported yet."""

    def __getattr__(self, name: str) -> Any:
        if name in ("__path__", "__file__", "__cached__"):  # imports, and `inspect`, look whether a module has these
            raise AttributeError(name)
        made = LATE[self.__name__].get(name)
        if made is Late:
            made = Late(name, (), {"__module__": self.__name__})
        elif made is None:
            below = f"{self.__name__}.{name}"
            return (
                sys.modules.get(below) or import_module(below) if below in LATE else getattr(real(self.__name__), name)
            )
        setattr(self, name, made)
        return made


class Finder(MetaPathFinder, Loader):
    """Finds a stand-in for each module of `LATE` that is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == "transformers.distributed":
            in_one_process()  # before it is first asked
        if name == import_structure.MODULE and (spec := PathFinder.find_spec(name, path)):
            spec.loader = import_structure.KeepingLoader(name, spec.origin)
            return spec
        found = PathFinder.find_spec(name, path) if name in LATE and in_one_process() else None
        parent = name.rpartition(".")[0]
        if found is None and isinstance(sys.modules.get(parent), StandIn):
            real(parent)
            return ModuleSpec(name, Found(import_module(name)))
        if found is None:
            return None
        spec = ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = found.submodule_search_locations or []
        return spec

    def create_module(self, spec: ModuleSpec) -> StandIn:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: a stand-in is empty."""


class Found(Loader):
    """Gives a module that is imported already to an import that was looking for it."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


FINDER = Finder()


def is_real(name: str) -> bool:
    """Tell whether a module is imported, and not only stood for."""
    return name in sys.modules and not isinstance(sys.modules[name], StandIn)


def real(name: str) -> ModuleType:
    """Return a module, imported now if it was only stood for; all stand-ins of its package end."""
    if is_real(name):
        return sys.modules[name]
    active = FINDER in sys.meta_path
    end()
    try:
        return import_module(name)
    finally:
        if active:
            sys.meta_path.insert(0, FINDER)


def end() -> None:
    """Find no stand-ins any more, and forget those that were found."""
    if FINDER in sys.meta_path:
        sys.meta_path.remove(FINDER)
    for name in [name for name in LATE if isinstance(sys.modules.get(name), StandIn)]:
        parent, _, child = name.rpartition(".")
        vars(sys.modules.get(parent, sys)).pop(child, None)
        del sys.modules[name]


@cache
def in_one_process() -> bool:
    """Tell whether nothing can be compiled or sharded here; transformers then sees a PyTorch that cannot either."""
    import torch

    if distributed.started() or torch.accelerator.is_available():
        return False
    from transformers.utils import is_torch_distributed_available

    with patch.object(torch.distributed, "is_available", lambda: False):
        is_torch_distributed_available()  # it remembers the answer
    return True


@contextmanager
def light_imports() -> Iterator[None]:
    """Let stand-ins be imported for the modules of `LATE` in this context, where nothing can be compiled or sharded."""
    if FINDER in sys.meta_path:
        yield
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads would wait busily for a second, for nothing
    sys.meta_path.insert(0, FINDER)
    try:
        yield
    finally:
        end()


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage in this context: imports and weights make many objects, and next to no garbage."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()  # what has come to stay is not looked at again
        if was:
            gc.enable()
