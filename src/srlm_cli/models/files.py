"""Broken files in a model folder: git-lfs pointers, incomplete downloads, invalid JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from srlm_cli.errors import EngineError

LFS_POINTER = b"version https://git-lfs"
# transformers silently ignores some of these if they are broken.
SETTINGS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
JSON_FILES = {*SETTINGS, "tokenizer.json", "vocab.json", "trainer_state.json"}
MAX_HEADER_BYTES = 100_000_000  # of safetensors


def read_settings(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder; raise EngineError if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot load the model {file.parent}: {file.name} {fault_of(file) or error}") from None
    if not isinstance(found, dict):
        raise EngineError(f"cannot load the model {file.parent}: {file.name} is not a JSON object")
    return found


def broken_file(folder: Path, names: Iterable[str] | None = None) -> str:
    """Return the first broken file of a folder (or of these files in it) and what is wrong, "" if there is none."""
    for file in sorted(folder.iterdir() if names is None else map(folder.joinpath, names)):
        if fault := fault_of(file):
            return f"{file.name} {fault}"
    return ""


def fault_of(file: Path) -> str:
    """Return what is wrong with a file, "" if nothing is found; files of unknown types are not read."""
    check = CHECKS.get(file.suffix)
    if check is None or not file.is_file():
        return ""
    with open(file, "rb") as opened:
        start = opened.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return "is a git-lfs pointer, not the file itself: run git lfs pull"
    return check(file) if start else "is empty"


def _json(file: Path) -> str:
    is_index = file.name.endswith(".index.json")
    if file.name not in JSON_FILES and not is_index:
        return ""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"is not valid JSON: {error}"
    shards = set(found.get("weight_map", {}).values()) if is_index else set()
    missing = sorted(name for name in shards if not (file.parent / name).is_file())
    return f"lists {missing[0]}, which is missing" if missing else ""


def _safetensors(file: Path) -> str:
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > MAX_HEADER_BYTES:
            return "is not a safetensors file"
        header = opened.read(length)
    if size < 8 + length:
        return f"is incomplete: {size} bytes, {8 + length} in its header alone"
    try:
        tensors = [about for name, about in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + length + max((about["data_offsets"][1] for about in tensors), default=0)
    except (ValueError, AttributeError, KeyError, TypeError):
        return "is not a safetensors file"
    return f"is {'incomplete' if size < expected else 'too long'}: {size} of {expected} bytes" * (size != expected)


def _pickle(file: Path) -> str:
    with open(file, "rb") as opened:
        start = opened.read(2)
    if start == b"PK":
        return "" if is_zipfile(file) else f"is incomplete: {file.stat().st_size} bytes"
    return "" if start[:1] == b"\x80" else "is not a PyTorch file"


def _gguf(file: Path) -> str:
    with open(file, "rb") as opened:
        return "" if opened.read(4) == b"GGUF" else "is not a GGUF file"


def _any(file: Path) -> str:
    return ""


CHECKS = {
    ".json": _json,
    ".safetensors": _safetensors,
    ".bin": _pickle,
    ".pt": _pickle,
    ".pth": _pickle,
    ".gguf": _gguf,
    ".jinja": _any,
    ".model": _any,
}
