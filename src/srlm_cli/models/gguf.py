"""GGUF files: which one a user means, and how it becomes a model folder that can be trained."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

from srlm_cli.errors import OptionError
from srlm_cli.models.load_errors import in_one_line


def cache_dir() -> Path:
    """Return where prepared models are kept: $SRLM_HOME, or the user's cache folder."""
    if home := os.environ.get("SRLM_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srlm"


def gguf_file(model: str) -> Path | None:
    """Return the GGUF file of a model: the file itself, or the only one in a folder without a configuration.

    Returns None for a folder with a configuration or a hub id. Raises OptionError for a folder that is not a model.
    """
    path = Path(model)
    if not path.is_dir():
        if is_gguf(path) and not path.is_file():
            raise OptionError(f"no such file: {model}")
        return path if is_gguf(path) else None
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return None
    files = sorted(filter(is_gguf, path.iterdir()))
    if len(files) > 1:
        raise OptionError(f"{model} contains {len(files)} .gguf files", f"choose one: --model {files[0]}")
    if not files:
        raise OptionError(f"{model} is not a model folder: it has no config.json, adapter_config.json or .gguf file")
    return files[0]


def is_gguf(path: Path) -> bool:
    """Return whether a file is a GGUF by its name."""
    return path.suffix.lower() == ".gguf"


def trainable_folder(gguf: Path, folder: Path) -> Path:
    """Turn a GGUF file into a folder of safetensors, tokenizer and chat template, whole or not at all."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        with redirect_stderr(io.StringIO()):  # progress bars, one of which no setting turns off
            # GGUF weights stay packed, neither trainable nor savable, unless dequantized.
            model = in_one_line(
                gguf.name,
                str(gguf),
                lambda: AutoModelForCausalLM.from_pretrained(
                    **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
                ),
            )
            tokenizer = in_one_line(gguf.name, str(gguf), lambda: AutoTokenizer.from_pretrained(**where))
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
        os.replace(draft, folder)
    except OSError:
        if not (folder / "config.json").exists():  # otherwise another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
