"""Whole models from their files: each tensor is found under its name and in its shape, or nothing is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlm_cli.errors import EngineError
from srlm_cli.models.files import broken_file, fault_of
from srlm_cli.streams.console import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What torch.compile, FSDP and activation checkpointing put into names, in any place and more than once.
WRAPPER = r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
NESTED = 8  # wrappers in one name
SHOWN = 3  # names in a message
OURS = "(?#srlm"  # begins the patterns that are given to transformers


def load_whole(model: str, where: str, **settings: Any) -> PreTrainedModel:
    """Return the causal LM of a folder or hub id, loaded by transformers with these settings.

    Names that another saver has put a prefix in front of lose it, which is reported on stderr. Raises EngineError
    where a tensor is missing, unexpected or of another shape: transformers itself would go on with random numbers.
    """
    from transformers import AutoModelForCausalLM

    settings |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # which are refused below
    net, info = AutoModelForCausalLM.from_pretrained(where, **settings)
    prefix = saver_prefix(info["unexpected_keys"], set(info["missing_keys"]))
    if names := renamed(info["unexpected_keys"], prefix):
        report_renamed(model, names)
        patterns = [f"{OURS}{place}){WRAPPER}" for place in range(NESTED)]  # one occurrence each
        mapping = {**dict.fromkeys(patterns, ""), **({f"{OURS})^{re.escape(prefix)}": ""} if prefix else {})}
        net, info = AutoModelForCausalLM.from_pretrained(where, key_mapping=mapping, **settings)
        # transformers would undo the mapping when it saves, by patterns that cannot be undone
        used = getattr(net, "_weight_conversions", None) or []
        net._weight_conversions = [one for one in used if not one.source_patterns[0].startswith(OURS)]
    unexpected = set(info["unexpected_keys"]) - remains_of_buffers(net, info["unexpected_keys"])
    hint = "the weights and the configuration are of different models, or the files are not complete"
    if any(".lora_" in name for name in unexpected):
        hint = "an adapter was saved with the model: merge it, or save the adapter by itself"
    what, total = f"cannot load the model {model}", len(net.state_dict())
    refuse_unlike(what, info["missing_keys"], unexpected, info["mismatched_keys"], total, hint)
    return net


def fault_in(where: str, error: Exception) -> str:
    """Return what made loading fail: a broken file of a folder or a setting, as far as can be seen, else the error."""
    folder = Path(where)
    reason = first_lines(error)
    if fault := broken_file(folder) if folder.is_dir() else fault_of(folder):
        return fault
    return f"config.json: {reason}" if (folder / "config.json").is_file() and not can_be_built(where) else reason


def can_be_built(where: str) -> bool:
    """Tell whether a model can be made by its configuration, without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(where))
    except Exception:  # noqa: BLE001 - of any kind, as in loading
        return False
    return True


def first_lines(error: Exception) -> str:
    """Return the first line of an error, and those that it announces; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    count = next((at for at, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: count + 1]) or type(error).__name__


def renamed(found: Iterable[str], prefix: str) -> dict[str, str]:
    """Return the names of a file that carry what a saver added, with the names they have without it."""
    names = {name: unwrapped(name).removeprefix(prefix) for name in found}
    return {name: bare for name, bare in names.items() if name != bare}


def unwrapped(name: str) -> str:
    """Return the name of a tensor without the wrappers that it was saved in."""
    return re.sub(WRAPPER, "", name)


def saver_prefix(found: Iterable[str], missing: set[str]) -> str:
    """Return what is in front of found names (`module.`, `base_model.model.`, any other) so that none is missing.

    It is "" unless every missing name is among the found ones behind it.
    """
    found = {unwrapped(name) for name in found}
    first = min(missing, default="")
    for prefix in sorted(name.removesuffix(first) for name in found if first and name.endswith("." + first)):
        if missing <= {name.removeprefix(prefix) for name in found if name.startswith(prefix)}:
            return prefix
    return ""


def report_renamed(model: str, names: dict[str, str]) -> None:
    """Tell how many names lost what another saver put into them, with one of them as an example."""
    old, new = next(iter(sorted(names.items())))
    say(f"srlm: {model}: {len(names)} tensors are named by another saver: {old} is read as {new}")


def remains_of_buffers(net: PreTrainedModel, unexpected: Iterable[str]) -> set[str]:
    """Return the unexpected names that are of buffers which this model computes and does not save (`inv_freq`)."""
    state = set(net.state_dict())
    computed = {name.rsplit(".", 1)[-1] for name, _ in net.named_buffers() if name not in state}
    return {name for name in unexpected if name.rsplit(".", 1)[-1] in computed}


def refuse_unlike(
    what: str,
    missing: Iterable[str],
    unexpected: Iterable[str],
    misshaped: Iterable[tuple[str, Iterable[int], Iterable[int]]],
    total: int,
    hint: str,
) -> None:
    """Raise EngineError where names are missing or unexpected, or shapes (name, in the file, in the model) differ."""
    missing, unexpected, misshaped = sorted(missing), sorted(unexpected), sorted(misshaped)
    shapes = [f"{name} {list(theirs)} for {list(own)}" for name, theirs, own in misshaped]
    faults = [
        f"{len(missing)} of {total} tensors are missing ({some(missing)})" if missing else "",
        f"{len(unexpected)} are not of this model ({some(unexpected)})" if unexpected else "",
        f"{len(shapes)} have another shape ({some(shapes)})" if shapes else "",
    ]
    if any(faults):
        raise EngineError(
            f"{what}: {', '.join(fault for fault in faults if fault)}",
            hint,
        )


def some(names: list[str]) -> str:
    """Return the first few names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
