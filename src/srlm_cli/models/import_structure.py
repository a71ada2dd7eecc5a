"""Keep what transformers finds in its model files: it reads all 2,500 of them twice as it is imported."""

from __future__ import annotations

import marshal
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from importlib.machinery import SourceFileLoader
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import ModuleType
from typing import Any

MODULE = "transformers.utils.import_utils"
READ = "create_import_structure_from_path"  # returns the names by file and by what they need, of a folder


class KeepingLoader(SourceFileLoader):
    """Loads `MODULE`, with `READ` as `kept` where it is there."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if hasattr(read := getattr(module, READ, None), "__wrapped__"):
            setattr(module, READ, cache(kept(read.__wrapped__)))


def kept(read: Callable[[Any], dict]) -> Callable[[Any], dict]:
    """Return a reader that takes what it found in all models from the cache folder, while no file has changed."""

    def reader(path: Any) -> dict:
        folder = Path(path).parent if os.path.isfile(path) else Path(path)
        if folder.name != "models":
            return read(path)
        from srlm_cli.models import cache_dir

        stored = cache_dir() / "transformers" / f"{digest(folder)}.marshal"
        with suppress(OSError, ValueError, EOFError, TypeError):
            return marshal.loads(stored.read_bytes())
        found = read(path)
        with suppress(OSError, ValueError):
            store(stored, marshal.dumps(found))
        return found

    return reader


def store(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, delete=False) as draft:
        draft.write(content)
    os.replace(draft.name, path)


@cache
def digest(folder: Path) -> str:
    """Return a hash of the names, sizes and times of all sources in a folder, and of this Python's kind."""
    about = [sys.implementation.cache_tag, *sorted(sources(str(folder)))]
    return blake2b(repr(about).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def sources(folder: str) -> Iterator[tuple[str, int, int]]:
    """Yield path, size and time of change of all sources in a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                about = entry.stat()
                yield entry.path, about.st_size, about.st_mtime_ns
            elif entry.name != "__pycache__" and entry.is_dir():
                yield from sources(entry.path)
