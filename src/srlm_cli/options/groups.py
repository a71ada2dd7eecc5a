"""Option groups: a command takes a dataclass of options as one value, typer sees its fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

# Help shows input and output first, and run control after the command's own options.
FIRST = ("in_", "out")
LAST = (
    "engine", "batch_size", "accelerate_config", "num_processes", "device", "dtype",
    "thinking", "template_kwargs", "think_markers", "today",
    "tensor_parallel_size", "data_parallel_size", "max_model_len", "gpu_memory_utilization", "quantization",
    "engine_arg", "base_url", "route", "tokenizer", "concurrency", "retries",
    "timeout", "extra_body", "check_sampling", "seed", "shard", "limit", "on_error", "rejects", "restart", "on_stale",
    "on_limit", "config", "quiet",
)  # fmt: skip


class Defaults:
    """Beside an option group in a signature: other defaults for some of its options."""

    def __init__(self, **values: Any) -> None:
        self.values = values


def grouped(command: Callable) -> Callable:
    """Let a command have option groups (dataclasses) as parameters."""
    hints = get_type_hints(command, include_extras=True)
    options: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, list[str]]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind, defaults = _group_of(hints[name])
        if kind is None:
            options.append(parameter.replace(annotation=hints[name]))
            continue
        groups[name] = kind, [field.name for field in fields(kind)]
        own = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            default = defaults.get(field.name, field.default)
            options.append(parameter.replace(name=field.name, default=default, annotation=own[field.name]))
    options.sort(key=_place)

    @wraps(command)
    def run(**values: Any) -> None:
        for name, (kind, names) in groups.items():
            values[name] = kind(**{key: values.pop(key) for key in names})
        command(**values)

    run.__signature__ = inspect.Signature(options)
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def _place(option: inspect.Parameter) -> int:
    """Return the sort key of an option in the help; options with equal keys keep their order."""
    if option.name in FIRST:
        return FIRST.index(option.name) - len(FIRST)
    return LAST.index(option.name) + 1 if option.name in LAST else 0


def _group_of(hint: Any) -> tuple[type | None, dict[str, Any]]:
    if get_origin(hint) is Annotated and is_dataclass(get_args(hint)[0]):
        kind, *extra = get_args(hint)
        return kind, {key: value for item in extra if isinstance(item, Defaults) for key, value in item.values.items()}
    return (hint, {}) if is_dataclass(hint) else (None, {})
