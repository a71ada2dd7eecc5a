"""The reference's log-probabilities across runs: a file per key, and the key holds all that they depend on.

    CACHE/reference/KEY.json    the scores of one file of rows by one model, in the order of the rows

CACHE is the folder of prepared models (see `models.gguf.cache_dir`). A file can be deleted at any time.
This module imports torch and TRL and is itself imported late.
"""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from hashlib import sha256
from math import isfinite
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace
from typing import Any

import torch
from trl.trainer.utils import hash_module

import srlm_cli
from srlm_cli import distributed
from srlm_cli.models.gguf import cache_dir
from srlm_cli.models.hardware import cpu_capabilities
from srlm_cli.streams.console import say

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")

Scores = list[tuple[float, ...]]


def file_of(model: Any, rows: Any, device: torch.device, settings: dict[str, Any]) -> Path:
    """Return the file for the scores of a dataset of rows by a model; `settings` is what else decides them.

    The order of the rows is part of it, since it decides which of them are in one pass.
    """
    about = {
        "srlm": source_hash(),
        "versions": {name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules},
        "processor": processor(device),
        "processes": distributed.count(),
        **identity(model),
        **settings,
    }
    digest = sha256(json.dumps(about, sort_keys=True, default=plain).encode())
    texts = [name for name in rows.column_names if name.endswith("_ids")]  # labels are not scored
    for row in rows.select_columns(sorted(texts)):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return cache_dir() / "reference" / f"{digest.hexdigest()[:32]}.json"


def identity(model: Any) -> dict[str, Any]:
    """Return what distinguishes a model from others: its weights, its configuration, its adapters.

    An adapter that adds nothing, as a new one, is left out: its random numbers do not change a score.
    """
    state = model.state_dict()
    idle = {name for name, weight in state.items() if ".lora_B." in name and not weight.any()}
    idle |= {name.replace(".lora_B.", ".lora_A.") for name in idle}
    kept = {name: weight for name, weight in state.items() if name not in idle}
    adapted = any(".lora_" in name for name in kept)
    return {
        "weights": hash_module(SimpleNamespace(state_dict=lambda: kept)),
        "shapes": {name: list(weight.shape) for name, weight in kept.items()},
        "config": {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"},
        "attention": model.config._attn_implementation,
        "adapters": {name: vars(one) for name, one in model.peft_config.items()} if adapted else {},
    }


def plain(value: Any) -> Any:
    """Return a value of a configuration that JSON lacks as one that it has."""
    return sorted(value) if isinstance(value, set) else str(value)


def processor(device: torch.device) -> Any:
    """Return the kind of the processor: another one rounds in another way."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_capabilities() if device.type == "cpu" else device.type


@cache
def source_hash() -> str:
    """Return a hash of the code of this package, which its version does not tell apart during development."""
    digest, folder = sha256(), Path(srlm_cli.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def read(file: Path, rows: int, columns: int, command: str) -> Scores | None:
    """Return the scores in a file, None if there is none; one that is broken is named on stderr and not used."""
    try:
        scores = [tuple(map(float, row)) for row in json.loads(file.read_text(encoding="utf-8"))]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        say(f"srlm {command}: {file} is broken and not used: {error}")
        return None
    if len(scores) == rows and all(len(row) == columns and all(map(isfinite, row)) for row in scores):
        return scores
    say(f"srlm {command}: {file} is broken and not used: it has not {columns} numbers for each of {rows} rows")
    return None


def write(file: Path, scores: Scores, command: str) -> None:
    """Keep scores in a file, whole or not at all; if that fails, say so and continue."""
    draft = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=file.parent, prefix=file.name + ".", delete=False) as draft:
            json.dump(scores, draft)
        os.replace(draft.name, file)
    except OSError as error:
        if draft:
            Path(draft.name).unlink(missing_ok=True)
        say(f"srlm {command}: the reference's scores are not kept for later runs: {file.parent}: {error.strerror}")
