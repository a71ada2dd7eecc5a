"""The weights of a whole model: every tensor is found under its name and with its shape, or loading stops."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from srlm_cli.errors import EngineError
from srlm_cli.models import remote
from srlm_cli.streams.console import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Added to names by torch.compile, FSDP and activation checkpointing, at any position and more than once.
WRAPPER = r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
MAX_WRAPPERS = 8  # in one name
SHOWN = 3  # names in a message
MARK = "(?#srlm"  # starts the patterns that transformers gets from us


def load_whole(model: str, where: str, **settings: Any) -> PreTrainedModel:
    """Return the causal LM of a folder or hub id; `settings` are those of `from_pretrained`.

    Prefixes of other tools are removed from the names of tensors, with a line on stderr. Raises EngineError if a tensor
    is missing, unexpected or of a different shape. transformers would initialize it with random numbers.
    """
    from srlm_cli.models.light_transformers import AutoModelForCausalLM

    settings |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # `check_tensors` reports them
    settings |= {"trust_remote_code": remote.trusts(where)}
    net, info = AutoModelForCausalLM.from_pretrained(where, **settings)
    prefix = common_prefix(info["unexpected_keys"], set(info["missing_keys"]))
    names = {name: unwrapped(name).removeprefix(prefix) for name in info["unexpected_keys"]}
    if renamed := {old: new for old, new in names.items() if old != new}:
        report_renamed(model, renamed)
        mapping = dict.fromkeys((f"{MARK}{number}){WRAPPER}" for number in range(MAX_WRAPPERS)), "")  # one match each
        mapping |= {f"{MARK})^{re.escape(prefix)}": ""} if prefix else {}
        net, info = AutoModelForCausalLM.from_pretrained(where, key_mapping=mapping, **settings)
        # save_pretrained would apply the mapping backwards (findings/save-pretrained-undoes-key-mapping.sh)
        used = getattr(net, "_weight_conversions", None) or []
        net._weight_conversions = [one for one in used if not one.source_patterns[0].startswith(MARK)]
    unexpected = set(info["unexpected_keys"]) - computed_buffers(net, info["unexpected_keys"])
    hint = "the weights and config.json do not belong together, or a file is not complete"
    if any(".lora_" in name for name in unexpected):
        hint = "the file also contains an adapter: merge the adapter, or save it separately"
    what, total = f"cannot load the model {model}", len(net.state_dict())
    check_tensors(what, info["missing_keys"], unexpected, info["mismatched_keys"], total, hint)
    return net


def check_tensors(
    what: str,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]],
    total: int,
    hint: str,
) -> None:
    """Raise EngineError if tensors are missing, unexpected or mismatched (name, shape in the file, expected shape)."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    shapes = [f"{name} {list(found)}, expected {list(expected)}" for name, found, expected in sorted(mismatched)]
    faults = [
        f"{len(missing)} of {total} tensors missing ({first_names(missing)})" if missing else "",
        f"{len(unexpected)} unexpected tensors ({first_names(unexpected)})" if unexpected else "",
        f"{len(shapes)} tensors of a different shape ({first_names(shapes)})" if shapes else "",
    ]
    if found := ", ".join(fault for fault in faults if fault):
        raise EngineError(f"{what}: {found}", hint)


def first_names(names: list[str]) -> str:
    """Return the first names, for a message."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def computed_buffers(net: PreTrainedModel, unexpected: Iterable[str]) -> set[str]:
    """Return the unexpected names of buffers that this model computes and does not save, such as `inv_freq`."""
    state = set(net.state_dict())
    computed = {name.rsplit(".", 1)[-1] for name, _ in net.named_buffers() if name not in state}
    return {name for name in unexpected if name.rsplit(".", 1)[-1] in computed}


# --- names from other tools ------------------------------------------------------------------


def unwrapped(name: str) -> str:
    """Return the name of a tensor without wrappers."""
    return re.sub(WRAPPER, "", name)


def common_prefix(found: Iterable[str], missing: set[str]) -> str:
    """Return the prefix that all missing names have in a file (`module.`, `base_model.model.` or any other), or ""."""
    found = {unwrapped(name) for name in found}
    first = min(missing, default="")
    for prefix in sorted(name.removesuffix(first) for name in found if first and name.endswith("." + first)):
        if missing <= {name.removeprefix(prefix) for name in found if name.startswith(prefix)}:
            return prefix
    return ""


def report_renamed(model: str, renamed: dict[str, str]) -> None:
    """Report the number of names that were changed, with an example."""
    old, new = min(renamed.items())
    say(f"srlm: {model}: removed the prefixes of another tool from {len(renamed)} tensor names ({old} -> {new})")
