"""Why a model cannot be loaded: one line that names the broken file, if there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from srlm_cli.errors import EngineError, SrlmError
from srlm_cli.models.files import broken_file, fault_of
from srlm_cli.models.remote import trusts

Loaded = TypeVar("Loaded")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


def in_one_line(model: str, where: str, load: Callable[[], Loaded]) -> Loaded:
    """Run a loader of transformers or peft; any error becomes one line with the broken file, if there is one."""
    try:
        return load()
    except (SrlmError, MemoryError):
        raise
    except Exception as error:  # broken files raise errors of many types
        if "trust_remote_code" in str(error):
            raise EngineError(
                f"cannot load the model {model}: it needs code of its own, which runs only if you allow it",
                "--trust-remote-code, if you trust its authors",
            ) from error
        here = Path(where).exists()
        raise EngineError(
            f"cannot load the model {model}: {cause_of(error, where)}",
            "see `srlm doctor`" if here else f"there is no folder {model}; --model takes a folder or a hub id",
        ) from error


def cause_of(error: Exception, where: str) -> str:
    """Return why loading from a folder, file or hub id failed: a broken file if there is one, otherwise the error."""
    path = Path(where)
    if fault := broken_file(path) if path.is_dir() else fault_of(path):
        return fault
    reason = first_lines(error)
    if "backend tokenizer" in reason and path.is_dir() and not any((path / name).exists() for name in TOKENIZERS):
        return f"the folder has no tokenizer, such as {TOKENIZERS[0]}"
    return f"config.json: {reason}" if (path / "config.json").is_file() and not can_be_built(where) else reason


def can_be_built(where: str) -> bool:
    """Return whether a model can be built from its configuration, without weights."""
    import torch

    from srlm_cli.models.light_transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            own = {"trust_remote_code": trusts(where)}
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(where, **own), **own)
    except Exception:  # noqa: BLE001 - a configuration can raise anything
        return False
    return True


def first_lines(error: Exception) -> str:
    """Return the first line of an error, with the next ones as long as a line ends in a colon; else its type."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    last = next((at for at, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: last + 1]) or type(error).__name__
