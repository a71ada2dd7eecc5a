"""The optimizers of transformers that `--optim` takes."""

from __future__ import annotations

from importlib.util import find_spec

from srlm_cli.errors import OptionError

# Bytes that each keeps per trained weight; Adafactor keeps a row and a column of each matrix.
BYTES = {
    "adamw_torch_fused": 8, "adamw_torch": 8, "adafactor": 0, "sgd": 0, "adagrad": 4, "rmsprop": 4,
    "adamw_8bit": 2, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2, "lion_32bit": 4, "lion_8bit": 1,
    "paged_lion_32bit": 4, "paged_lion_8bit": 1, "ademamix": 12, "ademamix_8bit": 3,
}  # fmt: skip
DEFAULT = "adamw_torch_fused"


def check(name: str) -> str:
    """Return the name of an optimizer; raise OptionError for one that is not known or not installed."""
    if name not in BYTES:
        raise OptionError(f"--optim {name}: no such optimizer", f"one of {', '.join(BYTES)}")
    if ("8bit" in name or "32bit" in name or "ademamix" in name) and not find_spec("bitsandbytes"):
        raise OptionError(f"--optim {name} needs bitsandbytes", "pip install bitsandbytes")
    return name
