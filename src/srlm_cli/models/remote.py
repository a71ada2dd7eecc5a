"""What a user asks of a model from a hub, for this process: its revision, and whether its own code may run."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from srlm_cli.errors import EngineError, OptionError

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "*.bin")

_revisions: dict[str, str] = {}
_trusted: set[str] = set()


def pin(model: str, revision: str) -> None:
    """Use a revision (a branch, a tag or a commit) of a model from now on; raise OptionError for one on this disk."""
    if Path(model).exists():
        raise OptionError(f"--revision is for a model from a hub, and {model} is on this disk", "omit --revision")
    _revisions[model] = revision


def trust(where: str) -> None:
    """Let the code in a model's folder or repository run from now on."""
    _trusted.add(where)


def trusts(where: str) -> bool:
    """Return whether the code of a model, by its folder or hub id, may run."""
    return where in _trusted


def pinned_folder(model: str) -> str | None:
    """Return the folder of the revision of a model, None if no revision was asked for."""
    return _snapshot(model, _revisions[model]) if model in _revisions else None


@cache
def _snapshot(model: str, revision: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, revision=revision, allow_patterns=list(FILES))
    except Exception as error:  # of the network, of the hub, of the cache
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EngineError(f"cannot load the model {model}, revision {revision}: {reason}") from error


def check_attention(name: str | None, trusted: bool) -> dict[str, Any]:
    """Return an attention implementation as `from_pretrained` takes it; raise OptionError for code that may not run."""
    if name and "/" in name and not trusted:
        raise OptionError(
            f"--attn-implementation {name} runs code from a hub", "--trust-remote-code, if you trust its authors"
        )
    return {"attn_implementation": name} if name else {}
