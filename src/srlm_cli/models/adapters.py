"""Adapters of peft: which ones can be loaded, and that every tensor is loaded."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlm_cli.errors import EngineError
from srlm_cli.models import remote
from srlm_cli.models.embeddings import check_tokens, resize_embeddings
from srlm_cli.models.files import read_settings
from srlm_cli.models.weights import check_tensors, common_prefix, report_renamed, unwrapped

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

SETTINGS = "adapter_config.json"
BASE_PREFIX = "base_model.model."  # of every name in the file of an adapter
NAME = "default"
# Parts of names inside a peft model that its files do not have.
INNER = {"base_layer", "original_module", "modules_to_save", NAME}


def base_of(folder: str) -> str:
    """Return the name of the base model from the settings of an adapter."""
    settings = read_settings(Path(folder) / SETTINGS)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not base:
        raise EngineError(
            f"cannot load the model {folder}: {SETTINGS} names no base model", "set base_model_name_or_path in it"
        )
    if isinstance(revision, str) and not Path(base).exists():
        remote.pin(base, revision)
    return base


def trains_embeddings(folder: str) -> bool:
    """Return whether the settings of an adapter name embeddings, or other whole layers, that it trains."""
    settings = read_settings(Path(folder) / SETTINGS)
    return bool(settings.get("trainable_token_indices") or settings.get("modules_to_save"))


def config_of(folder: str) -> PeftConfig:
    """Return the configuration of an adapter; raise EngineError if it cannot be merged into a causal LM."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    config = PeftConfig.from_pretrained(folder)
    kind = getattr(config.peft_type, "value", config.peft_type)
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "merge_and_unload"):
        raise EngineError(
            f"cannot load the model {folder}: adapters of type {kind} are not supported",
            "srlm loads adapters that can be merged into the weights, such as LoRA",
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise EngineError(f"cannot load the model {folder}: its task is {config.task_type}, not CAUSAL_LM")
    if getattr(config, "alora_invocation_tokens", None):
        raise EngineError(f"cannot load the model {folder}: adapters with invocation tokens (aLoRA) are not supported")
    return config


def load_adapter(base: PreTrainedModel, folder: str, source: str, *, trainable: bool) -> PeftModel:
    """Return a base model with an adapter; the embeddings of the base are resized to those of the adapter.

    `source` is the folder or hub id of the base. Raises EngineError if a tensor of the adapter is missing, unexpected
    or of a different shape.
    """
    from peft import get_peft_model

    config = config_of(folder)
    name, config.base_model_name_or_path = config.base_model_name_or_path, None
    config.inference_mode = not trainable
    tensors = read_tensors(folder)
    plain = {strip_parts(name, INNER): tensor for name, tensor in tensors.items()}
    has_embeddings = resize_embeddings(base, folder, config, plain)
    check_tokens(folder, source, len(base.get_input_embeddings().weight))
    net = get_peft_model(base, config)
    config.base_model_name_or_path = name
    save_with_embeddings(net, has_embeddings)
    if not trainable:
        net.eval()
    load_tensors(net, folder, tensors)
    return net


def save_with_embeddings(net: PeftModel, embeddings: bool) -> None:
    """Say whether embeddings are saved with an adapter, in checkpoints too.

    peft would look for the base on the hub to find out, with two warnings where there is none.
    """
    net.save_pretrained = partial(net.save_pretrained, save_embedding_layers=embeddings)


def read_tensors(folder: str) -> dict[str, Any]:
    """Return the tensors in the file of an adapter by name."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights

    if not any((Path(folder) / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise EngineError(f"cannot load the model {folder}: no {SAFETENSORS_WEIGHTS_NAME}")
    return load_peft_weights(folder, device="cpu")


def load_tensors(net: PeftModel, folder: str, tensors: dict[str, Any]) -> None:
    """Load the tensors of an adapter's file into a model; raise EngineError if one does not fit."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    expected = get_peft_model_state_dict(net, save_embedding_layers=False)
    tensors = with_peft_names(folder, tensors, set(expected))
    what, total = f"cannot load the model {folder}", len(expected)
    hint = f"it was trained on another model than {net.peft_config[NAME].base_model_name_or_path}, or is not complete"
    pairs = ((name, tensor.shape, expected[name].shape) for name, tensor in tensors.items() if name in expected)
    check_tensors(what, (), (), [pair for pair in pairs if pair[1] != pair[2]], total, hint)
    missing = expected.keys() - tensors.keys()
    try:
        found = set_peft_model_state_dict(net, tensors, adapter_name=NAME)
    except KeyError:  # peft's, for a module in `modules_to_save`
        check_tensors(what, missing, (), (), total, hint)
        raise
    # peft converts the names of older files with experts: then names are missing in the file, but no tensor is.
    complete = not any(NAME in name.split(".") for name in found.missing_keys)
    check_tensors(what, () if complete else missing, found.unexpected_keys, (), total, hint)


def with_peft_names(folder: str, tensors: dict[str, Any], expected: set[str]) -> dict[str, Any]:
    """Return tensors with the names that peft saves them under (`expected`), without the prefixes of other tools."""
    if expected <= tensors.keys():  # peft saves resized embeddings twice if they are in `modules_to_save`
        more = {name: strip_parts(name, INNER) for name in tensors.keys() - expected}
        twice = {name for name, once in more.items() if once in expected and tensors[name].equal(tensors[once])}
        return {name: tensor for name, tensor in tensors.items() if name not in twice}
    names = {name: strip_parts(name, {NAME}) for name in tensors}
    wanted = {name.removeprefix(BASE_PREFIX) for name in expected}
    prefix = common_prefix(names.values(), wanted)
    if prefix or wanted <= set(names.values()):
        names = {old: BASE_PREFIX + new.removeprefix(prefix) for old, new in names.items()}
    if renamed := {old: new for old, new in names.items() if old != new}:
        report_renamed(folder, renamed)
    return {names[name]: tensor for name, tensor in tensors.items()}


def strip_parts(name: str, parts: set[str]) -> str:
    """Return the name of a tensor without wrappers and without these parts."""
    return ".".join(part for part in unwrapped(name).split(".") if part not in parts)


# --- the same bytes for the same settings ----------------------------------------------------


def sort_settings(net: PeftModel) -> None:
    """Sort the sets in the configuration of an adapter: peft would write them in the order of their hashes."""
    config = net.peft_config[NAME]
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))


def sorted_settings(file: Path) -> bytes:
    """Return the settings of an adapter with sorted keys and lists; the bytes of the file if it is not JSON."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        lists = {name: sorted(value) for name, value in found.items() if isinstance(value, list)}
    except (ValueError, AttributeError, TypeError):
        return file.read_bytes()
    return json.dumps({**found, **lists}, sort_keys=True).encode()
