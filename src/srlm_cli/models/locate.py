"""Where a model is: the embedded one, a hub id, a folder, an adapter and its base, a `.gguf` file."""

from __future__ import annotations

from pathlib import Path

from srlm_cli.errors import EngineError, OptionError
from srlm_cli.models import adapters, remote
from srlm_cli.models.embedded import EMBEDDED, SMOLLM2, prepare
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.models.gguf import cache_dir, gguf_file, trainable_folder


def use(model: str, revision: str | None, trust_remote_code: bool) -> None:
    """Use a revision of a model, and let its own code and that of its base run, from now on in this process."""
    if revision:
        remote.pin(model, revision)
    if trust_remote_code:
        remote.trust(locate(model))
        remote.trust(lowest_base(model))


def locate(model: str) -> str:
    """Return the folder or hub id of a model as the user names it; the embedded model is prepared once."""
    if folder := remote.pinned_folder(model):
        return folder
    if model in EMBEDDED:
        return str(prepare(EMBEDDED[model]))
    if gguf := gguf_file(model):
        return str(trainable_folder(gguf, cache_dir() / "gguf" / f"{gguf.stem}-{fingerprint(str(gguf))}"))
    if Path(model).is_dir():
        return model
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or Path(model).exists():
        unfinished = Path(model + ".part").exists()
        hint = f"{model}.part exists: its training has not finished" if unfinished else "a folder, a .gguf file"
        raise OptionError(f"no such model: {model}", f"{hint}, a hub id or {SMOLLM2.name}")
    return model


def is_adapter(folder: str) -> bool:
    """Return whether a located model is an adapter folder of peft."""
    return (Path(folder) / "adapter_config.json").is_file()


def adapter_base(folder: str) -> str:
    """Return the base model that an adapter names; raise OptionError if it does not exist."""
    base = adapters.base_of(folder)
    try:
        where = Path(locate(base))
    except OptionError as error:
        raise OptionError(f"the base of the adapter {folder}: {error}") from None
    if where.exists() and where.samefile(folder):
        raise EngineError(
            f"cannot load the model {folder}: it is an adapter, and its base is itself",
            f"correct base_model_name_or_path in {adapters.SETTINGS}",
        )
    return base


def lowest_base(model: str) -> str:
    """Return the folder or hub id of the full model below a chain of adapters, or of the model itself."""
    folder = locate(model)
    return lowest_base(adapter_base(folder)) if is_adapter(folder) else folder
