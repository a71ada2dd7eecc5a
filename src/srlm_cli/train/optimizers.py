"""The optimizers of transformers that `--optim` takes."""

from __future__ import annotations

from importlib.util import find_spec

from srlm_cli.errors import OptionError

NAMES = (
    "adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "ademamix", "ademamix_8bit",
)  # fmt: skip
DEFAULT = "adamw_torch_fused"


def check(name: str) -> str:
    """Return the name of an optimizer; raise OptionError for one that is not known or not installed."""
    if name not in NAMES:
        raise OptionError(f"--optim {name}: no such optimizer", f"one of {', '.join(NAMES)}")
    if ("8bit" in name or "32bit" in name or "ademamix" in name) and not find_spec("bitsandbytes"):
        raise OptionError(f"--optim {name} needs bitsandbytes", "pip install bitsandbytes")
    return name
