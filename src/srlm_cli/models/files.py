"""What is wrong with the files of a model folder: a git-lfs pointer, half a download, text that is not JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from srlm_cli.errors import EngineError

POINTER = b"version https://git-lfs"
# What loaders read of a folder: some of these are left out by transformers in silence when they are broken.
SETTINGS = {
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
}
READ = {*SETTINGS, "tokenizer.json", "vocab.json", "trainer_state.json"}
MOST_HEADER_BYTES = 100_000_000  # the limit of safetensors itself


def read_settings(file: Path) -> dict[str, Any]:
    """Return a JSON object that a loader needs; raise EngineError where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot load the model {file.parent}: {file.name} {fault_of(file) or error}") from None
    if not isinstance(found, dict):
        raise EngineError(f"cannot load the model {file.parent}: {file.name} is not a JSON object")
    return found


def broken_file(folder: Path, names: Iterable[str] | None = None) -> str:
    """Return the name of the first broken file of a folder, or of these in it, and its fault; "" where all look whole.

    The start of a file is looked at, of safetensors also their size, of settings all.
    """
    for file in sorted(folder.iterdir() if names is None else map(folder.joinpath, names)):
        if fault := fault_of(file):
            return f"{file.name} {fault}"
    return ""


def fault_of(file: Path) -> str:
    """Return what is wrong with a file of weights or settings, "" where it looks whole or is something else."""
    check = CHECKS.get(file.suffix)
    if check is None or not file.is_file():
        return ""
    with open(file, "rb") as opened:
        start = opened.read(len(POINTER))
    if start == POINTER:
        return "is a git-lfs pointer, not the file itself: git lfs pull"
    return check(file) if start else "is empty"


def _json(file: Path) -> str:
    if file.name not in READ and not file.name.endswith(".index.json"):
        return ""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"is not JSON: {error}"
    shards = set(found.get("weight_map", {}).values()) if file.name.endswith(".index.json") else set()
    lost = sorted(name for name in shards if not (file.parent / name).is_file())
    return f"names {lost[0]}, which is not there" if lost else ""


def _safetensors(file: Path) -> str:
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > MOST_HEADER_BYTES:
            return "is not a safetensors file"
        header = opened.read(length)
    if size < 8 + length:
        return f"is cut off: {size} bytes, its header alone has {8 + length}"
    try:
        tensors = [about for name, about in json.loads(header).items() if name != "__metadata__"]
        whole = 8 + length + max((about["data_offsets"][1] for about in tensors), default=0)
    except (ValueError, AttributeError, KeyError, TypeError):
        return "is not a safetensors file"
    return "" if size == whole else f"is cut off: {size} of {whole} bytes" if size < whole else "has bytes too many"


def _pickle(file: Path) -> str:
    with open(file, "rb") as opened:
        start = opened.read(2)
    if start == b"PK":
        return "" if is_zipfile(file) else f"is cut off, after {file.stat().st_size} bytes"
    return "" if start[:1] == b"\x80" else "is not a PyTorch file"


def _gguf(file: Path) -> str:
    with open(file, "rb") as opened:
        return "" if opened.read(4) == b"GGUF" else "is not a GGUF file"


CHECKS = {
    ".json": _json,
    ".safetensors": _safetensors,
    ".bin": _pickle,
    ".pt": _pickle,
    ".pth": _pickle,
    ".gguf": _gguf,
    ".jinja": lambda file: "",
    ".model": lambda file: "",
}
