"""Types of the paths on a benchmark's command line: what is missing ends it before it begins, or is made."""

from __future__ import annotations

import shutil
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path


def existing(text: str) -> Path:
    """Return the path of a file or a folder that exists."""
    path = Path(text)
    if not path.exists():
        raise ArgumentTypeError(f"{text} does not exist")
    return path


def existing_file(text: str) -> Path:
    """Return the path of a file that exists."""
    path = existing(text)
    if path.is_dir():
        raise ArgumentTypeError(f"{text} is a folder, not a file")
    return path


def folder_with(*names: str) -> Callable[[str], Path]:
    """Return the type of a folder that has these files."""

    def folder(text: str) -> Path:
        for name in names:
            existing_file(str(existing(text) / name))
        return Path(text)

    return folder


def made_folder(text: str) -> Path:
    """Return the path of a folder, which is made where it is missing."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentTypeError(f"{text} cannot be made: {error.strerror}") from error
    return path


def output_file(text: str) -> Path:
    """Return the path of a file to write, whose folder is made where it is missing."""
    path = Path(text)
    made_folder(str(path.parent))
    if path.is_dir():
        raise ArgumentTypeError(f"{text} is a folder, not a file")
    return path


def program(text: str) -> Path:
    """Return the path of a program, named by its path or as on PATH."""
    found = shutil.which(text)
    if not found:
        raise ArgumentTypeError(f"{text} does not exist or cannot be run")
    return Path(found).absolute()
