"""What identifies a model: a hash of its files."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from srlm_cli.models import adapters, remote
from srlm_cli.models.embedded import EMBEDDED
from srlm_cli.models.gguf import is_gguf
from srlm_cli.records import PROVENANCE

WEIGHTS = (".safetensors", ".bin")
PARTS = (*WEIGHTS, ".json", ".jinja", ".model")  # the files of a model folder


def fingerprint(model: str, *, weights_only: bool = False) -> str:
    """Return a hash of a model, or only of its weights; for a hub id, its name, with a revision its commit.

    It covers the name and size of every file except `provenance.json`, and 64 blocks of each large file, because each
    training step changes all weights a little.
    """
    if model in EMBEDDED:
        return EMBEDDED[model].sha256[:16]
    path = Path(model)
    if folder := remote.pinned_folder(model):
        return f"{model}@{Path(folder).name}"  # the commit
    if not path.exists():
        return model
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    suffixes = WEIGHTS if weights_only else PARTS
    digest = sha256()
    for file in files:
        if file.name == PROVENANCE or not file.is_file() or not (file.suffix in suffixes or is_gguf(file)):
            continue
        if file.name == adapters.SETTINGS:
            content = adapters.sorted_settings(file)
            digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as opened:
            for at in range(0, size, max(size // 64, 4096)):
                opened.seek(at)
                digest.update(opened.read(4096))
    return digest.hexdigest()[:16]
